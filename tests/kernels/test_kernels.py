"""The lessons' kernels against lesson 0 and float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

from kernels import common, k01_quantize, k02_dequantize, k03_matmul, k04_w4a16  # noqa: E402
from kernels.k00_reference import dequantize_reference, quantize_reference  # noqa: E402

WEIGHT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (n, k, group size): every group size from 16 to 4096, whole rows, sizes that are no powers of two, odd n.
SHAPES = [
    *((9, max(512, 2 * group_size), group_size) for group_size in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    (9, 8192, 8192),
    (3, 1600, 64),
    (40, 1600, 1600),
    (33, 384, 96),
    (8, 176, 176),
    (1, 16, 16),
    (70, 80, 80),
]


def random_weight(n, k, dtype=torch.float32):
    return torch.randn(n, k).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [False, True])
def test_quantize_gives_the_references_bits(canary, n, k, group_size, symmetric, search):
    weight = random_weight(n, k, torch.float16)
    packed = k01_quantize.quantize(weight, group_size, symmetric, search)
    canary.check()
    for ours, reference in zip(packed, quantize_reference(weight.cpu(), group_size, symmetric, search), strict=True):
        assert torch.equal(ours.cpu(), reference)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy, on the largest float32
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [False, True])
def test_quantize_extreme_weights(dtype, symmetric, search):
    info = torch.finfo(dtype)
    weight = random_weight(10, 128, dtype)
    weight[0] = 0
    weight[1] = 0.37
    weight[2, 5] = 60000.0
    weight[3] = info.max
    weight[4] = info.tiny
    weight[5, ::2], weight[5, 1::2] = info.max, -info.max
    weight[6] = torch.randn(128) * 1e-7
    weight[7] = torch.arange(128) / 8 - 8  # many halves: rounding must agree on ties
    packed = k01_quantize.quantize(weight, 32, symmetric, search)
    for ours, reference in zip(packed, quantize_reference(weight.cpu(), 32, symmetric, search), strict=True):
        assert torch.equal(ours.cpu(), reference)


def test_quantize_takes_a_transposed_weight():
    weight = random_weight(64, 48).t()  # [48, 64], not contiguous
    packed = k01_quantize.quantize(weight, 16)
    assert torch.equal(packed.qweight.cpu(), quantize_reference(weight.cpu(), 16).qweight)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_gives_the_references_bits(canary, n, k, group_size, symmetric):
    packed = quantize_reference(random_weight(n, k), group_size, symmetric)
    canary.outputs.clear()
    for dtype in [*common.ACTIVATION_DTYPES, torch.float32]:
        assert torch.equal(k02_dequantize.dequantize(packed, dtype), dequantize_reference(packed, dtype))
    canary.check()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (1, 257, 96), (15, 64, 64), (33, 70, 130), (129, 40, 200)])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_matmul_against_float64(canary, m, n, k, dtype):
    x, w = random_weight(m, k, dtype), random_weight(n, k, dtype)
    canary.outputs.clear()
    out = k03_matmul.matmul(x, w)
    canary.check()
    assert common.relative_error(out, x.double() @ w.double().t()) < common.tolerance(dtype)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("m", [1, 19])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_w4a16_against_float64(canary, m, n, k, group_size, symmetric, dtype):
    packed = quantize_reference(random_weight(n, k), group_size, symmetric)
    x = random_weight(m, k, dtype)
    canary.outputs.clear()
    out = k04_w4a16.matmul(x, packed)
    canary.check()
    reference = x.double() @ dequantize_reference(packed, torch.float32).double().t()
    assert common.relative_error(out, reference) < common.tolerance(dtype)


@pytest.mark.parametrize("m", [40, 600])  # the other two sets of block sizes
def test_w4a16_with_more_tokens(canary, m):
    packed = quantize_reference(random_weight(130, 64), 32)
    x = random_weight(m, 64, torch.float16)
    canary.outputs.clear()
    out = k04_w4a16.matmul(x.view(2, m // 2, 64), packed)
    canary.check()
    assert out.shape == (2, m // 2, 130)
    reference = x.double() @ dequantize_reference(packed, torch.float32).double().t()
    assert common.relative_error(out.view(m, 130), reference) < common.tolerance(torch.float16)


def test_a_part_of_a_weight():
    """Slices are not contiguous; the kernels must not read them as if they were."""
    whole = quantize_reference(random_weight(48, 64), 32)
    part = type(whole)(whole.qweight[:, :24], whole.scales[:, :24], whole.qzeros[:, :3])
    weight = dequantize_reference(whole, torch.float32)[:24]
    assert torch.equal(k02_dequantize.dequantize(part, torch.float32), weight)
    x = random_weight(3, 64, torch.float16)
    error = common.relative_error(k04_w4a16.matmul(x, part), x.double() @ weight.double().t())
    assert error < common.tolerance(torch.float16)


def test_launchers_name_what_does_not_fit():
    packed = quantize_reference(random_weight(8, 64), 32)
    with pytest.raises(ValueError, match="in_features 64"):
        k04_w4a16.matmul(random_weight(2, 32, torch.float16), packed)
    with pytest.raises(ValueError, match="float32"):
        k04_w4a16.matmul(random_weight(2, 64), packed)
    with pytest.raises(ValueError, match="int8"):
        k02_dequantize.dequantize(packed, torch.int8)
    with pytest.raises(ValueError, match="in_features 64"):
        k03_matmul.matmul(random_weight(2, 32, torch.float16), random_weight(8, 64, torch.float16))
    with pytest.raises(ValueError, match="possible: 16, 32, 64"):
        k01_quantize.quantize(random_weight(8, 64), 48)


@pytest.mark.gpu
def test_front_door_runs_the_kernels_on_a_gpu():
    """`kernels.quantize` and its kin on GPU tensors give what the reference gives on the same numbers on the CPU."""
    import kernels

    weight = random_weight(130, 256, torch.float16)
    packed = kernels.quantize(weight, 64, search=True)
    reference = quantize_reference(weight.cpu(), 64, search=True)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(packed, reference, strict=True))
    assert torch.equal(kernels.dequantize(packed).cpu(), dequantize_reference(reference))
    x = random_weight(5, 256, torch.float16)
    expected = x.cpu().double() @ dequantize_reference(reference, torch.float32).double().t()
    assert common.relative_error(kernels.matmul(x, packed).cpu(), expected) < 1e-3
