"""YAQA: rounds so that the model's predictions change little, and not the outputs of each layer for themselves.

Tseng et al. 2025, "Model-Preserving Adaptive Rounding", arXiv 2505.22988. GPTQ and QuantEase take every output of a
layer to matter as much as every other, and each on its own. But the model may hardly look at some outputs, and of
errors in two of them look at the sum alone. How it does say two matrices, H = E[x x^T] of a layer's inputs (gptq.py)
and F = E[g g^T] of its outputs (fisher.py). With E the error of the weight, [N, K], and the two taken to be independent
of each other (Martens & Grosse 2015, "K-FAC", arXiv 1503.05671), the predictions' divergence is, to second order,

    1/2 sum over n, n', k, k' of  F[n, n'] E[n, k] H[k, k'] E[n', k']  =  1/2 trace(F E H E^T)

With F = 1 that is what QuantEase minimises, and so it can be done here: each weight in turn gets the code that is best
given all others, which now are those of its row and of all other rows (the paper spreads errors instead, as GPTQ does):

    q_nk  ->  nearest level to  q_nk + (F E H)_nk / (F_nn H_kk)

A weight at a time would take forever. Along a diagonal of the matrix no two weights share a row or a column, so what
one does hardly concerns the next: all of a diagonal go at once.

The two are not independent of each other, and F is of a model that is not the one that results. Damping keeps F from
being believed too much: `DAMPING` of its mean is added to its diagonal.

MEASURED (results/quantizers.json) on the demo, groups of 128, as the KL divergence to the original model on text held
back: gptaq, which is this with F = 1, 0.0068; with F damped by 0.03, 0.1 and 0.3, 0.0062, 0.0059 and 0.0059; with
half of the step to the original inputs (calibration.py) in place of a quarter, 0.0057. Tuned in 1600 steps, 0.0039, and
gptaq 0.0041. Tried and not built: tokens weigh in H by how large |g| is, 0.0054, by |g|^2, 0.0070, as few tokens
decide then (the paper goes back and forth between H and F like this, until they fit each other).
"""

import torch
from torch import Tensor

from kernels import QuantizedWeight, pack_weight, unpack
from minigpt.quantization.quantease import quantease

SWEEPS = 3  # through all diagonals; each further one changes half as many codes as the one before
DAMPING = 0.3  # added to the Fisher information's diagonal, as a share of its mean


def yaqa(weight: Tensor, group_size: int, hessian: Tensor, fisher: Tensor) -> QuantizedWeight:
    """Chooses the codes of a weight so that the model's predictions change little.

    Args:
        weight, group_size, hessian: as for `gptq`.
        fisher: E[g g^T] over the layer's outputs, float32 [out_features, out_features], on any device.
    """
    start = quantease(weight, group_size, hessian)
    codes = unpack(start.qweight, start.in_features).t().float()  # [N, K]
    scales, zeros = start.scales.t(), unpack(start.qzeros.t(), start.out_features)  # [N, G] each
    fisher = damp(fisher.to(weight.device))
    for _ in range(SWEEPS):
        codes = sweep(codes, scales, zeros, weight.float(), hessian.float(), fisher)
    return pack_weight(codes.int(), scales, zeros)


def damp(fisher: Tensor) -> Tensor:
    """The Fisher information, [N, N], with DAMPING; the identity where no output matters."""
    mean = fisher.diagonal().mean()
    identity = torch.eye(len(fisher), device=fisher.device)
    return fisher + DAMPING * mean * identity if mean > 0 else identity


def sweep(codes: Tensor, scales: Tensor, zeros: Tensor, goal: Tensor, hessian: Tensor, fisher: Tensor) -> Tensor:
    """Gives each weight in turn, a diagonal at a time, the code that is best given all others.

    Args:
        codes: whole numbers 0..15 in float32, [N, K].
        scales, zeros: [N, G].
        goal: the weight to come close to, float32 [N, K].
        hessian: float32 [K, K].
        fisher: float32 [N, N].

    Returns:
        New codes, as `codes`.
    """
    rows, inputs = codes.shape
    steps, middles = (each.repeat_interleave(inputs // each.shape[1], dim=1).float() for each in (scales, zeros))
    codes = codes.clone()
    pull = hessian @ (goal - (codes - middles) * steps).t()  # [K, N]: (E H)^T, kept up to date
    curvature = torch.outer(fisher.diagonal(), hessian.diagonal()) * steps  # [N, K], by the code
    for d in range(1 - rows, inputs):
        n, k = slice(max(0, -d), min(rows, inputs - d)), slice(max(0, d), min(inputs, rows + d))
        code, slope = codes.diagonal(d), (fisher[n] * pull[k]).sum(1)  # [length of the diagonal]
        moved = (code + slope / curvature.diagonal(d)).round().clamp(0, 15) - code
        code += moved
        pull[:, n] -= hessian[:, k] * (moved * steps.diagonal(d))
    return codes
