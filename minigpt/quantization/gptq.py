"""GPTQ: round one input's weights after another, and let the inputs that are left make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. What should stay small is not the error of the weights but that of the layer's outputs, over inputs x
as they occur in text:

    E |(w - q) x|^2  =  (w - q) H (w - q)^T        H = E[x x^T], the Hessian, half of it: [K, K]

(w, q: a row of the weight before and after.) Once input j has its codes, the best that the inputs after it can do is
to move by a multiple of the error, which multiple the inverse of H says. With U upper triangular, H^-1 = U^T U:

    error = (w_j - q_j) / U[j, j]        w_k -= U[j, k] * error  for all k > j        (their equations 2 and 3)

All rows go through this at once. Inputs are taken BLOCK at a time: within a block each error is spread at once, and
over the inputs behind the block by one matrix product at its end (section 3.3, "lazy batch updates").

Two choices are left, and both matter:

- Order: the inputs that weigh most in H first, while there are many left to make up for them ("act-order"). Groups
  stay where they are in the file, as their scales are chosen before ("static groups"): the kernels see no permutation.
- Scales: of the ranges that `mse` tries, the one with the least error, each input weighed by its entry on H's diagonal.

MEASURED (results/quantizers.json) on the demo, with groups of 64, calibrated on 32,768 tokens of its training text, as
the KL divergence to the original model on 96 windows of its test text: GPTQ as published, with `minmax` scales and no
act-order, 0.0095; this file with what calibration.py adds (the covariance for H, and a better bias), 0.0086; `mse`,
without any text, 0.016. Scales chosen by the group's whole block of H, or by what the other inputs leave of it (its
Schur complement), are no better: 0.0088 and 0.0087; those of `mse`, 0.0087. Scales chosen anew when a group is reached,
from weights that have moved by then, instead of act-order: level with it.
"""

import torch
from torch import Tensor

from kernels import MAX_CODE, QuantizedWeight, choose_scales, encode, pack_weight

BLOCK = 128  # inputs whose errors are spread over the inputs behind them in one matrix product
RANGES = 32  # how many ranges of a group are tried, from the full one down to half of it


def gptq(weight: Tensor, group_size: int, hessian: Tensor) -> QuantizedWeight:
    """Chooses the codes of a weight so that the layer's outputs change little.

    Args:
        weight: floating [out_features, in_features] = [N, K].
        group_size: weights along K that share a scale; divides K, multiple of 16.
        hessian: E[x x^T] over the layer's inputs, positive definite, on the weight's device: float64 [K, K].
    """
    scales, zeros = choose_group_scales(weight, group_size, hessian)  # [N, G] each
    order = hessian.diagonal().argsort(descending=True, stable=True)  # [K]
    factor = inverse_factor(hessian[order][:, order]).to(torch.float32)  # [K, K]
    group = order // group_size  # [K]
    steps, middles = scales.t()[group].float(), zeros.t()[group].float()  # [K, N]
    rest = weight.t()[order].float()  # [K, N]
    codes = torch.empty_like(rest)
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        errors = torch.empty_like(rest[begin:end])  # [BLOCK, N]
        for j in range(begin, end):
            codes[j] = (rest[j] / steps[j] + middles[j]).round().clamp(0, MAX_CODE)
            errors[j - begin] = (rest[j] - (codes[j] - middles[j]) * steps[j]) / factor[j, j]
            rest[j + 1 : end] -= torch.outer(factor[j, j + 1 : end], errors[j - begin])
        rest[end:] -= factor[begin:end, end:].t() @ errors
    return pack_weight(codes[order.argsort()].t().int(), scales, zeros)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with hessian^-1 = U^T U: float64 [K, K], positive definite -> float64 [K, K]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def choose_group_scales(weight: Tensor, group_size: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the scale and zero, of RANGES narrower and narrower ranges, whose error the inputs weigh least.

    Args:
        weight: floating [N, K].
        group_size: divides K.
        hessian: float64 [K, K]; only its diagonal counts here.

    Returns:
        scales: float16 [N, K/group_size], as `kernels.choose_scales` gives them.
        zeros: int32 [N, K/group_size], 0..15.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [N, G, g]
    importance = hessian.diagonal().view(-1, group_size).float()  # [G, g]
    best_scales, best_zeros = choose_scales(groups, symmetric=False)
    best_loss = torch.full_like(best_scales, torch.inf, dtype=torch.float32)
    for step in range(RANGES):
        scales, zeros = choose_scales(groups, symmetric=False, shrink=1 - step / (2 * RANGES))
        levels = (encode(groups, scales, zeros) - zeros[..., None]).float()
        loss = ((groups - levels * scales[..., None].float()).square() * importance).sum(-1)  # [N, G]
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
