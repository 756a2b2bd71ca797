"""Weights of 8 bits, lesson 16, and rows looked up in every layout, against float64."""

import pytest
import torch

import kernels
from kernels import front_door
from kernels.int8 import matmul_int8_reference

SHAPES = [(1, 16), (5, 48), (71, 96), (40, 768), (33, 1600), (130, 200)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(n, k, dtype):
    weight = torch.randn(n, k).to(dtype)
    int8 = kernels.quantize_int8(weight)
    assert int8.codes.dtype == torch.int8 and int8.scales.dtype == torch.float16
    assert (int8.out_features, int8.in_features) == (n, k)
    assert int8.codes.abs().amax() <= 127
    error = (kernels.dequantize_int8(int8, torch.float32).double() - weight.double()).abs()
    # The scale is rounded to fp16, so a row's largest weights may be off by 127 / 2048 steps more.
    assert (error <= int8.scales.double()[:, None] * 0.57).all()
    assert (int8.codes.abs().amax(1) == 127).all()


def test_rows_of_zeros_and_very_large_weights():
    int8 = kernels.quantize_int8(torch.tensor([[0.0] * 16, [65504.0] * 16, [-1e-30] * 16]))
    out = kernels.dequantize_int8(int8)
    assert (out[0] == 0).all() and torch.isfinite(out).all() and (out[1] > 65000).all()


def test_what_is_no_weight():
    for wrong in (torch.zeros(16), torch.zeros(4, 16, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"it must be floating \[out_features, in_features\]"):
            kernels.quantize_int8(wrong)


@pytest.mark.parametrize("multiply", [kernels.matmul_int8, matmul_int8_reference])
@pytest.mark.parametrize("m", [0, 1, 3, 40])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul(multiply, m, n, k, dtype):
    int8 = kernels.quantize_int8(torch.randn(n, k))
    x = torch.randn(2, m, k).to(dtype)
    out = multiply(x, int8)
    assert out.shape == (2, m, n) and out.dtype == dtype
    expected = x.double() @ kernels.dequantize_int8(int8, torch.float32).double().t()
    limit = {torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (out.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("native", [True, False])
def test_many_tokens_in_bfloat16_on_a_cpu_that_multiplies_them(n, k, native, monkeypatch):
    """Then a weight is written out, a few rows at a time, each number of it rounded once."""
    cpu = front_door.cpu
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", native)
    monkeypatch.setattr(cpu, "CHUNK", 3 * k)
    written_out, how = [], cpu._written_out
    monkeypatch.setattr(cpu, "_written_out", lambda tokens, weight: written_out.append(1) or how(tokens, weight))
    int8, x = kernels.quantize_int8(torch.randn(n, k)), torch.randn(2, cpu.WRITTEN_FROM // 2, k).bfloat16()
    weight = kernels.dequantize_int8(int8, torch.float32).double()
    for tokens in (x, x[:, 1:], x.float()):
        out, expected = kernels.matmul_int8(tokens, int8), tokens.double() @ weight.t()
        assert out.shape == expected.shape and out.dtype == tokens.dtype
        assert (out.double() - expected).norm() <= 5e-3 * expected.norm()
    assert len(written_out) == (native and cpu.has_int8_kernel())


def test_tokens_of_very_different_size():
    """Each has a unit of its own: a large one costs the others nothing, and zeros stay zeros."""
    int8 = kernels.quantize_int8(torch.randn(50, 64))
    x = torch.randn(4, 64) * torch.tensor([1e-6, 1.0, 1e6, 0.0])[:, None]
    expected = x.double() @ kernels.dequantize_int8(int8, torch.float32).double().t()
    out = kernels.matmul_int8(x, int8).double()
    assert ((out - expected).norm(dim=1) <= 2e-4 * expected.norm(dim=1)).all()


def test_what_is_not_finite_is_not_hidden():
    int8 = kernels.quantize_int8(torch.randn(20, 64))
    x = torch.randn(3, 64)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    finite = torch.isfinite(kernels.matmul_int8(x, int8)).all(1)
    assert finite.tolist() == [False, False, True]


def test_without_an_exact_kernel_the_reference_multiplies(monkeypatch):
    """An older torch lacks _int_mm on CPUs; on some CPUs its sums overflow."""
    int8, x = kernels.quantize_int8(torch.randn(20, 256)), torch.randn(3, 256)

    def gone(*_):
        raise RuntimeError("no such kernel")

    for broken in (gone, lambda a, b: (a.int() @ b.int()).clamp(-32768, 32767)):
        front_door.cpu.has_int8_kernel.cache_clear()
        monkeypatch.setattr(torch, "_int_mm", broken)
        assert not front_door.cpu.has_int8_kernel()
        assert torch.equal(kernels.matmul_int8(x, int8), matmul_int8_reference(x, int8))
        monkeypatch.undo()
    front_door.cpu.has_int8_kernel.cache_clear()


def test_matmul_names_what_does_not_fit():
    int8 = kernels.quantize_int8(torch.randn(20, 64))
    with pytest.raises(ValueError, match="in_features 64"):
        kernels.matmul_int8(torch.randn(3, 48), int8)
    with pytest.raises(ValueError, match="float64"):
        kernels.matmul_int8(torch.randn(3, 64).double(), int8)


@pytest.mark.parametrize(("n", "k", "group_size"), [(40, 192, 64), (33, 96, 32), (71, 48, 16), (5, 208, 208)])
@pytest.mark.parametrize("prepare", [lambda w: w, kernels.prepare, kernels.prepare_for_cpu])
def test_lookup_gives_the_rows_of_the_dequantized_weight(n, k, group_size, prepare):
    packed = kernels.quantize(torch.randn(n, k), group_size)
    rows = torch.randint(0, n, (2, 7))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(kernels.lookup(prepare(packed), rows, dtype), kernels.dequantize(packed, dtype)[rows])


def test_lookup_in_int8():
    int8 = kernels.quantize_int8(torch.randn(33, 96))
    rows = torch.randint(0, 33, (2, 7))
    assert torch.equal(kernels.lookup(int8, rows, torch.float16), kernels.dequantize_int8(int8)[rows])


def lesson():
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from kernels import common, k16_int8_rows

    return common, k16_int8_rows


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (17, 300)])
def test_lesson_16_writes_the_weight_out(canary, n, k):
    common, k16 = lesson()
    int8 = kernels.quantize_int8(torch.randn(n, k, device=common.DEVICE))
    canary.outputs.clear()
    for dtype in [*common.ACTIVATION_DTYPES, torch.float32]:
        assert torch.equal(k16.dequantize(int8, dtype), kernels.dequantize_int8(int8, dtype))
    canary.check()


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 16])
def test_lesson_16(canary, m, n, k):
    common, k16 = lesson()
    int8 = kernels.quantize_int8(torch.randn(n, k, device=common.DEVICE))
    for dtype in common.ACTIVATION_DTYPES:
        x = torch.randn(1, m, k, device=common.DEVICE).to(dtype)
        expected = x.double() @ kernels.dequantize_int8(int8, torch.float32).double().t()
        canary.outputs.clear()
        out = k16.matmul(x, int8)
        canary.check()
        assert out.shape == (1, m, n) and common.relative_error(out, expected) < common.tolerance(dtype)


def test_lesson_16_names_what_does_not_fit():
    common, k16 = lesson()
    int8 = kernels.quantize_int8(torch.randn(20, 64, device=common.DEVICE))
    x = torch.randn(17, 64, dtype=torch.float16, device=common.DEVICE)
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        k16.matmul(x, int8)
    with pytest.raises(ValueError, match="in_features 64"):
        k16.matmul(x[:1, :32], int8)
    with pytest.raises(ValueError, match="float32"):
        k16.matmul(x[:1].float(), int8)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matmul_on_a_gpu(m, dtype):
    int8 = kernels.quantize_int8(torch.randn(1003, 768, device="cuda"))
    x = torch.randn(m, 768, device="cuda").to(dtype)
    expected = x.double() @ kernels.dequantize_int8(int8, torch.float32).double().t()
    error = (kernels.matmul_int8(x, int8).double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
