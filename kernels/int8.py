"""A weight of 8 bits, one scale a row: for matrices that must lose next to nothing, like GPT-2's token embedding.

    w[n, k]  ~  code[n, k] * scale[n]            code -127..127, scale = the row's largest magnitude / 127

8 bits a weight and 16 a row, an error of at most half a step, scale / 2. No groups and no zeros: a row of a thousand
weights has 255 levels to spread them over, and they need no better. The scale does not depend on k, so it can wait
until a row's sum is done: the sums are of products with whole numbers (lesson 16).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.k00_reference import MIN_SCALE, reciprocal

MAX_LEVEL = 127
MAX_SCALE = 515.0  # 127 * 515 = 65405 <= 65504, the largest fp16
CHUNK = 2**20  # weights that are brought to another dtype at a time: few enough to stay in a CPU's cache


class Int8Weight(NamedTuple):
    """A weight of [out_features, in_features] = [N, K] in the format above.

    Attributes:
        codes: int8 [N, K].
        scales: fp16 [N].
    """

    codes: Tensor
    scales: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Rounds each weight to the nearest of its row's 255 levels, halves to even: floating [N, K] -> int8.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}, it must be floating [out_features, in_features]"
        )
    largest = weight.abs().amax(1).float()  # [N]
    scales = (largest * (1 / MAX_LEVEL)).clamp(MIN_SCALE, MAX_SCALE).to(torch.float16)  # [N]
    levels = torch.round(weight.float() * reciprocal(scales)[:, None])  # [N, K]
    return Int8Weight(levels.clamp(-MAX_LEVEL, MAX_LEVEL).to(torch.int8), scales)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for: -> `dtype` [N, K], rounded once from the exact product."""
    out = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    return torch.mul(weight.codes, weight.scales[:, None].float(), out=out)


def matmul_int8_reference(x: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T: floating [..., K] -> [..., N], in x's dtype. The codes become float32 a few rows at a time."""
    rows = max(1, CHUNK // weight.in_features)
    sums = [torch.nn.functional.linear(x.float(), codes.float()) for codes in weight.codes.split(rows)]
    return (torch.cat(sums, -1) * weight.scales.float()).to(x.dtype)
