"""The format itself, against a slow and obvious version of the formula in DESIGN: one weight at a time."""

import pytest
import torch

from kernels.k00_reference import (
    MAX_SCALE,
    dequantize_reference,
    group_sizes,
    pack,
    pack_weight,
    quantize_reference,
    unpack,
    unpack_weight,
)


def decode_one(packed, n, k):
    """w[n, k] by the formula, read from the words with plain Python integers."""
    group_size = packed.qweight.shape[0] * 8 // packed.scales.shape[0]
    word = packed.qweight[k // 8, n].item() & 0xFFFFFFFF
    code = word >> (4 * (k % 8)) & 0xF
    zero_word = packed.qzeros[k // group_size, n // 8].item() & 0xFFFFFFFF
    zero = zero_word >> (4 * (n % 8)) & 0xF
    return (code - zero) * packed.scales[k // group_size, n].item()


def test_worked_example_of_the_docstring():
    codes = torch.tensor([3, 10, 8, 0, 15, 7, 8, 1], dtype=torch.int32)
    assert pack(codes[:, None]).item() == 0x187F08A3


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_unpack_inverts_pack(rows):
    codes = torch.randint(0, 16, (rows, 5), dtype=torch.int32)
    assert torch.equal(unpack(pack(codes), rows), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_dequantize_is_the_formula(symmetric, search):
    packed = quantize_reference(torch.randn(11, 96), 48, symmetric, search)
    weight = dequantize_reference(packed, torch.float32)
    for n, k in [(0, 0), (10, 95), (3, 47), (3, 48), (7, 9), (8, 64)]:
        assert weight[n, k].item() == pytest.approx(decode_one(packed, n, k), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_code_is_nearer(symmetric):
    """Round to nearest: with the scale and zero that were chosen, no other code gives a smaller error."""
    weight = torch.randn(6, 64, dtype=torch.float64).float()
    packed = quantize_reference(weight, 32, symmetric)
    codes = unpack(packed.qweight, 64).t()
    zeros = unpack(packed.qzeros.t(), 6).repeat_interleave(32, dim=1)
    scales = packed.scales.t().repeat_interleave(32, dim=1).double()
    errors = torch.stack([((code - zeros) * scales - weight.double()).abs() for code in range(16)])
    chosen = ((codes - zeros) * scales - weight.double()).abs()
    assert (chosen <= errors.amin(0) + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 128, 1024])
def test_full_range_is_off_by_half_a_step_at_most(symmetric, group_size):
    weight = torch.randn(32, 1024)
    packed = quantize_reference(weight, group_size, symmetric)
    error = (dequantize_reference(packed, torch.float32) - weight).abs()
    steps = packed.scales.t().abs().float().repeat_interleave(group_size, dim=1)
    slack = 1.0 if not symmetric else 0.5  # rounding the zero to a whole code can shift a range by half a step
    assert (error <= slack * steps * 1.01).all()


def test_search_never_does_worse_and_on_normal_weights_does_better():
    weight = torch.randn(64, 512)
    for symmetric in (True, False):
        full, searched = (
            (dequantize_reference(quantize_reference(weight, 128, symmetric, search), torch.float32) - weight) ** 2
            for search in (False, True)
        )
        groups = lambda error: error.unflatten(1, (-1, 128)).double().sum(-1)  # noqa: E731
        assert (groups(searched) <= groups(full) * (1 + 1e-6)).all()
        assert searched.mean() < 0.95 * full.mean()


def test_errors_on_normal_weights_are_near_the_theoretical_best():
    """Sixteen uniform levels on a normal distribution cannot have an MSE under 0.01154; groups of 64 do better."""
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    for group_size, bound in [(4096, 0.0119), (64, 0.0077)]:
        packed = quantize_reference(weight, group_size, search=True)
        mse = ((dequantize_reference(packed, torch.float32) - weight) ** 2).mean().item()
        assert 0.5 * bound < mse < bound


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_weights_stay_finite(symmetric, search, dtype):
    """Zero rows, constant groups, single outliers, the largest and the smallest numbers of each dtype."""
    info = torch.finfo(dtype)
    weight = torch.randn(9, 64).to(dtype)
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -0.37
    weight[3, 5] = 60000.0
    weight[4] = info.max
    weight[5] = info.tiny
    weight[6, ::2], weight[6, 1::2] = info.max, -info.max
    weight[7] = -0.0
    packed = quantize_reference(weight, 32, symmetric, search)
    restored = dequantize_reference(packed, torch.float16)
    assert restored.isfinite().all()
    assert (restored[0] == 0).all() and (restored[7] == 0).all()
    assert packed.scales.isfinite().all() and (packed.scales.abs() <= MAX_SCALE).all() and (packed.scales != 0).all()
    constant = restored[1:3].float() - weight[1:3].float()
    assert constant.abs().max() <= 0.37 / 15  # within a step


@pytest.mark.parametrize(("n", "k", "group_size"), [(7, 64, 16), (16, 96, 96)])
def test_a_weight_comes_apart_into_what_it_was_packed_from(n, k, group_size):
    codes, zeros = torch.randint(16, (n, k)), torch.randint(16, (n, k // group_size))
    scales = torch.randn(n, k // group_size).half()
    parts = unpack_weight(pack_weight(codes, scales, zeros))
    assert all(map(torch.equal, parts, (codes.int(), scales, zeros.int())))


def test_bits_are_what_the_docstring_says():
    packed = quantize_reference(torch.randn(64, 256), 64)
    bits = 8 * sum(tensor.nbytes for tensor in packed) / (64 * 256)
    assert bits == 4 + 20 / 64


def test_group_sizes():
    assert group_sizes(64) == [16, 32, 64]
    assert group_sizes(1600) == [16, 32, 64, 80, 160, 320, 400, 800, 1600]
    assert group_sizes(100) == []


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(4, 64), 48, "possible: 16, 32, 64"),
        (torch.zeros(4, 64), 0, "group_size 0"),
        (torch.zeros(4, 100), 50, "multiple of 16"),
        (torch.zeros(4, 4, 64), 64, r"shape \[4, 4, 64\]"),
        (torch.zeros(4, 64, dtype=torch.int32), 64, "torch.int32"),
        (torch.zeros(4, 64, dtype=torch.float64), 64, "torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(weight, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize_reference(weight, group_size)


def test_search_gives_up_an_outlier():
    """One weight far outside many small ones: clipping it makes finer steps for all others."""
    weight = torch.randn(1, 4096)
    weight[0, 7] = 8.0
    full = quantize_reference(weight, 4096).scales.item()
    searched = quantize_reference(weight, 4096, search=True).scales.item()
    assert 0.5 * full <= searched < 0.8 * full
