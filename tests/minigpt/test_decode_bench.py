"""The benchmark of decoding: what its measurements say, and that nothing wrong is measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, ROOT

from minigpt import bench, bench_plots, checkpoint, evaluate, step_profile
from minigpt.config import GPTConfig
from minigpt.decode import DecodeStep, model_logits
from minigpt.errors import UserError
from minigpt.files import merge, read_rows
from minigpt.model import GPT, KVCache
from minigpt.quantization.linear import Int4Linear
from minigpt.sampling import GREEDY
from minigpt.step_profile import GAPS, MARK, PARTS, Kernel

C, LAYERS, V, T = 48, 2, 101, 40
BLOCK_WEIGHTS = 12 * C * C
SMALL = LAYERS * (9 * C + 4 * C) + 2 * C  # biases and LayerNorms
BANDWIDTH = 5e9


def random_model(device="cpu", dtype=torch.float32):
    model = GPT(GPTConfig(vocab_size=V, n_positions=T, n_embd=C, n_layer=LAYERS, n_head=3))
    model.init_weights()
    return model.to(device, dtype).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a small checkpoint lies, mine/; measurements take no longer than they must."""
    checkpoint.save(random_model(), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(evaluate, "copy_bandwidth", lambda device: BANDWIDTH)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    bench.main()


def decode(monkeypatch, *arguments):
    """Measures the small checkpoint on a CPU; returns what is in the file."""
    run(monkeypatch, "decode", "--models", "mine", "--device", "cpu", "--embedding", "fp16", "--json", "out.json",
        *arguments)  # fmt: skip
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


def test_measurements_on_a_cpu(folder, monkeypatch, capsys):
    rows = decode(monkeypatch, "--batch-sizes", 1, 3, "--contexts", 8, 40)
    places = [(row["weights"], row["what"], row["batch"], row["context"]) for row in rows]
    each = [("decode", 1, 8), ("decode", 1, 40), ("decode", 3, 8), ("decode", 3, 40), ("prefill", 3, T)]
    assert sorted(places) == sorted((weights, *place) for weights in ("fp32", "bf16", "int4") for place in each)
    floats = LAYERS * BLOCK_WEIGHTS + (V + T) * C + SMALL  # the output layer's weight is the embedding's
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["how"] == "eager" and row["model"] == "mine"
        assert row["gpu"].startswith("cpu") and row["torch"] == torch.__version__ and not row["random_weights"]
        assert row["group_size"] == (16 if row["weights"] == "int4" else None)
        if row["weights"] != "int4":
            assert row["weight_bytes"] == floats * (4 if row["weights"] == "fp32" else 2)
        else:  # at least codes of 4 bits, and a scale of 16 and a zero of 4 for each 16; the rest as it was
            packed = LAYERS * BLOCK_WEIGHTS * (4 + 20 / 16) / 8 + 2 * LAYERS * 9 * C
            assert packed + 4 * (floats - LAYERS * (BLOCK_WEIGHTS + 9 * C)) <= row["weight_bytes"] < 2 * floats
        if row["what"] == "decode":
            n_bytes = 2 if row["weights"] == "bf16" else 4
            moved = row["weight_bytes"] - T * C * n_bytes + 2 * LAYERS * row["batch"] * row["context"] * C * n_bytes
            assert row["roofline_tokens_per_second"] == pytest.approx(row["batch"] * BANDWIDTH / moved)
            assert row["share_of_roofline"] * row["roofline_tokens_per_second"] == pytest.approx(
                row["tokens_per_second"]
            )
    printed = capsys.readouterr().out
    assert printed.count("decode") == 12 and printed.count("prefill") == 3


def test_a_repeated_measurement_takes_the_place_of_the_first(folder, monkeypatch):
    first = decode(monkeypatch, "--batch-sizes", 1, "--contexts", 8)
    other = first[0] | {"gpu": "another"}
    (folder / "out.json").write_text(
        json.dumps([other, *[row | {"date": "before"} for row in first]]), encoding="utf-8"
    )
    again = decode(monkeypatch, "--batch-sizes", 1, "--contexts", 8, 9)
    assert again[0] == other
    assert [row["context"] for row in again[1 : 1 + len(first)]] == [row["context"] for row in first]
    assert "before" not in [row["date"] for row in again]
    assert len(again) == 1 + len(first) + 3  # another context of three kinds of weights


def test_merge():
    rows = [{"a": 1, "b": 2, "x": 0}, {"a": 1, "b": 3, "x": 0}]
    assert merge(rows, {"a": 1, "b": 3, "x": 1}, ("a", "b")) == [rows[0], {"a": 1, "b": 3, "x": 1}]
    assert merge(rows, {"a": 2, "b": 3, "x": 1}, ("a", "b")) == [*rows, {"a": 2, "b": 3, "x": 1}]


def test_another_file_is_not_overwritten(folder, monkeypatch):
    for text, message in [("{", "not JSON"), ('{"a": 1}', "not a list"), ('[{"a": 1}]', "not a list")]:
        (folder / "out.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"--json out.json.*{message}"):
            decode(monkeypatch)
        assert (folder / "out.json").read_text(encoding="utf-8") == text
    assert read_rows("--json", folder / "none.json", ("a",)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", 41), "--contexts 41 is more than mine reads: its n_positions is 40"),
        (("--group-size", 32), "--group-size 32 does not fit .*possible: 16, 48, row"),
        (("--how", "captured"), "--how captured is not possible on cpu; possible: eager"),
        (("--models", "gpt9"), "unknown model 'gpt9'"),
        (("--json", "no/such.json"), "--json no/such.json: there is no folder no"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used"),
    ],
    ids=str,
)
def test_bad_flags_of_decode(folder, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        decode(monkeypatch, *arguments)


def test_other_bad_flags(folder, monkeypatch, capsys):
    with pytest.raises(UserError, match="--context is 41, it must be from 1 to 40"):
        run(monkeypatch, "profile", "--model", "mine", "--context", 41, "--device", "cpu", "--json", "out.json")
    with pytest.raises(UserError, match="--folder . has neither decode.json nor profile.json"):
        run(monkeypatch, "plots", "--folder", ".")
    Path("out.json").write_text("[1]", encoding="utf-8")
    for command in (("profile", "--model"), ("decode", "--models")):
        with pytest.raises(UserError, match=r"--json out\.json: not a list of such measurements"):
            run(monkeypatch, *command, "mine", "--device", "cpu", "--json", "out.json")
    Path("decode.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"--folder decode\.json: not JSON"):
        run(monkeypatch, "plots", "--folder", ".")
    for flag in ("--batch-sizes", "--contexts"):
        with pytest.raises(SystemExit):
            decode(monkeypatch, flag, 0)
        assert f"{flag}: 0 is not from 1 to" in capsys.readouterr().err


def test_a_step_is_timed_within_its_positions():
    """From begin to end, then again: never at `end`, where the cache is over."""
    seen = []

    def step_logits(tokens, positions, cache):
        seen.append(positions[0].item())
        return torch.zeros(2, 11, device=DEVICE)

    tokens, positions = torch.zeros((2, 1), dtype=torch.int64, device=DEVICE), torch.full((2, 1), 3, device=DEVICE)
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    cache = KVCache(config, 2, 8, torch.float32, torch.device(DEVICE))
    step = DecodeStep(step_logits, GREEDY.choose, cache, tokens, positions, "eager")
    evaluate.step_rate(step, 5, 8, seconds=0.05)
    assert set(seen) == {5, 6, 7} and seen[:6] == [5, 6, 7] * 2


def test_rates_count_the_tokens_of_all_sequences(monkeypatch):
    """With a clock that advances 0.5 s a reading, so that a timed call takes 0.5 s."""
    clock = iter(range(10**6))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock) * 0.5)
    model = random_model()
    assert evaluate.scoring_rate(model, torch.arange(T), 20, 3) == 3 * 20 / 0.5
    rate = bench.time_decode(model_logits(model), model, 5, 8, "eager", dynamic=False)
    assert rate == 5 / 0.5


def test_prefill_reads_the_largest_batch_and_as_much_as_the_model_can(folder, monkeypatch):
    def prefill_rate(model, tokens, length, seconds, batch_size):
        assert len(tokens) == length * batch_size and tokens.max() < V
        return float(length * batch_size)

    monkeypatch.setattr(evaluate, "prefill_rate", prefill_rate)
    rows = decode(monkeypatch, "--batch-sizes", 2, 3, 1, "--contexts", 4)
    prefill = [row for row in rows if row["what"] == "prefill"]
    assert [(row["batch"], row["context"], row["tokens_per_second"]) for row in prefill] == [(3, T, 3.0 * T)] * 3


def test_int4_reads_with_inputs_of_16_and_of_8_bits(folder, monkeypatch):
    """On a GPU; here as if there were one."""
    seen = []

    def scoring_rate(model, *_):
        seen.append([layer.activation_bits for layer in model.modules() if isinstance(layer, Int4Linear)])
        return 1.0

    monkeypatch.setattr(evaluate, "scoring_rate", scoring_rate)
    of_a_gpu = bench.prefill_ways
    monkeypatch.setattr(bench, "prefill_ways", lambda weights, device: of_a_gpu(weights, "cuda"))
    rows = decode(monkeypatch, "--batch-sizes", 1, "--contexts", 4)
    prefill = [(row["weights"], row["how"]) for row in rows if row["what"] == "prefill"]
    assert sorted(prefill) == [("bf16", "captured"), ("fp32", "captured"), ("int4", "captured"), ("int4", "w4a8")]
    assert seen[-2:] == [[16] * 4 * LAYERS, [8] * 4 * LAYERS] and seen[:-2] == [[], []]


def with_fused(monkeypatch, fused_step):
    """As if there were fused kernels for a CPU."""
    monkeypatch.setattr(bench, "fused_step", fused_step)
    monkeypatch.setattr(bench, "ways", lambda weights, device: ("eager", "fused") if weights == "int4" else ("eager",))


def test_fused_is_measured_where_it_serves(folder, monkeypatch, capsys):
    with_fused(monkeypatch, lambda model, batch_size: model_logits(model) if batch_size <= 2 else None)
    rows = decode(monkeypatch, "--batch-sizes", 2, 3, "--contexts", 8, "--how", "fused")
    measured = [(row["weights"], row["how"], row["batch"]) for row in rows if row["what"] == "decode"]
    assert measured == [("int4", "fused", 2)]
    assert "mine, int4, batch 3: not served by fused" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda logits: logits * 1.1, lambda logits: logits * float("nan")])
def test_a_wrong_step_is_not_measured(folder, monkeypatch, wrong):
    def fused_step(model, batch_size):
        return lambda *arguments: wrong(model_logits(model)(*arguments))

    with_fused(monkeypatch, fused_step)
    with pytest.raises(RuntimeError, match="logits are off"):
        decode(monkeypatch, "--contexts", 8, "--how", "fused")


def test_random_models_have_the_shape_of_the_published_ones():
    model = bench.make_model("tiny", torch.bfloat16, "cpu")
    assert model.wte.weight.shape == (4096, 128) and model.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.wte.weight and not model.training
    assert bench.weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())


def test_one_compiled_step_serves_caches_of_all_lengths():
    """So the compiler's minute is spent once; with fullgraph, and the logits of the plain model."""
    model = random_model()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model_logits(model), fullgraph=True, dynamic=False, backend="aot_eager")
    for length in (33, 8, 17):
        # Raises if the logits are not those of the model.
        bench.time_decode(compiled, model, 1, length, "eager", dynamic=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- profile ---------------------------------------------------------------------------------------------------------


def test_the_profile_of_a_step_on_a_cpu(folder, monkeypatch, capsys):
    run(monkeypatch, "profile", "--model", "mine", "--context", 30, "--device", "cpu", "--embedding", "fp16",
        "--json", "profile.json")  # fmt: skip
    rows = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    parts = {*PARTS.values(), step_profile.BEFORE, step_profile.AFTER}
    for weights in ("fp32", "int4"):
        times = {row["part"]: row["microseconds"] for row in rows if row["weights"] == weights}
        assert set(times) == parts and min(times.values()) > 0
    printed = capsys.readouterr().out
    assert "whole step" in printed and "fp32 eager" in printed and "mlp.c_fc" in printed


def test_marks_follow_the_computation():
    model, marks = random_model(), step_profile.Marks(on_gpu=False)
    cache = bench.random_cache(model, 1, 8)
    arguments = (torch.tensor([[1]]), torch.tensor([[7]]), cache)
    with step_profile.hooked(model, marks):
        marks.begin()
        logits = model_logits(model)(*arguments)
    block = [
        "residual sums", "LayerNorm", "residual sums", "attention", "attn.c_attn", "attention", "attn.c_proj",
        "attention", "residual sums", "LayerNorm", "residual sums", "GELU", "mlp.c_fc", "GELU", "mlp.c_proj", "GELU",
        "residual sums", "cache mask",
    ]  # fmt: skip
    embed = ["cache mask", *["embedding", "cache mask"] * 2]
    assert marks.parts == [*embed, *block * LAYERS, "LayerNorm", "cache mask", "output layer", "sampling"]
    n_marks = len(marks.parts)
    assert torch.equal(model_logits(model)(*arguments), logits) and len(marks.parts) == n_marks  # no hook is left


def test_time_of_kernels_by_mark():
    """Two steps with marks for a and b; of kernels that overlap the first counts; before the marks there is nothing."""
    step = [(MARK, 0, 1), ("x", 1, 5), ("y", 4, 6), (MARK, 7, 8), ("x", 8, 18)]
    kernels = [Kernel("early", -9, -1), *[Kernel(n, b + t, e + t) for t in (0, 100) for n, b, e in step]]
    assert step_profile.by_mark(kernels, ["a", "b"]) == {"a": 2 * 5, "b": 2 * 10}
    for too_few in (kernels[:4], kernels[:1]):
        with pytest.raises(RuntimeError, match="marks"):
            step_profile.by_mark(too_few, ["a", "b"])


def test_time_of_fused_kernels_by_name():
    kernels = [
        Kernel("attention_kernel", 0, 2), Kernel("fused_kernel", 2, 7), Kernel("attention_kernel", 8, 9),
        Kernel("void at::native::reduce_kernel<...>", 9, 10), Kernel("Memcpy DtoD (Device -> Device)", 10, 12),
    ]  # fmt: skip
    assert step_profile.by_kernel(kernels) == {"attention": 3, "linear layers, fused": 5, "sampling": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "captured"])
def test_the_profile_of_a_step_on_a_gpu(how):
    model = random_model("cuda", torch.float16)
    cache = bench.random_cache(model, 2, 30)
    parts = step_profile.profile_step(model, model_logits(model), cache, how)
    assert set(parts) == {*PARTS.values(), step_profile.BEFORE, step_profile.AFTER, GAPS}
    assert all(time > 0 for part, time in parts.items() if part != GAPS)


@pytest.mark.gpu
def test_measurements_on_a_gpu(folder, monkeypatch):
    """All ways, the compiled one with caches of two lengths."""
    run(monkeypatch, "decode", "--models", "mine", "--contexts", 16, 40, "--batch-sizes", 1, 2, "--json", "out.json")
    rows = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert {("fp16", how) for how in ("eager", "captured", "compiled")} <= {
        (row["weights"], row["how"]) for row in rows
    }
    assert all(row["tokens_per_second"] > 0 for row in rows)


# ---- pictures and tables ---------------------------------------------------------------------------------------------


@pytest.fixture
def made_up():
    """Measurements with round numbers: int4 captured is twice, fused four times as fast as FP16 compiled."""
    rates = {("fp16", "eager"): 100, ("fp16", "compiled"): 1000, ("int4", "captured"): 2000, ("int4", "fused"): 4000}
    rows = []
    for model, size in (("small", 100), ("large", 1000)):
        for batch, context in ((1, 128), (1, 1024), (8, 128), (8, 1024)):
            for (weights, how), rate in rates.items():
                int4 = weights == "int4"
                labels = {"weights": weights, "how": how, "embedding": "int8" if int4 else "fp16"}
                labels |= {"group_size": 128 if int4 else None, "weight_bytes": size * (0.3e6 if int4 else 1e6)}
                labels |= {"model": model, "batch": batch, "context": context, "what": "decode"}
                roofline = {"roofline_tokens_per_second": 1e5, "share_of_roofline": rate / 1e5}
                rows.append(labels | roofline | {"tokens_per_second": rate * batch * 100 / size})
        prefill = {"what": "prefill", "model": model, "batch": 8, "context": 1024, "how": "eager"}
        rows += [
            prefill | {"weights": "fp16", "embedding": "fp16", "group_size": None, "tokens_per_second": 5000.0,
                       "weight_bytes": size * 1e6},
            prefill | {"weights": "int4", "embedding": "int8", "group_size": 128, "tokens_per_second": 6000.0,
                       "weight_bytes": size * 0.3e6},
            prefill | {"weights": "int4", "embedding": "int8", "group_size": 128, "tokens_per_second": 7500.0,
                       "weight_bytes": size * 0.3e6, "how": "w4a8"},
        ]  # fmt: skip
    source = {"gpu": "Some GPU", "torch": "2", "triton": "3", "date": "today", "command": "python it"}
    return [source | row for row in rows]


@pytest.fixture
def readme(made_up, monkeypatch):
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "read", lambda name: {"decode": made_up}[name])
    return module


def cells(table, first):
    """The cells of the lines that begin with `first`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith(first)]


def test_tables(readme):
    table = readme.TABLES["decode"]()
    assert cells(table, "| model")[0][5:10] == ["FP16 eager", "FP16 compiled", "int4 captured", "int4 fused", "x FP16"]
    small = cells(table, "| small")
    assert [line[1:3] for line in small] == [["1", "128"], ["1", "1024"], ["8", "128"], ["8", "1024"]]
    assert small[2][3:] == ["int8", "128", "800", "8,000", "16,000", "32,000", "4.00x", "1% / 4%"]
    assert "Some GPU, torch 2, Triton 3, today; `python it`" in table
    assert cells(readme.TABLES["prefill"](), "| large") == [
        ["large", "8 x 1024", "int8", "128", "5,000", "6,000", "7,500", "1.20x / 1.50x"]
    ]
    assert cells(readme.TABLES["decode-bytes"](), "| small") == [["small", "100.0 MB", "128", "30.0 MB (0.300x)"]]
    assert readme.TABLES["decode-cpu"]() == ""


def test_tables_tell_gpus_apart(readme, made_up):
    made_up += [row | {"gpu": "Other GPU", "tokens_per_second": 1.0} for row in made_up]
    made_up += [row | {"gpu": "cpu (x)", "how": "eager", "weights": row["weights"].replace("fp16", "bf16")}
                for row in made_up if row["gpu"] == "Some GPU" and row["how"] in ("compiled", "captured")]  # fmt: skip
    table = readme.TABLES["decode"]()
    assert len(cells(table, "| small")) == 8 and "Other GPU" in table and "BF16" not in table
    on_cpu = readme.TABLES["decode-cpu"]()
    assert cells(on_cpu, "| small")[0][5:8] == ["1,000", "2,000", "2.00x"] and "BF16" in on_cpu


def test_tables_tell_group_sizes_apart(readme, made_up):
    """Each has a line of its own, beside the same measurements in floating point."""
    made_up += [row | {"group_size": 320, "weight_bytes": 25e6, "tokens_per_second": 2 * row["tokens_per_second"]}
                for row in made_up if row["weights"] == "int4"]  # fmt: skip
    lines = cells(readme.TABLES["decode"](), "| small")
    assert [line[4] for line in lines] == ["128", "320"] * 4
    assert [line[5:7] for line in lines[::2]] == [line[5:7] for line in lines[1::2]]
    assert [line[9] for line in lines[:2]] == ["4.00x", "8.00x"]
    assert [line[3] for line in cells(readme.TABLES["prefill"](), "| small")] == ["128", "320"]
    sizes = cells(readme.TABLES["decode-bytes"](), "| small")
    assert [line[2:] for line in sizes] == [["128", "30.0 MB (0.300x)"], ["320", "25.0 MB (0.250x)"]]


def test_the_plot_of_decode(made_up):
    figure = bench_plots.draw_decode(made_up)
    assert [panel.get_title() for panel in figure.axes] == ["batch 1, Some GPU", "batch 8, Some GPU"]
    for panel, batch in zip(figure.axes, (1, 8), strict=True):
        lines = {line.get_label(): line.get_ydata().tolist() for line in panel.get_lines()}
        assert lines["int4, fused kernels"] == [4000 * batch, 400 * batch]
        assert lines["FP16, captured, and compiled where faster"] == [1000 * batch, 100 * batch]
        assert lines["roofline of int4"] == [1e5, 1e5]
        assert [text.get_text() for text in panel.texts] == ["4.0x", "4.0x"]
        assert [label.get_text() for label in panel.get_xticklabels()] == ["small", "large"]


def test_plots_are_saved_beside_the_measurements(tmp_path, monkeypatch, made_up, capsys):
    source = {"gpu": "Some GPU", "model": "small", "batch": 1, "context": 128}
    profile = [
        source | {"weights": weights, "embedding": "fp16", "how": how, "part": part, "microseconds": 10.0}
        for weights, how in (("fp16", "eager"), ("fp16", "captured"), ("int4", "fused"))
        for part in ("LayerNorm", "some_new_kernel", GAPS)
    ]
    (tmp_path / "decode.json").write_text(json.dumps(made_up), encoding="utf-8")
    (tmp_path / "profile.json").write_text(json.dumps(profile), encoding="utf-8")
    run(monkeypatch, "plots", "--folder", tmp_path)
    printed = capsys.readouterr().out
    for name in ("decode.png", "profile.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in printed
    names = [label.get_text() for label in bench_plots.draw_profile(profile).axes[0].get_yticklabels()]
    assert names == ["fp16 captured", "int4 fused"]


def test_parts_have_colours_of_their_own():
    parts = [*PARTS.values(), "some_kernel", step_profile.BEFORE, "another", step_profile.AFTER, GAPS]
    colours = bench_plots.part_colours(parts)
    assert set(colours) == set(parts) and len(set(colours.values())) == len(colours) and list(colours)[-1] == GAPS
