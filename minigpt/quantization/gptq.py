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
- Scales: of the ranges that `mse` tries, the one with the least (w - q) H_gg (w - q)^T, H_gg being the group's own
  block of H.
"""

import torch
from torch import Tensor

from kernels import QuantizedWeight, choose_scales, encode, pack_weight

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
            codes[j] = (rest[j] / steps[j] + middles[j]).round().clamp(0, 15)
            errors[j - begin] = (rest[j] - (codes[j] - middles[j]) * steps[j]) / factor[j, j]
            rest[j + 1 : end] -= torch.outer(factor[j, j + 1 : end], errors[j - begin])
        rest[end:] -= factor[begin:end, end:].t() @ errors
    return pack_weight(codes[order.argsort()].t().int(), scales, zeros)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with hessian^-1 = U^T U: float64 [K, K], positive definite -> float64 [K, K]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def choose_group_scales(weight: Tensor, group_size: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the scale and zero, of RANGES narrower and narrower ranges, whose error the Hessian weighs least.

    Args:
        weight: floating [N, K].
        group_size: divides K.
        hessian: float64 [K, K].

    Returns:
        scales: float16 [N, K/group_size], as `kernels.choose_scales` gives them.
        zeros: int32 [N, K/group_size], 0..15.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [N, G, g]
    blocks = group_blocks(hessian, group_size).float()  # [G, g, g]
    best_scales, best_zeros = choose_scales(groups, symmetric=False)
    best_loss = torch.full_like(best_scales, torch.inf, dtype=torch.float32)
    for step in range(RANGES):
        scales, zeros = choose_scales(groups, symmetric=False, shrink=1 - step / (2 * RANGES))
        levels = (encode(groups, scales, zeros) - zeros[..., None]).float()
        errors = (groups - levels * scales[..., None].float()).transpose(0, 1)  # [G, N, g]
        loss = ((errors @ blocks) * errors).sum(-1).t()  # [N, G]
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def group_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """The blocks of the groups on the Hessian's diagonal: [K, K] -> [K/group_size, group_size, group_size]."""
    size = (-1, group_size)
    return hessian.unflatten(0, size).unflatten(2, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
