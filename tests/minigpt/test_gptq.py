"""GPTQ on single layers, against float64 and the obvious way."""

import pytest
import torch

import kernels
from minigpt.quantization.gptq import choose_group_scales, gptq
from minigpt.quantization.rtn import minmax, mse


def correlated_inputs(tokens, width, rank):
    """Inputs with few strong directions and a little of everything, some much larger than others: float64."""
    x = torch.randn(tokens, rank, dtype=torch.float64) @ torch.randn(rank, width, dtype=torch.float64)
    sizes = torch.rand(width, dtype=torch.float64) * 3 + 0.1
    return (x + 0.3 * torch.randn(tokens, width, dtype=torch.float64)) * sizes


def hessian_of(x):
    """What calibration gives: E[x x^T], damped by a hundredth of its mean diagonal."""
    hessian = x.t() @ x / len(x)
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def loss(weight, packed, hessian):
    """Mean squared error of the outputs."""
    error = weight.double() - kernels.dequantize(packed, torch.float32).double()
    return ((error @ hessian) * error).sum().item()


def slow_gptq(weight, group_size, hessian, scales, zeros, order):
    """One input at a time, the inverse of what remains computed anew each time (Frantar et al., equations 2 and 3)."""
    weight, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int32)
    order = order.tolist()
    for position, k in enumerate(order):
        scale, zero = scales[:, k // group_size].double(), zeros[:, k // group_size]
        codes[:, k] = (torch.round(weight[:, k] / scale) + zero).clamp(0, 15).int()
        error = weight[:, k] - (codes[:, k] - zero) * scale
        remaining = order[position:]
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        weight[:, remaining] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


def codes_of(packed):
    return kernels.unpack(packed.qweight, packed.in_features).t()


@pytest.mark.parametrize(
    ("rows", "width", "group_size"),
    [(5, 48, 16), (7, 160, 32), (3, 272, 272), (9, 96, 48)],  # BLOCK is 128: shorter, longer, not a multiple
)
def test_codes_are_those_of_the_slow_and_obvious_way(rows, width, group_size):
    weight, hessian = torch.randn(rows, width), hessian_of(correlated_inputs(500, width, 20))
    scales, zeros = choose_group_scales(weight, group_size, hessian)
    order = hessian.diagonal().argsort(descending=True)
    packed = gptq(weight, group_size, hessian)
    assert torch.equal(packed.scales.t(), scales)
    assert torch.equal(kernels.unpack(packed.qzeros.t(), rows), zeros)
    assert torch.equal(codes_of(packed), slow_gptq(weight, group_size, hessian, scales, zeros, order))


def test_outputs_change_far_less_than_with_rounding_to_nearest():
    weight, hessian = torch.randn(24, 256), hessian_of(correlated_inputs(2000, 256, 32))
    nearest = min(loss(weight, method(weight, 64), hessian) for method in (minmax, mse))
    assert loss(weight, gptq(weight, 64, hessian), hessian) < 0.4 * nearest


def test_heavy_inputs_first_is_better_than_in_order():
    """The last inputs are the largest: in order, nothing is left to make up for their errors."""
    x = correlated_inputs(2000, 128, 16) * torch.linspace(0.1, 3, 128, dtype=torch.float64)
    weight, hessian = torch.randn(24, 128), hessian_of(x)
    scales, zeros = choose_group_scales(weight, 32, hessian)
    in_order = slow_gptq(weight, 32, hessian, scales, zeros, torch.arange(128))
    assert loss(weight, gptq(weight, 32, hessian), hessian) < 0.9 * loss(
        weight, kernels.pack_weight(in_order, scales, zeros), hessian
    )


def test_inputs_from_the_quantized_layer_before_are_better_than_the_original_ones():
    """Rounding a layer moves its outputs to where they never were: a layer calibrated on those would hide errors there.

    Text of 8 directions goes through two layers, the first one rounded.
    """
    x = torch.randn(3000, 8, dtype=torch.float64) @ torch.randn(8, 64, dtype=torch.float64)
    first, second = torch.randn(64, 64), torch.randn(32, 64)
    inputs = x @ kernels.dequantize(minmax(first, 64), torch.float32).double().t()
    fed, unfed = (gptq(second, 64, hessian_of(each)) for each in (inputs, x @ first.double().t()))
    hessian = inputs.t() @ inputs / len(inputs)
    assert loss(second, fed, hessian) < 0.8 * loss(second, unfed, hessian)


def test_scales_are_the_best_of_those_tried_as_the_inputs_weigh_them():
    weight, hessian = torch.randn(4, 96), hessian_of(correlated_inputs(500, 96, 10))
    scales, zeros = choose_group_scales(weight, 32, hessian)
    for row in range(4):
        for group in range(3):
            part = slice(32 * group, 32 * (group + 1))
            w, importance = weight[row, part], hessian.diagonal()[part]

            def weighed(scale, zero, w=w, importance=importance):
                level = (torch.round(w / scale.float()) + zero).clamp(0, 15) - zero
                error = w.double() - level.double() * scale.double()
                return (error**2 * importance).sum().item()

            tried = [kernels.choose_scales(w, symmetric=False, shrink=1 - step / 64) for step in range(32)]
            best = min(weighed(*candidate) for candidate in tried)
            assert weighed(scales[row, group], zeros[row, group]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 60000.0])
def test_what_comes_out_is_in_the_format(size):
    weight = torch.randn(11, 64) * size
    weight = weight.clamp(-65000, 65000)
    weight[3] = 0
    packed = gptq(weight, 16, hessian_of(correlated_inputs(300, 64, 8)))
    assert packed.scales.dtype == torch.float16 and torch.isfinite(packed.scales).all() and (packed.scales > 0).all()
    assert packed.qweight.shape == (8, 11) and packed.scales.shape == (4, 11) and packed.qzeros.shape == (4, 2)
    restored = kernels.dequantize(packed)
    assert torch.isfinite(restored).all() and (restored[3] == 0).all()


def test_inputs_that_weigh_nothing_are_rounded_to_nearest():
    x = correlated_inputs(500, 64, 8)
    x[:, 10:20] = 0
    weight, hessian = torch.randn(6, 64), hessian_of(x)
    packed = gptq(weight, 64, hessian)
    scales, zeros = packed.scales.t().float(), kernels.unpack(packed.qzeros.t(), 6)
    nearest = (torch.round(weight / scales) + zeros).clamp(0, 15).int()
    codes = codes_of(packed)
    assert torch.equal(codes[:, 10:20], nearest[:, 10:20])
    assert not torch.equal(codes, nearest)


@pytest.mark.gpu
def test_a_gpu_chooses_as_well():
    weight, hessian = torch.randn(64, 320), hessian_of(correlated_inputs(1000, 320, 32))
    ours = gptq(weight.cuda(), 64, hessian.cuda())
    assert loss(weight, type(ours)(*(t.cpu() for t in ours)), hessian) == pytest.approx(
        loss(weight, gptq(weight, 64, hessian), hessian), rel=0.02
    )
