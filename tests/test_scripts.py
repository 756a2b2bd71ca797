"""The commands that users type, as they type them."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.model import GPT

ROW_FIELDS = {
    "weights": str,
    "bits_per_weight": float,
    "bytes": int,
    "perplexity": float,
    "tokens_scored": int,
    "kl": float,
    "top1": float,
    "scoring_tokens_per_second": float,
    "prefill_tokens_per_second": float,
    "decode_tokens_per_second": float,
    "decode_how": str,
    "peak_memory_bytes": int,
    "device": str,
    "int4_path": str,
    "made_how": str,
}


def run(folder, script, *arguments, **environment):
    """Runs a script of the project in `folder`."""
    command = [sys.executable, str(ROOT / script), *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment})


def must_work(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def must_fail(result, message):
    """Exit status 2, and one line that says why."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1], result.stderr


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """A few thousand tokens of the demo's test text, to keep these tests short."""
    from minigpt import data

    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(data.load_text("demo")[:12000], encoding="utf-8")
    return path


def test_quantize_then_eval_the_demo(tmp_path, short_text):
    output = must_work(run(tmp_path, "quantize.py", "demo"))
    assert "mlp.c_proj" in output and "checkpoints/demo-int4" in output and "python eval.py demo" in output
    assert "wte" in output
    table = must_work(run(tmp_path, "eval.py", "demo", "--dataset", short_text, "--json", "out.json"))
    assert "int4 path: " in table and "perplexity" in table and "windows of 512, stride 512" in table
    assert all(len(line) <= 120 for line in table.split("\n\n")[1].splitlines())  # the table fits a terminal
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    fp16, int4 = content["rows"]
    for row in (fp16, int4):
        not_of_fp16 = dict.fromkeys(("kl", "top1", "made_how"), type(None)) if row is fp16 else {}
        assert {name: type(value) for name, value in row.items()} == ROW_FIELDS | not_of_fp16
        assert row["tokens_scored"] == content["protocol"]["tokens"] - -(-content["protocol"]["tokens"] // 512)
    assert int4["made_how"] == "mse, groups of 64, embedding int8" and int4["made_how"] in table
    assert fp16["weights"] == "fp16" and fp16["bits_per_weight"] == 16
    assert 4.2 < int4["bits_per_weight"] < 4.5
    assert int4["bytes"] == (tmp_path / "checkpoints" / "demo-int4" / "model.safetensors").stat().st_size
    # Trained: far better than guessing among 4096 tokens. And int4 costs a few percent, not more.
    assert fp16["perplexity"] < 100
    assert 0.99 < int4["perplexity"] / fp16["perplexity"] < 1.06
    assert 0.001 < int4["kl"] < 0.06 and 0.8 < int4["top1"] < 1
    # Inputs of 8 bits when reading: a little further from FP16, which reads as before.
    options = ("--activation-bits", 8, "--json", "rounded.json")
    assert "round inputs to 8 bits" in must_work(run(tmp_path, "eval.py", "demo", "--dataset", short_text, *options))
    plain, rounded = json.loads((tmp_path / "rounded.json").read_text(encoding="utf-8"))["rows"]
    assert plain["perplexity"] == fp16["perplexity"] and 1.01 < rounded["kl"] / int4["kl"] < 1.2


def test_several_quantized_checkpoints(tmp_path, short_text):
    for method, group_size in [("absmax", "row"), ("mse", "32")]:
        must_work(run(tmp_path, "quantize.py", "demo", "--method", method, "--group-size", group_size,
                      "--output", tmp_path / method))  # fmt: skip
    must_work(
        run(tmp_path, "eval.py", "demo", "--quantized", "absmax", "mse", "--dataset", short_text, "--json", "out.json",
            "--context-length", 256, "--stride", 128)
    )  # fmt: skip
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["protocol"]["context_length"] == 256 and content["protocol"]["stride"] == 128
    fp16, row, small = content["rows"]
    assert fp16["perplexity"] < small["perplexity"] < row["perplexity"]
    assert 0 < small["kl"] < row["kl"] and row["top1"] < small["top1"] < 1


def test_a_gpt2_saved_by_transformers_on_raw_wikitext(tmp_path, text_folder):
    """A GPT-2-shaped checkpoint from elsewhere, GPT-2's tokens, a raw WikiText file."""
    config = transformers.GPT2Config(n_positions=64, n_embd=48, n_layer=2, n_head=3)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "mine")
    raw = tmp_path / "wiki.raw"
    raw.write_text(
        "\n".join((text_folder / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:40])
    )
    must_work(run(tmp_path, "quantize.py", "mine", "--group-size", "48"))
    table = must_work(run(tmp_path, "eval.py", "mine", "--dataset", raw, "--json", "out.json"))
    assert "mine-int4" in table
    fp16, int4 = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert fp16["perplexity"] == pytest.approx(50257, rel=0.3)  # it is untrained
    assert int4["tokens_scored"] == fp16["tokens_scored"] > 1000


def tiny_model(seed, **shape):
    model = GPT(GPTConfig(**({"vocab_size": 4200, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2} | shape)))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def save_int4(model, folder):
    from minigpt.quantization import gptq_format
    from minigpt.quantization.convert import quantize_model
    from minigpt.quantization.rtn import METHODS

    list(quantize_model(model, METHODS["absmax"], 16))
    settings = gptq_format.describe("absmax", 16, True)
    checkpoint.save(model, folder, checkpoint.DEMO_FOLDER / "tokenizer.tiktoken", settings)


def test_models_named_alike_are_told_apart(tmp_path, short_text):
    """x/mine and y/mine have the same default folder: neither takes the other's place unasked."""
    for seed, name in enumerate(("x", "y")):
        checkpoint.save(tiny_model(seed), tmp_path / name / "mine", checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
    for _ in range(2):  # again is no matter
        must_work(run(tmp_path, "quantize.py", "x/mine", "--group-size", "16"))
    refused = run(tmp_path, "quantize.py", "y/mine", "--group-size", "16")
    must_fail(refused, "checkpoints/mine-int4 holds another model; to replace it, add --output checkpoints/mine-int4")
    must_fail(run(tmp_path, "eval.py", "y/mine", "--dataset", short_text), "mine-int4 was made from another model")
    must_work(run(tmp_path, "quantize.py", "y/mine", "--group-size", "16", "--output", "checkpoints/mine-int4"))


def test_quantize_with_calibration_text(tmp_path, short_text):
    checkpoint.save(tiny_model(0), tmp_path / "mine", checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
    arguments = ("quantize.py", "mine", "--group-size", "16", "--calibration", short_text)
    options = ("--calibration-tokens", "700", "--seed", "3")
    output = must_work(run(tmp_path, *arguments, "--method", "awq+yaqa+tune", "--steps", "2", *options))
    assert f"calibrating on {short_text}: 640 tokens, 10 windows of 64, seed 3; tuning on 16 windows" in output
    assert "warning: 640 calibration tokens say little about layers of 64 inputs" in output
    assert "note: activation-aware scaling: " in output and "note: tuning: KL divergence " in output
    config = json.loads((tmp_path / "checkpoints" / "mine-int4" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["meta"] == {
        "quantizer": ["minigpt-int4"],
        "method": "awq+yaqa+tune",
        "embedding": "int8",
        "calibration": {"text": str(short_text), "tokens": 640, "seed": 3, "steps": 2, "tuning_tokens": 1024},
    }
    must_fail(run(tmp_path, *arguments), "--calibration is for gptq, quantease, gptaq, yaqa, awq+METHOD")
    must_fail(run(tmp_path, *arguments, "--method", "gptq", "--steps", "5"), "--steps is for METHOD+tune, not for gptq")


def test_quantize_spares_the_models_own_folder(tmp_path):
    checkpoint.save(tiny_model(0), tmp_path / "mine")
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    for model in ("mine", "mine/model.safetensors"):
        result = run(tmp_path, "quantize.py", model, "--group-size", "16", "--output", tmp_path / "mine")
        must_fail(result, "is the model's own folder")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before


def test_generate_with_a_padded_vocabulary(tmp_path):
    """Of 50,000 tokens the tokenizer knows 4,096: only those are written."""
    tokenizer = checkpoint.DEMO_FOLDER / "tokenizer.tiktoken"
    checkpoint.save(tiny_model(0, vocab_size=50000), tmp_path / "padded", tokenizer)
    arguments = ("--model", tmp_path / "padded", "--max-new-tokens", "20", "--temperature", "5", "hello")
    must_work(run(tmp_path, "minigpt/generate.py", *arguments, PYTHONPATH=str(ROOT)))


def test_the_shortest_model_that_can_be_timed(tmp_path):
    (tmp_path / "text.txt").write_text("a few words", encoding="utf-8")
    for n_positions in (3, 4):
        folder = tmp_path / f"short{n_positions}"
        checkpoint.save(tiny_model(0, n_positions=n_positions), folder, checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
        save_int4(tiny_model(0, n_positions=n_positions), tmp_path / f"int4-{n_positions}")
    options = ("--dataset", "text.txt", "--quantized")
    must_fail(run(tmp_path, "eval.py", "short3", *options, "int4-3"), "short3 reads 3 tokens")
    must_work(run(tmp_path, "eval.py", "short4", *options, "int4-4"))


def test_bits_of_a_model_that_is_partly_int4():
    from minigpt.quantization.convert import bits_per_weight, quantize_model
    from minigpt.quantization.rtn import METHODS

    model = tiny_model(0)
    assert bits_per_weight(model) == 16
    report = next(quantize_model(model, METHODS["mse"], 16))  # c_attn only: 3 of 12 n_embd^2
    assert bits_per_weight(model) == pytest.approx((8 * report.stored_bytes + 16 * 9 * 16**2) / (12 * 16**2))


def test_default_dataset_is_wikitext_2(tmp_path, text_folder):
    """Seen by asking for it where it is missing; what is in it, test_data.py counts."""
    checkpoint.save(tiny_model(0, vocab_size=50257), tmp_path / "tiny")
    must_work(run(tmp_path, "quantize.py", "tiny", "--group-size", "16"))
    (tmp_path / "data" / "tiktoken").mkdir(parents=True)
    for file in (text_folder / "tiktoken").iterdir():
        (tmp_path / "data" / "tiktoken" / file.name).write_bytes(file.read_bytes())
    result = run(tmp_path, "eval.py", "tiny", MINIGPT_DATA=str(tmp_path / "data"))
    must_fail(result, "wikitext-2/wiki.test.raw: no such file")


def test_demo_is_better_than_an_untrained_model_and_than_bigrams(short_text):
    """As in the demo's README, on a short piece of the text that is scored there."""
    from minigpt import baselines, data, evaluate
    from minigpt.tokenizer import encode, read_tokenizer

    assert baselines.bigram_perplexity(torch.tensor([0, 1] * 50), torch.tensor([0, 1] * 50), 2) < 1.2
    tokenizer = read_tokenizer(checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
    train, test = (
        torch.tensor(encode(tokenizer, data.load_text(*text))) for text in (("demo", "train"), (short_text,))
    )
    demo = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32)
    bigram = baselines.bigram_perplexity(train, test, 4096, weight=0.9)
    assert 2 * evaluate.perplexity(demo, test, 512, 512).perplexity < bigram < 4096 / 2


class TestErrors:
    def test_of_quantize(self, tmp_path):
        must_fail(run(tmp_path, "quantize.py", "gpt9"), "unknown model 'gpt9'")
        must_fail(run(tmp_path, "quantize.py", "demo", "--group-size", "96"), "possible: 16, 32, 64, 128, 256, row")
        arguments = ("--group-size", "96", "--method", "gptq", "--calibration", "nowhere")  # named before text is read
        must_fail(run(tmp_path, "quantize.py", "demo", *arguments), "--group-size 96 does not fit this model")
        must_fail(run(tmp_path, "quantize.py", "demo", "--group-size", "ten"), "--group-size")
        must_fail(run(tmp_path, "quantize.py", "demo", "--seed", "1"), "--seed is for gptq")
        must_fail(run(tmp_path, "quantize.py", "demo", "--calibration-tokens", "1"), "--calibration-tokens is for gptq")
        must_fail(run(tmp_path, "quantize.py", "demo", "--method", "magic"), "absmax")
        (tmp_path / "file").write_text("", encoding="utf-8")
        must_fail(run(tmp_path, "quantize.py", "demo", "--output", "file"), "is a file")
        must_fail(run(tmp_path, "quantize.py", "demo", "--output", "file/below"), "is a file")
        must_fail(run(tmp_path, "quantize.py", "file"), "not a whole safetensors file")
        must_fail(run(tmp_path, "quantize.py", "demo", "--output", ""), "--output: it is empty")
        must_fail(run(tmp_path, "quantize.py", "demo", "--group-size", "-1"), "'-1' is neither a number of weights")
        must_fail(run(tmp_path, "quantize.py", ""), "unknown model ''")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
        (tmp_path / "loop").symlink_to("loop")
        must_fail(run(tmp_path, "quantize.py", "loop"), "unknown model 'loop'")

    def test_of_eval(self, tmp_path, short_text):
        must_fail(run(tmp_path, "eval.py", "demo"), "python quantize.py demo")
        must_fail(run(tmp_path, "eval.py", "demo", "--quantized", "nowhere"), "--quantized nowhere")
        must_work(run(tmp_path, "quantize.py", "demo"))
        must_fail(run(tmp_path, "eval.py", "demo", "--dataset", "nothing.txt"), "unknown dataset 'nothing.txt'")
        (tmp_path / "empty.txt").write_text("", encoding="utf-8")
        must_fail(run(tmp_path, "eval.py", "demo", "--dataset", "empty.txt"), "is empty")
        text = ("--dataset", short_text)
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--context-length", "1000"), "from 2 to 512")
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--stride", "0"), "--stride is 0")
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--batch-size", "0"), "--batch-size: 0 is not from 1 to")
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--json", "no/such/out.json"), "no folder no/such")
        must_fail(run(tmp_path, "eval.py", "checkpoints/demo-int4", *text), "give the fp one it was made from")
        must_fail(run(tmp_path, "eval.py", "demo", "--quantized", "empty.txt"), "empty.txt is no int4 checkpoint")
        must_fail(run(tmp_path, "eval.py", "demo", "--dataset", ""), "unknown dataset ''")
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--device", "cuda:99"), "--device cuda:99")
        must_fail(run(tmp_path, "eval.py", "demo", *text, "--compile", "--device", "cpu"), "--compile is for a GPU")
        must_fail(run(tmp_path, "eval.py", "demi", *text), "unknown model 'demi'")

    def test_of_generate(self, tmp_path):
        result = run(ROOT, "minigpt/generate.py", "--model", "gpt9", "hello", PYTHONPATH=str(ROOT))
        must_fail(result, "unknown model 'gpt9'")
        result = run(ROOT, "minigpt/generate.py", b"caf\xe9", PYTHONPATH=str(ROOT))
        must_fail(result, "the prompt 'caf\\udce9' is not UTF-8 text")
        result = run(ROOT, "minigpt/generate.py", "hello", "--seed", 2**63, PYTHONPATH=str(ROOT))
        must_fail(result, "--seed: 9223372036854775808 is not from 0 to 2^63 - 1")

    def test_output_that_the_terminal_cannot_show(self, tmp_path):
        arguments = ("naïve", "--max-new-tokens", "0")
        result = run(tmp_path, "minigpt/generate.py", *arguments, PYTHONPATH=str(ROOT), PYTHONIOENCODING="ascii")
        assert must_work(result) == "na\\xefve\n"

    def test_full_disk(self, tmp_path, short_text):
        """/dev/full takes nothing: as good as a disk without space."""
        checkpoint.save(tiny_model(0), tmp_path / "mine", checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
        save_int4(tiny_model(0), tmp_path / "int4")
        options = ("--quantized", "int4", "--dataset", short_text, "--json", "/dev/full")
        must_fail(run(tmp_path, "eval.py", "mine", *options), "No space left on device")

    @pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
    def test_a_checkpoint_that_the_disk_does_not_take(self, tmp_path):
        """A file may grow to a megabyte: the library that writes weights has an error of its own for that."""
        must_work(run(tmp_path, "quantize.py", "demo", "--method", "absmax"))
        before = (tmp_path / "checkpoints" / "demo-int4" / "model.safetensors").read_bytes()
        command = f"trap '' XFSZ; ulimit -f 1000; exec '{sys.executable}' '{ROOT / 'quantize.py'}' demo"
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        must_fail(result, "cannot write to checkpoints/demo-int4")
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["demo-int4"]
        assert (tmp_path / "checkpoints" / "demo-int4" / "model.safetensors").read_bytes() == before

    @pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
    def test_closed_outputs(self, tmp_path):
        """Nobody will read a word, and the work is done all the same."""
        command = f"'{sys.executable}' '{ROOT / 'quantize.py'}' demo --method absmax >&- 2>&-"
        assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 0
        assert (tmp_path / "checkpoints" / "demo-int4" / "model.safetensors").exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_interrupt(self, tmp_path):
        """Ctrl-C: status 130, one line, nothing half-written."""
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--preset",
            "tiny",
            "--output",
            "out",
            "--eval-every",
            "4000",
        ]
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job may not by itself
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        read = ""
        while "step/s" not in read and (
            character := process.stderr.read(1)
        ):  # the bar of the loop, however long it takes
            read += character
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=300)
        assert process.returncode == 130, rest
        assert rest.strip().splitlines()[-1] == "error: interrupted" and "Traceback" not in rest
        assert not list(tmp_path.iterdir())


class TestTrain:
    def test_learning_rate(self):
        """Up to the peak, then down to exactly a tenth of it at the last step."""
        import argparse

        import train

        args = argparse.Namespace(learning_rate=1.0, warmup=5, steps=25)
        rates = [train.learning_rate(step, args) for step in range(25)]
        assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]) and rates[-1] == pytest.approx(0.1)
        assert rates[5:] == sorted(rates[5:], reverse=True)

    def test_a_model_learns_its_text(self, tmp_path):
        """A short text, seen often: the loss falls far under that of guessing, and what is saved evaluates."""
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 4000, encoding="utf-8")
        output = must_work(run(tmp_path, "train.py", "--preset", "tiny", "--dataset", "text.txt", "--steps", "60",
                               "--batch-size", "8", "--warmup", "5",
                               "--eval-every", "20", "--output", "out"))  # fmt: skip
        loaded = checkpoint.load(tmp_path / "out", torch.float32)
        record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
        assert [loss["step"] for loss in record["losses"]] == [20, 40, 60]
        losses = [loss["validation"] for loss in record["losses"]]
        assert losses[-1] < min(4, 0.6 * losses[0], math.log(loaded.config.vocab_size) - 3)
        assert record["tokens_seen"] == 60 * 8 * loaded.config.n_positions
        assert "--steps 60" in record["command"] and record["settings"]["seed"] == 0
        assert "a sample:" in output
        assert loaded.config.n_embd == 128
        must_work(run(tmp_path, "quantize.py", "out"))
        must_fail(run(tmp_path, "train.py", "--output", "out"), "--output out holds a model already")

    def test_an_unfinished_record_counts_what_has_been_seen(self, monkeypatch):
        import argparse

        import train

        monkeypatch.setattr(sys, "argv", ["train.py"])
        args = argparse.Namespace(steps=9, accumulate=2, batch_size=3, device="cpu")
        model = GPT(GPTConfig(vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2))
        record = train.record(args, model, 1000, [{"step": 3, "train": 2.0, "validation": 2.0}], 1.0)
        assert record["tokens_seen"] == 3 * 2 * 3 * 5

    def test_splits(self, tmp_path, monkeypatch):
        """Datasets have their own; a file has none, whatever its name."""
        import train
        from minigpt import data

        asked = []
        monkeypatch.setattr(data, "hub_text", lambda *arguments: asked.append(arguments[:2]) or arguments[1])
        monkeypatch.chdir(tmp_path)
        assert train.load_splits("owner/name") == ("train", "validation")
        assert train.load_splits("c4") == ("train", "validation")
        assert asked == [(name, split) for name in ("owner/name", data.C4) for split in ("train", "validation")]
        (tmp_path / "c4").write_text("0123456789" * 10, encoding="utf-8")
        assert [len(text) for text in train.load_splits("c4")] == [95, 5]

    def test_errors(self, tmp_path):
        (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
        must_fail(run(tmp_path, "train.py", "--dataset", "short.txt"), "fewer than a window")
        must_fail(run(tmp_path, "train.py", "--steps", "0"), "--steps: 0 is not from 1 to")
        must_fail(run(tmp_path, "train.py", "--clip", "0"), "--clip is 0.0, it must be more than 0 (inf: never clip)")
        must_fail(run(tmp_path, "train.py", "--preset", "huge"), "gpt2-xl")
        assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
