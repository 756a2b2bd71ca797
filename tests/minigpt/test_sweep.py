"""The sweep: what it measures, how measurements are kept, and the plot of them."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

from minigpt import checkpoint, data, evaluate, peers, plots, sweep
from minigpt.config import GPTConfig
from minigpt.errors import UserError, run_script
from minigpt.files import merge, read_rows
from minigpt.model import GPT
from minigpt.quantization import recipe
from minigpt.quantization.convert import bits_per_weight, quantize_model
from minigpt.quantization.rtn import METHODS
from minigpt.quantization.tune import BATCH_SIZE
from minigpt.tokenizer import encode, read_tokenizer

TOKENIZER = checkpoint.DEMO_FOLDER / "tokenizer.tiktoken"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model and a text, where measurements go to out.json."""
    model = GPT(GPTConfig(vocab_size=4100, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data *= 5
    checkpoint.save(model, tmp_path / "tiny", TOKENIZER)
    (tmp_path / "text.txt").write_text(data.load_text("demo")[:2000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the sweep as its command does; returns what is in the file then."""

    def run(*arguments):
        options = ("tiny", "--dataset", "text.txt", "--json", "out.json", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["sweep", *options, *map(str, arguments)])
        sweep.main()
        return json.loads((folder / "out.json").read_text(encoding="utf-8"))

    return run


def test_measures_what_quantize_and_eval_would(folder, run):
    """Against the same steps one by one, through a saved checkpoint."""
    rows = run("--method", "absmax", "mse", "--group-size", "16", "row")
    assert [(row["method"], row["group_size"]) for row in rows] == [
        (method, size) for method in ("absmax", "mse") for size in (16, "row")
    ]
    tokens = torch.tensor(encode(read_tokenizer(TOKENIZER), (folder / "text.txt").read_text(encoding="utf-8")))
    fp16 = checkpoint.load(folder / "tiny", torch.float16).float()
    for row in rows:
        model = checkpoint.load(folder / "tiny", torch.float32)
        group_size = -1 if row["group_size"] == "row" else 16
        list(quantize_model(model, METHODS[row["method"]], group_size))
        settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": group_size}
        checkpoint.save(model, folder / "int4", TOKENIZER, settings)
        loaded = checkpoint.load(folder / "int4", torch.float16).float()
        score = evaluate.perplexity(loaded, tokens, 32, 32, 8, reference=fp16)
        assert row["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
        assert row["kl"] == pytest.approx(score.kl, rel=1e-4) and row["kl"] > 0
        assert row["top1"] == score.top1 and row["tokens_scored"] == score.tokens_scored
        assert row["bits_per_weight"] == bits_per_weight(loaded)
        assert row["fp16_perplexity"] == pytest.approx(evaluate.perplexity(fp16, tokens, 32, 32, 8).perplexity)
        assert row["model"] == "tiny" and row["text"] == "text.txt" and row["seed"] is None
        assert row["gpu"] == "cpu" and row["torch"] == torch.__version__
        assert "--method absmax" in row["command"]


def test_methods_that_look_at_text(folder, run, monkeypatch):
    """Each seed is measured, with other windows; the passes around a method are given what they need."""
    seen = []
    scale, tune = recipe.awq.scale, recipe.tune.tune

    def watched_scale(model, windows, *rest):
        seen.append(("awq", windows))
        return scale(model, windows, *rest)

    def watched_tune(model, reference, windows, steps, **options):
        seen.append(("tune", windows))
        assert len(windows) == 2 * BATCH_SIZE
        return tune(model, reference, windows, steps, **options)

    monkeypatch.setattr(recipe.awq, "scale", watched_scale)
    monkeypatch.setattr(recipe.tune, "tune", watched_tune)
    options = ("--group-size", "16", "--calibration", "text.txt", "--calibration-tokens", "256", "--seed", "5", "6")
    rows = run("--method", "mse", "gptq", "awq+mse+tune", "--steps", "2", *options)
    assert [(row["method"], row["seed"], row["calibration_tokens"], row["tuning_steps"]) for row in rows] == [
        ("mse", None, None, None),
        *((method, seed, 256, steps) for method, steps in (("gptq", None), ("awq+mse+tune", 2)) for seed in (5, 6)),
    ]
    assert [row["tuning_tokens"] for row in rows] == [None] * 3 + [2 * BATCH_SIZE * 32] * 2
    assert len({row["kl"] for row in rows}) == 5 and len({row["bits_per_weight"] for row in rows}) == 1
    assert [name for name, _ in seen] == ["awq", "tune"] * 2
    assert torch.equal(seen[0][1], seen[1][1][:8]) and not torch.equal(seen[0][1], seen[2][1])


def test_measurements_are_merged(run):
    first = run("--method", "absmax", "--group-size", "16", "32")
    again = run("--method", "absmax", "mse", "--group-size", "32")
    assert [(row["method"], row["group_size"]) for row in again] == [("absmax", 16), ("absmax", 32), ("mse", 32)]
    assert again[0] == first[0] and again[1]["command"] != first[1]["command"]
    other = run("--method", "mse", "--group-size", "32", "--stride", "16")  # another protocol is no repetition
    assert other[:3] == again and len(other) == 4


def test_other_calibration_is_another_measurement(folder, run):
    """The text, how much of it, the steps: what was measured with others stays. The same again replaces."""
    (folder / "other.txt").write_text(data.load_text("demo")[2000:4000], encoding="utf-8")
    common = ("--group-size", "16", "--method", "mse+tune")
    given = [("text.txt", 64, 1), ("other.txt", 64, 1), ("text.txt", 128, 1), ("text.txt", 64, 2), ("text.txt", 64, 1)]
    for text, n_tokens, steps in given:
        rows = run(*common, "--calibration", text, "--calibration-tokens", n_tokens, "--steps", steps)
    names = ("calibration", "calibration_tokens", "tuning_steps")
    assert [tuple(row[name] for name in names) for row in rows] == given[:4]


def test_what_is_drawn_for_a_method_does_not_depend_on_the_others(run):
    """gptq beside gptq+tune, for whose sake the end of the text is set aside, measures what gptq alone does."""
    options = ("--group-size", "16", "--calibration", "text.txt", "--calibration-tokens", "256")
    (alone,) = run("--method", "gptq", *options)
    beside, tuned = run("--method", "gptq", "gptq+tune", "--steps", "1", *options)
    assert alone["kl"] == beside["kl"] and tuned["method"] == "gptq+tune"


def test_the_committed_measurements_can_be_merged_with():
    path = ROOT / "results" / "accuracy.json"
    rows = read_rows("--json", path, sweep.IDENTITY)
    for row in rows:
        assert merge(rows, row, sweep.IDENTITY) == rows, "each is told from all others"


def test_group_sizes_that_fit_by_default(run):
    """Of 32, 64, 128 and whole rows, in a model with layers of 32 inputs."""
    assert [row["group_size"] for row in run("--method", "absmax")] == [32, "row"]


def test_interrupted_it_keeps_what_it_measured(folder, run, monkeypatch):
    """Ctrl-C while the third model is scored: FP16 first, then a measurement."""
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perplexity(*arguments, **options)

    perplexity = evaluate.perplexity
    monkeypatch.setattr(evaluate, "perplexity", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: run("--method", "absmax", "minmax", "mse", "--group-size", "16"))
    assert stopped.value.code == 130
    assert [row["method"] for row in json.loads((folder / "out.json").read_text(encoding="utf-8"))] == ["absmax"]


def test_bad_input_is_named_before_any_work(folder, run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "perplexity", None)  # nobody gets that far
    for method in ("magic", "mse+awq"):
        with pytest.raises(SystemExit):
            run("--method", method)
        assert f"--method: '{method}' is none of absmax" in capsys.readouterr().err
    for arguments, message in [
        (("--group-size", "48"), "--group-size 48 does not fit this model"),
        (("--stride", "40"), "--stride is 40"),
        (("--context-length", "33"), "--context-length is 33"),
        (("--method", "gptq", "--calibration", "text.txt", "--calibration-tokens", "9"), "--calibration-tokens 9"),
        (("--method", "mse", "--calibration", "text.txt"), "--calibration is for gptq, .*, not for mse"),
        (("--method", "mse", "--calibration-tokens", "64"), "--calibration-tokens is for gptq, .*, not for mse"),
        (("--method", "mse", "hqq", "--seed", "0"), "--seed is for gptq, .*, not for mse, hqq"),
        (("--method", "gptq", "--steps", "5"), r"--steps is for METHOD\+tune, not for gptq"),
        (("--method",), "nothing to measure"),
        (("--dataset", ""), "unknown dataset ''"),
        (("--dataset", "nothing.txt"), "unknown dataset 'nothing.txt'"),
        (("--json", "nowhere/out.json"), "no folder nowhere"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*arguments)
    for flag, word in (("--batch-size", "0"), ("--steps", "0"), ("--group-size", "abc"), ("--group-size", "-1")):
        with pytest.raises(SystemExit):
            run(flag, word)
        assert f"{flag}: " in (said := capsys.readouterr().err) and f"{word}" in said and "invalid" not in said
    for content in ("{", "{}", '[{"perplexity": 1}]', "[" * 200000):
        (folder / "out.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"out\.json: not"):
            run()


def test_a_peer_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--peer quanto is not installed here; pip install optimum-quanto"):
        run("--peer", "quanto")


class TestPeers:
    @pytest.fixture
    def lossless(self, monkeypatch):
        """A peer that leaves the weights as they are, and remembers the calibration text that it was given."""
        seen = []

        def quantize(model, group_size, windows):
            seen.append(windows)
            return peers._replace_weights(model, group_size, lambda weight: weight.clone())

        peer = peers.Peer("pytest", "pytest", calibrated=True, quantize=quantize)
        monkeypatch.setitem(peers.PEERS, "lossless", peer)
        return seen

    def test_are_scored_as_ours_are(self, run, lossless):
        """Once for each seed, with other windows of the text; a model that nothing happened to has lost nothing."""
        options = ("--calibration", "text.txt", "--calibration-tokens", "320", "--seed", "3", "4")
        rows = run("--method", "--peer", "lossless", "--group-size", "16", *options)
        assert [(row["method"], row["seed"]) for row in rows] == [("peer:lossless", 3), ("peer:lossless", 4)]
        for row in rows:
            assert row["kl"] == 0 and row["top1"] == 1 and row["perplexity"] == row["fp16_perplexity"]
            assert row["bits_per_weight"] == 4 + 32 / 16
            assert row["peer_version"] == pytest.__version__ and row["calibration_tokens"] == 320
        first, second = lossless
        assert first.shape == second.shape == (10, 32) and not torch.equal(first, second)

    @pytest.mark.parametrize("name", ["hqq", "quanto"])
    def test_that_need_no_text(self, name, folder):
        """If one is installed: its weights are near the model's, and as many levels as four bits have."""
        pytest.importorskip(peers.PEERS[name].module)
        before = checkpoint.load(folder / "tiny", torch.float32).h[0].mlp.c_fc.weight
        model, bits = peers.PEERS[name].quantize(checkpoint.load(folder / "tiny", torch.float32), 16, torch.empty(0))
        after = model.h[0].mlp.c_fc.weight
        assert bits == 6 and (after - before).norm() < 0.2 * before.norm()
        assert max(len(group.unique()) for group in after.reshape(-1, 16)) <= 16


class TestPlot:
    def test_draws_every_measurement(self):
        """Curves go through the means over the seeds, in the order of bits; FP16 is a line, a peer has points."""
        common = {"model": "m", "text": "t", "context_length": 8, "stride": 8, "gpu": "g", "fp16_perplexity": 10.0}
        measured = [("a", 4.5, 64, 0, 11.0, 0.25), ("a", 4.5, 64, 1, 13.0, 0.75), ("a", 4.2, 128, 0, 14.0, 1.0)]
        measured += [("peer:b", 4.25, 128, None, 12.5, 0.75)]
        names = ("method", "bits_per_weight", "group_size", "seed", "perplexity", "kl")
        rows = [common | dict(zip(names, values, strict=True)) for values in measured]
        figure = plots.draw_accuracy([*rows, *(row | {"text": "u"} for row in rows)])
        assert len(figure.axes) == 4
        expected = [([14.0, 12.0], 12.5, 10.0)] * 2 + [([1.0, 0.5], 0.75, 0.0)] * 2
        for panel, (curve, point, fp16) in zip(figure.axes, expected, strict=True):
            lines = {line.get_label(): line for line in panel.get_lines()}
            assert lines["a"].get_xdata().tolist() == [4.2, 4.5] and lines["a"].get_ydata().tolist() == curve
            assert lines["b (peer)"].get_xydata().tolist() == [[4.25, point]]
            assert lines["b (peer)"].get_linestyle() == "None"
            assert set(lines["FP16"].get_ydata()) == {fp16}

    def test_draws_the_committed_measurements(self, tmp_path):
        (tmp_path / "accuracy.json").write_bytes((ROOT / "results" / "accuracy.json").read_bytes())
        assert plots.save_accuracy(tmp_path / "accuracy.json").read_bytes().startswith(b"\x89PNG")

    def test_says_where_there_is_nothing(self, tmp_path):
        with pytest.raises(UserError, match="no measurements"):
            plots.save_accuracy(tmp_path / "accuracy.json")
