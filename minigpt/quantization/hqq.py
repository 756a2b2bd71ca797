"""HQQ: scales and zeros that serve most weights, and let a few large errors be. Data-free.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (https://mobiusml.github.io/hqq_blog/).
Least squares heeds the largest errors most; here the errors' sum of |e|^p with p < 1 is to be small, which heeds them
least. Each error is split: e, which may be large but should be rare, and what remains, which is gaussian:

    minimise  sum |e|^p + beta/2 * |w - (q - zero) * scale - e|^2      in turns over e, and over scale and zero

For fixed scale and zero the best e is a shrunk error (their equation 5, "generalised soft thresholding"); for fixed e,
scale and zero are what least squares gives for the weights less e. beta grows from turn to turn.

Ours differs in two points: the format has whole zeros, which alone would hardly ever move, so that the scale moves as
well; and the best turn is kept, by the same sum of |e|^p.
"""

import torch
from torch import Tensor

from kernels import QuantizedWeight, choose_scales, encode, pack_weight

POWER = 0.7  # p
BETA = 10.0  # to begin with, in units of 1 / step^(2 - p): of the range's sixteenth, so that weights of any size serve
BETA_GROWTH = 1.01
TURNS = 20


def hqq(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Half-quadratic choice of scales and zeros: floating [out_features, in_features] -> int4."""
    groups = weight.float().unflatten(1, (-1, group_size))  # [N, G, g]
    scales, zeros = choose_scales(groups, symmetric=False)  # [N, G] each
    best_scales, best_zeros = scales, zeros
    best_loss = torch.full_like(scales, torch.inf, dtype=torch.float32)
    unit = scales[..., None].float()  # errors are measured in the first steps
    beta = BETA
    for _ in range(TURNS):
        codes = encode(groups, scales, zeros).float()  # [N, G, g]
        levels = codes - zeros[..., None]
        errors = (groups - levels * scales[..., None].float()) / unit
        loss = errors.abs().pow(POWER).sum(-1)  # [N, G]
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
        targets = groups - shrink(errors, beta) * unit
        scales = fit_scales(targets, levels, scales)
        zeros = (codes - targets / scales[..., None].float()).mean(-1).round().clamp(0, 15).int()
        beta *= BETA_GROWTH
    codes = encode(groups, best_scales, best_zeros).flatten(1)
    return pack_weight(codes, best_scales, best_zeros)


def shrink(errors: Tensor, beta: float) -> Tensor:
    """The e that minimises |e|^p + beta/2 * (errors - e)^2, about: small errors become 0, large ones stay."""
    size = errors.abs()
    return errors.sign() * (size - size.clamp(min=1e-8).pow(POWER - 1) / beta).clamp(min=0.0)


def fit_scales(targets: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """Least squares: the scales with which the levels come closest to the targets; where none is, the old ones.

    targets, levels: float32 [..., group_size]; scales: float16 [...] -> float16 [...].
    """
    fitted = ((targets * levels).sum(-1) / (levels * levels).sum(-1)).to(torch.float16)
    sound = torch.isfinite(fitted) & (fitted > 0) & (fitted <= 2 * scales)
    return torch.where(sound, fitted, scales)
