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

    def losses(tried):
        return loss(weight.double() - (tried - zero) * scale, hessian, fisher)

    for d in range(1 - rows, width):
        moves = []
        for n, k in ((n, n + d) for n in range(rows) if 0 <= n + d < width):
            tried = best.repeat(16, 1, 1)
            tried[:, n, k] = torch.arange(16)
            moves.append((losses(tried).min().item(), n, k, losses(tried).argmin()))
        candidates = [best]  # none, the best move, the best two, ...
        for _, n, k, code in sorted(moves):
            candidates.append(candidates[-1].clone())
            candidates[-1][n, k] = code
        result = losses(torch.stack(candidates))
        best = candidates[-1] if result[-1] <= result[0] else candidates[result.argmin()]
    assert torch.equal(ours.double(), best)


def strong_direction(width):
    """float64 [width, width]: a fifth of the variance lies in one direction, to which all inputs contribute."""
    direction = torch.nn.functional.normalize(torch.randn(width, 1, dtype=torch.float64), dim=0)
    return 0.8 * torch.eye(width, dtype=torch.float64) + 0.2 * width * direction @ direction.t()


def test_where_moves_disturb_each_other_no_sweep_makes_it_worse():
    """All at once, each would gain, and together they would multiply the loss by a hundred."""
    weight, hessian, fisher = torch.randn(192, 192), strong_direction(192), strong_direction(192).float()
    start = quantease(weight, 64, hessian)
    codes, scales, zeros = kernels.unpack(start.qweight, 192).t().float(), start.scales.t(), start.qzeros.t()
    zeros = kernels.unpack(zeros, 192)
    scale, zero = (each.double().repeat_interleave(64, 1) for each in (scales, zeros))
    before = torch.inf
    for _ in range(3):
        after = loss(weight.double() - (codes - zero) * scale, hessian, fisher)
        assert after < before
        before = after
        codes = sweep(codes, scales, zeros, weight, hessian.float(), fisher)


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
