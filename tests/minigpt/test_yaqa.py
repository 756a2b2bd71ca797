"""Rounding by the model's predictions, against float64 and the obvious way."""

import pytest
import torch
from test_gptq import correlated_inputs, hessian_of
from test_quantease import start

import kernels
from minigpt.quantization.quantease import quantease
from minigpt.quantization.yaqa import DAMPING, sweep, yaqa


def loss(error, hessian, fisher):
    """Twice the divergence that an error foretells: trace(F E H E^T), for errors [..., N, K] in float64."""
    return (fisher.double() @ error @ hessian * error).sum((-2, -1))


@pytest.mark.parametrize(("rows", "width", "group_size"), [(5, 48, 16), (40, 32, 32), (3, 48, 48)])
def test_a_sweep_tries_all_codes_of_each_weight_in_turn(rows, width, group_size):
    weight, hessian, codes, scales, zeros = start(rows, width, group_size)
    fisher = hessian_of(correlated_inputs(600, rows, 4)).float()
    ours = sweep(codes, scales, zeros, weight, hessian.float(), fisher)
    assert not torch.equal(ours, codes)
    scale, zero = (each.double().repeat_interleave(group_size, 1) for each in (scales, zeros))
    best = codes.double()
    for d in range(1 - rows, width):
        diagonal = [(n, n + d) for n in range(rows) if 0 <= n + d < width]
        chosen = []
        for n, k in diagonal:
            tried = best.repeat(16, 1, 1)
            tried[:, n, k] = torch.arange(16)
            chosen.append(loss(weight.double() - (tried - zero) * scale, hessian, fisher).argmin())
        for (n, k), code in zip(diagonal, chosen, strict=True):
            best[n, k] = code
    assert torch.equal(ours.double(), best)


@pytest.mark.parametrize("group_size", [16, 64, 192])
def test_it_foretells_less_divergence_than_quantease(group_size):
    weight, hessian = torch.randn(96, 192), hessian_of(correlated_inputs(2000, 192, 24))
    fisher = hessian_of(correlated_inputs(2000, 96, 24)).float()
    damped = fisher + DAMPING * fisher.diagonal().mean() * torch.eye(96)
    ours, theirs = yaqa(weight, group_size, hessian, fisher), quantease(weight, group_size, hessian)
    losses = [
        loss(weight.double() - kernels.dequantize(packed, torch.float32).double(), hessian, damped)
        for packed in (ours, theirs)
    ]
    assert losses[0] < 0.95 * losses[1]
    assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.qzeros, theirs.qzeros)


def test_outputs_that_do_not_matter():
    """A layer that nothing depends on has no Fisher information: it is rounded as if all outputs mattered alike."""
    weight, hessian = torch.randn(24, 64), hessian_of(correlated_inputs(500, 64, 8))
    assert torch.equal(
        yaqa(weight, 32, hessian, torch.zeros(24, 24)).qweight, yaqa(weight, 32, hessian, torch.eye(24)).qweight
    )
