"""torch's own int4 kernel for CPUs, against float64, and what happens where there is none."""

import pytest
import torch

import kernels
from kernels import cpu

needs_kernel = pytest.mark.skipif(not cpu.has_int4_kernel(), reason="this torch has no int4 kernel for this CPU")


@needs_kernel
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(16, 32, 32), (40, 192, 64), (71, 256, 128), (1, 64, 64), (257, 512, 256)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_matmul(m, n, k, group_size, symmetric, dtype, native, monkeypatch):
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", native)
    monkeypatch.setattr(cpu, "WRITTEN_FROM", 20)
    packed = kernels.quantize(torch.randn(n, k), group_size, symmetric)
    weight = kernels.prepare_for_cpu(packed)
    assert isinstance(weight, kernels.CPUWeight)
    assert (weight.out_features, weight.in_features, weight.group_size) == (n, k, group_size)
    assert all(torch.equal(back, there) for back, there in zip(weight.file, packed, strict=True))
    x, bias = torch.randn(2, m, k).to(dtype), torch.randn(n)
    written_out = []
    write_out = cpu.write_out
    monkeypatch.setattr(cpu, "write_out", lambda weight: written_out.append(write_out(weight)) or written_out[0])
    out = kernels.matmul(x, weight, bias)
    assert len(written_out) == (native and m == 10)
    assert out.shape == (2, m, n) and out.dtype == dtype
    w = kernels.dequantize(packed, torch.float32).double()
    expected = x.double() @ w.t() + bias.double()
    terms = x.double().abs() @ w.abs().t() + bias.double().abs()  # what the products and sums are as large as
    assert ((out.double() - expected).abs() < 1e-2 * terms).all()
    assert n == 1 or (out.double() - expected).norm() < 1e-2 * expected.norm()


@needs_kernel
def test_many_tokens_and_8_bit_activations_go_the_exact_way(monkeypatch):
    packed = kernels.quantize(torch.randn(24, 64), 32)
    weight = kernels.prepare_for_cpu(packed)
    monkeypatch.setattr(cpu, "MOST_TOKENS", 3)
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", False)
    x = torch.randn(4, 64)
    assert torch.equal(kernels.matmul(x, weight), kernels.matmul(x, packed))
    assert not torch.equal(kernels.matmul(x[:3], weight), kernels.matmul(x[:3], packed))
    assert torch.equal(kernels.matmul(x[:3], weight, None, 8), kernels.matmul(x[:3], packed, None, 8))
    with kernels.exact_on_cpu():
        assert torch.equal(kernels.matmul(x[:3], weight), kernels.matmul(x[:3], packed))
    assert not torch.equal(kernels.matmul(x[:3], weight), kernels.matmul(x[:3], packed))
    assert kernels.matmul(x[:0], weight).shape == (0, 24)


@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 32, 32), (19, 96, 16), (40, 768, 256)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_writing_out_in_bfloat16(n, k, group_size, symmetric):
    packed = kernels.quantize(torch.randn(n, k), group_size, symmetric)
    rounded = packed._replace(scales=packed.scales.bfloat16())
    expected = kernels.k00_reference.dequantize_reference(rounded, torch.bfloat16)
    assert torch.equal(cpu.write_out(packed), expected)


@needs_kernel
def test_with_bfloat16_units_any_number_of_tokens_is_taken(monkeypatch):
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", True)
    x = torch.randn(cpu.MOST_TOKENS + 1, 32)
    assert cpu.serves(x.bfloat16()) and cpu.serves(x) and not cpu.serves(x[:0].bfloat16())
    with cpu.exact_on_cpu():
        assert cpu.serves(x.bfloat16()) and not cpu.serves(x) and not cpu.serves(x.half()[1:])
    monkeypatch.setattr(cpu, "MULTIPLIES_BFLOAT16", False)
    assert not cpu.serves(x.bfloat16()) and cpu.serves(x[1:])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype):
    """Whichever way is taken: few tokens, many, and more than any prompt has."""
    weight = kernels.prepare_for_cpu(kernels.quantize(torch.randn(24, 64), 32))

    def layer(x):
        return kernels.matmul(x * 2, weight).relu()

    for length in (3, cpu.WRITTEN_FROM, cpu.MOST_TOKENS + 1):
        x = torch.randn(length, 64).to(dtype)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("group_size", [16, 48, 96])
def test_group_sizes_that_the_kernel_does_not_take_stay_as_they_are(group_size):
    packed = kernels.quantize(torch.randn(24, 96), group_size)
    assert kernels.prepare_for_cpu(packed) is packed


def test_without_the_kernel_weights_stay_as_they_are(monkeypatch):
    """As with an older torch, or on a CPU that it has no kernel for, or one that gets it wrong."""
    packed = kernels.quantize(torch.randn(32, 64), 32)
    for broken in (lambda x, w: (_ for _ in ()).throw(RuntimeError("no kernel")), lambda x, w: torch.zeros(1, 16)):
        cpu.has_int4_kernel.cache_clear()
        monkeypatch.setattr(cpu, "matmul_int4", broken)
        assert kernels.prepare_for_cpu(packed) is packed
        monkeypatch.undo()
    cpu.has_int4_kernel.cache_clear()
