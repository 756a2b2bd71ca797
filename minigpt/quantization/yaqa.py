"""YAQA: rounds so that the model's predictions change little, and not the outputs of each layer for themselves.

Tseng et al. 2025, "Model-Preserving Adaptive Rounding", arXiv 2505.22988. GPTQ and QuantEase take every output of a
layer to matter as much as every other, and each on its own. But the model may hardly look at some outputs, and of
errors in two of them look at the sum alone. How it does say two matrices, H = E[x x^T] of a layer's inputs (gptq.py)
and F = E[g g^T] of its outputs (fisher.py). With E = w - q the error of the weight, [N, K], the divergence of the
predictions is about

    1/2 sum over n, n', k, k' of  F[n, n'] E[n, k] H[k, k'] E[n', k']  =  1/2 trace(F E H E^T)

as if x and g knew nothing of each other (Martens & Grosse 2015, "K-FAC", arXiv 1503.05671), nor one token's error of
the next one's, nor one layer's. With F = 1 that is what QuantEase minimises, and its way serves here: each weight in
turn gets the code that is best given all others, which now are those of its row and of all other rows (the paper
spreads errors instead, as GPTQ does):

    q_nk  ->  nearest level to  q_nk + (F E H)_nk / (F_nn H_kk)

A weight at a time would take forever. Along a diagonal of the matrix no two weights share a row or a column, so what
one does seldom concerns the next: all of a diagonal go at once. Where it does concern it, as with strong directions in
both H and F, all at once may lose where each alone would gain; then only the best of the moves are made, so that the
trace never rises.

Damping keeps F, which holds for the original model and under those assumptions, from being believed too much: `DAMPING`
of its mean is added to its diagonal.

MEASURED (results/quantizers.json) on the demo, groups of 128, as the KL divergence to the original model on text held
back: gptaq, which is this with F = 1, 0.0068; with F, and with half of the step to the original inputs (calibration.py)
in place of a quarter, 0.0056, damped by 0.3 or 0.1, 0.0057 by 0.03. With 124M parameters it pays more: 0.00057 where
gptaq has 0.00080 and gptq 0.00104 (results/accuracy.json), 0.54 of that, where 0.66 was predicted. Tried and not built:
weighing each token in H by |g| or |g|^2, 0.0055 (the paper goes back and forth between H and F like this, until they
fit each other). Of no use: to go on like this from the derivatives of the divergence itself, a natural-gradient step of
all layers towards better codes. They are averages over tokens, and there are more weights than tokens: it follows the
noise.
"""

import torch
from torch import Tensor

from kernels import MAX_CODE, QuantizedWeight, pack_weight, unpack_weight
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
    codes, scales, zeros = unpack_weight(start)  # [N, K], and [N, G] each
    codes = codes.float()
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
    for d in range(1 - rows, inputs):
        n, k = slice(max(0, -d), min(rows, inputs - d)), slice(max(0, d), min(inputs, rows + d))
        code, step = codes.diagonal(d), steps.diagonal(d)  # [length of the diagonal]
        slope = torch.linalg.vecdot(fisher[n], pull[k])
        curvature = fisher[n, n] * hessian[k, k]  # [length, length], of each weight with each
        lowest = code + slope / (curvature.diagonal() * step)
        moves = (lowest.round().clamp(0, MAX_CODE) - code) * step
        if slope @ moves < moves @ (curvature @ moves) / 2:  # together they lose
            moves *= worth_making(moves, slope, curvature)
        code += (moves / step).round()
        pull[:, n] -= hessian[:, k] * moves
    return codes


def worth_making(moves: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Of moves each of which gains alone, the best ones, as many as gain most together.

    Moves m lower 1/2 trace(F E H E^T) by slope m - 1/2 m curvature m^T.

    Args:
        moves: by how much weights of a diagonal would grow, float32 [L].
        slope: how fast the trace would fall, half of it, float32 [L].
        curvature: float32 [L, L].

    Returns:
        bool [L].
    """
    products = curvature * torch.outer(moves, moves)
    alone = slope * moves - products.diagonal() / 2
    order = alone.argsort(descending=True, stable=True)
    with_better = products[order][:, order].tril(-1).sum(1)
    gained = (alone[order] - with_better).cumsum(0)  # by the best one, the best two, ...
    best = torch.arange(len(moves), device=moves.device) <= gained.argmax()
    return (best & (gained.max() > 0))[order.argsort()]
