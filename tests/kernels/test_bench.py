"""The benchmark: its formulas against numpy's, its bounds worked out anew, its command line, tables and pictures."""

import argparse
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import kernels
from kernels import bench, common, plots
from tools import readme


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "kernels.bench", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def matmul_rows(monkeypatch):
    """What `bench_matmul` returns when FP16 takes 16 microseconds, all else 8, and torch's peer refuses."""

    def matmul(x, weight, activation_bits):
        return torch.nn.functional.linear(x, kernels.dequantize(weight, x.dtype))

    def refuse(weight):
        raise RuntimeError("no such shape\nand a stack trace")

    monkeypatch.setattr(kernels, "prepare", lambda weight: weight, raising=False)
    monkeypatch.setattr(kernels, "matmul", matmul)
    monkeypatch.setitem(bench.MODES, "peer:torch", (refuse, torch.bfloat16))
    monkeypatch.setattr(common, "copies_to_fill_cache", lambda n_bytes: 2)
    monkeypatch.setattr(common, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(common, "matmul_rate", lambda: 1e12)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(common, "microseconds", lambda function, arguments: 16.0 if function is linear else 8.0)
    monkeypatch.setattr(
        common, "environment", lambda: dict.fromkeys(("gpu", "torch", "triton", "date", "command"), "?")
    )
    return bench.bench_matmul([(48, 64), (16, 96)], [1, 70], [64, 32], ["w4a16", "w4a8", "peer:torch"])


# ---- matmul


def test_every_cell_has_a_row(matmul_rows):
    cells = [(row["n"], row["k"], row["group_size"], row["mode"], row["m"]) for row in matmul_rows]
    assert len(set(cells)) == len(cells) == (2 + 1) * 3 * 2
    assert {row["group_size"] for row in matmul_rows if row["k"] == 96} == {32}


def test_what_does_not_fit_is_said(capsys):
    assert bench.fitting([(48, 64), (16, 1600)], [128, 64]) == {(48, 64): [64], (16, 1600): [64]}
    out = capsys.readouterr().out
    assert "48 x 64: skipped group size 128" in out and "16 x 1600: skipped group size 128" in out


def test_times_errors_and_floors(matmul_rows):
    for row in matmul_rows:
        if row["mode"] == "peer:torch":
            assert row["refused"] == "RuntimeError: no such shape" and "microseconds" not in row
            continue
        assert 0 < row["error"] < 2e-3
        n, k, m = row["n"], row["k"], row["m"]
        n_bytes = n * k / 2 + n * k / row["group_size"] * 2.5 + 2 * m * (n + k)
        operations = 2 * n * m * k / (2 if row["mode"] == "w4a8" else 1)
        assert row["share_of_roofline"] == pytest.approx(
            max(n_bytes / 1e9, operations / 1e12) * 1e6 / row["microseconds"]
        )
        assert row["times_fp16"] == row["fp16_microseconds"] / row["microseconds"] == 2.0


def test_tables_on_the_terminal(matmul_rows, capsys):
    bench.print_matmul(matmul_rows)
    out = capsys.readouterr().out
    assert "w4a8, group size 64: times FP16" in out and "48x64" in out and "refused: RuntimeError: no such shape" in out


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.new_zeros(len(x), 48),
        lambda x: x.new_zeros(len(x), 47),
        lambda x: torch.empty(len(x), 48),  # not a number written
    ],
    ids=["zeros", "shape", "unwritten"],
)
def test_a_wrong_result_is_found_out(wrong):
    weight = kernels.quantize(torch.randn(48, 64), 32)
    with pytest.raises(ArithmeticError):
        bench.sampled_error(wrong, torch.randn(70, 64), weight)
    assert not torch.are_deterministic_algorithms_enabled()


def test_our_own_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(kernels, "prepare", lambda weight: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        list(bench.mode_rows("w4a16", [None], [torch.randn(1, 64)]))


def test_what_peers_are_given():
    weight = kernels.quantize(torch.randn(24, 64), 32)
    codes, scales, zeros = bench.unpacked(weight)
    restored = (codes.view(24, 2, 32) - zeros[..., None].float()) * scales[..., None].float()
    torch.testing.assert_close(restored.flatten(1), kernels.dequantize(weight, torch.float32))
    offsets = (8 - zeros.float()) * scales.float()  # torch's formula
    restored = (codes.view(24, 2, 32).float() - 8) * scales[..., None].float() + offsets[..., None]
    torch.testing.assert_close(restored.flatten(1), kernels.dequantize(weight, torch.float32))


@pytest.mark.gpu
def test_torch_int4_is_right():
    weight = kernels.quantize(common.random_tensor(256, 1024), 64)
    x = common.random_tensor(3, 1024, dtype=torch.bfloat16, seed=1)
    assert bench.sampled_error(bench.torch_int4(weight), x, weight) < 1e-2


@pytest.mark.gpu
def test_matmul_on_a_gpu():
    rows = bench.bench_matmul([(256, 1024)], [1, 130], [128], ["w4a16", "w4a8", "peer:torch"])
    assert all(row["microseconds"] > 0 for row in rows) and len(rows) == 6


# ---- quantization


def numpy_error(weight, group_size, method):
    """Mean absolute and mean squared error by the formulas, in float64 and without packing."""
    groups = weight.numpy().astype(np.float64).reshape(-1, group_size)
    below, above = np.maximum(-groups.min(1), 0), np.maximum(groups.max(1), 0)
    if method == "plain absmax":
        scale, lowest = np.abs(groups).max(1) / 8, -8
    elif method == "absmax":
        scale = np.maximum(np.maximum(below, above) / 8.5, np.minimum(below, above) / 7.5) * np.where(
            above > below, -1, 1
        )
        lowest = -8
    else:
        scale = (below + above) / 15
        lowest = -np.round(below / scale)[:, None]
    scale = np.float16(scale).astype(np.float64)[:, None]
    error = np.clip(np.round(groups / scale), lowest, lowest + 15) * scale - groups
    return np.abs(error).mean(), (error**2).mean()


@pytest.mark.parametrize("method", ["plain absmax", "absmax", "minmax"])
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_errors_are_those_of_numpy(method, group_size):
    weight = torch.randn(64, 128)
    row = bench.quantization_row(weight, method, group_size)
    assert (row["mae"], row["mse"]) == pytest.approx(numpy_error(weight, group_size, method), rel=2e-4)
    assert row["bits_per_weight"] == pytest.approx(4 + 20 / group_size)
    assert row["compression"] == pytest.approx(16 / (4 + 20 / group_size))


def test_searching_makes_the_squared_error_smaller():
    rows = {row["method"]: row for row in bench.bench_quantization(64) if row["group_size"] == 64}
    assert rows["mse"]["mse"] < rows["minmax"]["mse"] and rows["mse symmetric"]["mse"] < rows["absmax"]["mse"]


def test_saved_errors_are_those_published():
    """Another matrix, another error: from one to the next they differ by about 0.0001."""
    rows = json.loads((ROOT / "results" / "quantization.json").read_text())
    ours = {row["group_size"]: row["mae"] for row in rows if row["method"] == "plain absmax"}
    assert ours.keys() == bench.PUBLISHED_MAE.keys()
    for group_size, published in bench.PUBLISHED_MAE.items():
        assert ours[group_size] == pytest.approx(published, abs=1.5e-4)


def test_sixteen_uniform_levels():
    """The step with the least squared error on a normal distribution, by summing over its density."""
    w = np.linspace(-9, 9, 200_001)
    density = np.exp(-(w**2) / 2) / np.exp(-(w**2) / 2).sum()
    errors = [(np.clip(np.floor(w / step), -8, 7) + 0.5) * step - w for step in np.arange(0.32, 0.35, 0.001)]
    best = min(errors, key=lambda error: (density * error**2).sum())
    assert (density * best**2).sum() == pytest.approx(0.01154, abs=1e-5)
    assert (density * np.abs(best)).sum() == pytest.approx(plots.UNIFORM_MAE, abs=1e-4)


@pytest.mark.parametrize(("kind", "zeros"), [("symmetric", [8]), ("asymmetric", range(4, 12))])
def test_best_scales_at_64(kind, zeros):
    """Every scale on a fine grid, with either sign, and every zero: what is left when the best are taken."""
    w = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    least, absolute = np.full(len(w), np.inf), np.zeros(len(w))
    for step in np.linspace(0.15, 0.6, 150, dtype=np.float32):
        for scale in (step, -step) if kind == "symmetric" else (step,):
            for zero in zeros:
                error = np.clip(np.round(w / scale), -zero, 15 - zero) * scale - w
                squared = (error**2).mean(1)
                better = squared < least
                least[better], absolute[better] = squared[better], np.abs(error[better]).mean(1)
    assert absolute.mean() == pytest.approx(plots.BEST_MAE_AT_64[kind], abs=5e-4)


# ---- command line, tables, pictures


def test_shapes():
    assert bench.parse_shape("8192x2048") == [(8192, 2048)]
    gpt2 = bench.parse_shape("gpt2")
    assert len(gpt2) == 20 and {(2304, 768), (6400, 1600), (1600, 6400), (50257, 1280)} <= set(gpt2)
    for word in ("8192", "0x16", "axb", "1x2x3", "gpt3"):
        with pytest.raises(argparse.ArgumentTypeError, match=word):
            bench.parse_shape(word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_matmul_without_a_gpu_says_so():
    result = run("matmul")
    assert result.returncode == 2 and "needs a GPU" in result.stderr and "Traceback" not in result.stderr


def test_plots_without_measurements_say_so(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("plots", "--folder", str(tmp_path))
    assert result.returncode == 2 and "measure first" in result.stderr and "Traceback" not in result.stderr


def test_plots_of_a_broken_file_name_it(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "matmul.json").write_text("{", encoding="utf-8")
    result = run("plots", "--folder", str(tmp_path))
    assert result.returncode == 2 and "matmul.json: not JSON" in result.stderr and "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = run("quantization", "--json", str(tmp_path / "file" / "out.json"))
    assert result.returncode == 2 and "--json" in result.stderr and "Traceback" not in result.stderr


def run_script(main, **options):
    """Starts a program that runs `main`, the text of a function, as lessons and the bench run theirs."""
    command = [sys.executable, "-c", f"from kernels import common\ncommon.run_script({main})"]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job may not by itself
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen, **options)


@pytest.mark.parametrize(
    ("main", "status", "message"),
    [
        ("lambda: __import__('signal').raise_signal(2)", 130, "error: interrupted\n"),
        ("lambda: open('/dev/full', 'w').write('x' * 10**6)", 2, "error: No space left on device\n"),
        ("lambda: open('/no/such/folder', 'w')", 2, "error: /no/such/folder: No such file or directory\n"),
    ],
)
def test_what_ends_a_command_from_outside(main, status, message):
    process = run_script(main)
    assert (process.communicate()[1], process.returncode) == (message, status)


def test_nobody_reads_the_output():
    process = run_script("lambda: print('a measurement')", stdout=subprocess.PIPE)
    process.stdout.close()  # long before it prints: it imports torch first
    assert (process.wait(), process.stderr.read()) == (141, "")


def test_plots_without_matplotlib_say_so(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "plots"])
    with pytest.raises(SystemExit) as exit_info:
        bench.main()
    assert exit_info.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


def test_pictures(matmul_rows, tmp_path):
    pytest.importorskip("matplotlib")
    common.save_json(tmp_path / "matmul.json", matmul_rows)
    assert plots.draw_all(tmp_path) == [tmp_path / "matmul.png"]
    common.save_json(tmp_path / "quantization.json", json.loads((ROOT / "results" / "quantization.json").read_text()))
    for path in plots.draw_all(tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_of_the_readme(matmul_rows, monkeypatch):
    assert "| 64 | 4.31 | 3.71x | 0.0829 | 0.0829 (9.9) |" in readme.quantization()
    monkeypatch.setattr(readme, "read", lambda name: matmul_rows)
    assert "| 48 x 64 | 64 | 2.00x / 2.00x (16) |" in readme.matmul()
    assert "| 16 x 96 | 32 |" in readme.matmul()
