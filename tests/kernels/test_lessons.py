"""The lessons as programs, and the form that they share."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

LESSONS = sorted(path.stem for path in (ROOT / "kernels").glob("k[0-9][0-9]_*.py"))


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_reference_lesson_shows_the_format():
    result = run("-m", "kernels.k00_reference")
    assert result.returncode == 0 and "scale, zero" in result.stdout
    assert not result.stderr, result.stderr


@pytest.mark.parametrize("lesson", LESSONS[1:])
def test_check_agrees(lesson):
    result = run("-m", f"kernels.{lesson}", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    for instruction, gpu in (("wgmma", "Hopper GPU (H100, H200)"), ("mma.sync", "NVIDIA GPU of sm_80 or newer")):
        if f"skip  {instruction} needs a" in result.stdout:
            pytest.skip(f"needs a {gpu}")
    assert "all agree" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_bench_without_a_gpu_says_so():
    result = run("-m", f"kernels.{LESSONS[1]}", "--bench")
    assert result.returncode == 2 and "needs a GPU" in result.stderr and "Traceback" not in result.stderr


def test_a_failing_check_fails(monkeypatch, capsys):
    from kernels import common

    monkeypatch.setattr(sys, "argv", ["lesson", "--check"])
    with pytest.raises(SystemExit) as exit_info:
        common.run_lesson(lambda: iter([("good", True), ("bad", False)]), list)
    assert exit_info.value.code == 1
    assert "FAIL  bad" in capsys.readouterr().out


def test_ctrl_c_ends_a_lesson_without_a_traceback(monkeypatch):
    from kernels import common

    def check():
        yield "good", True
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["lesson"])
    with pytest.raises(SystemExit) as exit_info:
        common.run_lesson(check, list)
    assert exit_info.value.code == 130


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_lesson_whose_output_nobody_reads_ends_in_silence():
    command = f"'{sys.executable}' -m kernels.{LESSONS[1]} --check | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 141 and result.stderr == ""


@pytest.mark.parametrize("lesson", LESSONS)
def test_docstring_has_the_form_of_a_lesson(lesson):
    text = (ROOT / "kernels" / f"{lesson}.py").read_text(encoding="utf-8")
    head = text.split('"""')[1]
    assert head.startswith(f"Lesson {int(lesson[1:3])}:")
    for part in ("Run it:", "THE IDEA", "THE PRICE", "NEXT", "EXERCISE"):
        assert part in head, part
    if lesson != LESSONS[0]:
        assert "NEW" in head and "MEASURED" in head


def test_import_without_triton():
    """On macOS and Windows there is no Triton: everything that users run imports, and runs on the reference."""
    program = """
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import torch, kernels, kernels.k00_reference, minigpt.checkpoint, minigpt.evaluate, minigpt.generate
import quantize, eval, train
packed = kernels.quantize(torch.randn(16, 64), 32)
assert kernels.matmul(torch.randn(3, 64), packed).shape == (3, 16)
assert kernels.dequantize(packed).shape == (16, 64)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
