"""Coordinate descent on codes, and the fit of scales, against float64 and the obvious way."""

import pytest
import torch
from test_gptq import correlated_inputs, hessian_of, loss

import kernels
from minigpt.quantization.gptq import gptq
from minigpt.quantization.quantease import fit_scales, quantease, sweep


def start(rows, width, group_size):
    """A weight, a Hessian, and what GPTQ makes of them: codes, scales, zeros."""
    weight, hessian = torch.randn(rows, width), hessian_of(correlated_inputs(600, width, 12))
    packed = gptq(weight, group_size, hessian)
    codes = kernels.unpack(packed.qweight, width).t().float()
    return weight, hessian, codes, packed.scales.t(), kernels.unpack(packed.qzeros.t(), rows)


@pytest.mark.parametrize(("rows", "width", "group_size"), [(5, 48, 16), (3, 272, 272), (4, 160, 80)])
def test_a_sweep_tries_all_codes_of_each_weight_in_turn(rows, width, group_size):
    weight, hessian, codes, scales, zeros = start(rows, width, group_size)
    ours = sweep(codes, scales, zeros, weight, hessian.float())
    assert not torch.equal(ours, codes)
    for row in range(rows):
        scale = scales[row].double().repeat_interleave(group_size)
        zero = zeros[row].double().repeat_interleave(group_size)
        best = codes[row].double()
        for k in range(width):
            tried = best.repeat(16, 1)
            tried[:, k] = torch.arange(16)
            error = weight[row].double() - (tried - zero) * scale
            best = tried[((error @ hessian) * error).sum(1).argmin()]
        assert torch.equal(ours[row].double(), best)


def test_fitted_scales_are_the_least_squares_solution():
    weight, hessian, codes, scales, zeros = start(6, 96, 32)
    levels = codes - zeros.repeat_interleave(32, dim=1)
    fitted = fit_scales(levels, weight, hessian.float(), scales)
    root = torch.linalg.cholesky(hessian)  # (w - q) H (w - q)^T = |(w - q) root|^2
    for row in range(6):
        directions = torch.stack([levels[row].double() * (torch.arange(96) // 32 == g) for g in range(3)]) @ root
        expected = torch.linalg.lstsq(directions.t(), (weight[row].double() @ root)[:, None]).solution[:, 0]
        assert torch.allclose(fitted[row].double(), expected, rtol=1e-3)
    assert not torch.equal(fitted, scales)


def test_scales_that_do_not_fit_the_format_are_left_as_they_were():
    weight, hessian, codes, scales, zeros = start(3, 48, 16)
    levels = codes - zeros.repeat_interleave(16, dim=1)
    weight[1] *= -1  # would ask for negative scales
    levels[2] = 0  # asks for nothing: the rows above and below are fitted all the same
    fitted = fit_scales(levels, weight, hessian.float(), scales)
    assert torch.equal(fitted[1:], scales[1:]) and not torch.equal(fitted[0], scales[0])


@pytest.mark.parametrize("group_size", [16, 64, 192])
def test_no_row_is_worse_than_gptqs(group_size):
    weight, hessian = torch.randn(12, 192), hessian_of(correlated_inputs(2000, 192, 24))
    theirs, ours = (method(weight, group_size, hessian) for method in (gptq, quantease))
    assert loss(weight, ours, hessian) < 0.97 * loss(weight, theirs, hessian)
    errors = [weight.double() - kernels.dequantize(packed, torch.float32).double() for packed in (ours, theirs)]
    rows = [((error @ hessian) * error).sum(1) for error in errors]
    assert (rows[0] <= rows[1] * (1 + 1e-5)).all()
    assert ours.scales.dtype == torch.float16 and (ours.scales > 0).all() and torch.isfinite(ours.scales).all()
