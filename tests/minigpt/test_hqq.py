"""Half-quadratic quantization."""

import pytest
import torch

import kernels
from minigpt import checkpoint
from minigpt.quantization.hqq import POWER, hqq, shrink
from minigpt.quantization.rtn import mse


def power_error(weight, packed):
    """The sum of |e|^p of each group: what the method is to make small, here in float64."""
    error = weight.double() - kernels.dequantize(packed, torch.float32).double()
    return error.unflatten(1, (-1, packed.group_size)).abs().pow(POWER).sum(-1)


def largest_error(weight, packed):
    error = weight.double() - kernels.dequantize(packed, torch.float32).double()
    return error.unflatten(1, (-1, packed.group_size)).abs().amax(-1)


@pytest.mark.parametrize("group_size", [16, 48, 96])
def test_no_group_is_worse_than_mses_and_many_are_better(group_size):
    """By the sum of |e|^p as well as by the largest |e|."""
    weight = torch.distributions.StudentT(3.0).sample((41, 96))
    for measure in (power_error, largest_error):
        ours, theirs = (measure(weight, method(weight, group_size)) for method in (hqq, mse))
        # Equal up to rounding: sums are in float32 there, and codes at a tie are as good on either side.
        assert (ours <= theirs * (1 + 1e-4)).all()
        assert (ours < 0.9999 * theirs).double().mean() > 0.1


def test_real_weights_gain():
    weight = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32).h[3].attn.c_proj.weight
    for measure in (power_error, largest_error):
        ours, theirs = (measure(weight, method(weight, 64)).sum() for method in (hqq, mse))
        assert ours < 0.999 * theirs


def test_size_does_not_matter():
    """A weight sixteen times as large has the same codes: nothing in the method is an absolute number."""
    weight = torch.randn(9, 64)
    small, large = hqq(weight, 32), hqq(weight * 16, 32)
    assert torch.equal(small.qweight, large.qweight) and torch.equal(small.qzeros, large.qzeros)
    assert torch.equal(small.scales * 16, large.scales)


@pytest.mark.parametrize("error", [0.02, 0.5, 1.0, 5.0, -5.0])
def test_shrinking_solves_its_equation(error):
    """By trying all: the cost of small errors is least at 0, that of large ones close to the errors themselves."""
    beta = 10.0
    tried = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    cost = tried.abs().pow(POWER) + beta / 2 * (error - tried) ** 2
    found = shrink(torch.tensor(error), beta).double()
    # The published formula is the first step of a fixed-point iteration: near the best, not on it.
    assert found.abs().pow(POWER) + beta / 2 * (error - found) ** 2 <= 1.15 * cost.min() + 1e-6


def test_what_comes_out_is_in_the_format():
    weight = torch.randn(13, 64)
    weight[2], weight[3, :32], weight[4], weight[5, 7] = 0, 1e-9, 3.0, 60000.0
    packed = hqq(weight, 32)
    assert packed.scales.dtype == torch.float16 and torch.isfinite(packed.scales).all() and (packed.scales > 0).all()
    assert packed.qweight.shape == (8, 13) and packed.scales.shape == (2, 13) and packed.qzeros.shape == (2, 2)
    restored = kernels.dequantize(packed)
    assert torch.isfinite(restored).all() and (restored[2] == 0).all()
    assert (restored[4].float() - 3).abs().max() < 0.01
