"""Lesson 0: the int4 format in plain torch. Every later lesson is checked against this file.

Run it:  python -m kernels.k00_reference          (packs sixteen numbers before your eyes)

THE IDEA. A linear layer stores one 16-bit number a weight. Cut each row of the weight into groups of, say, 64
neighbours, give each group one 16-bit `scale`, and store of each weight only a 4-bit `code`, 0..15:

    w[n, k]  ~  (code[n, k] - zero[n, g]) * scale[n, g]          g = k // group_size

`zero` is the code that means 0.0. In a symmetric group it is always 8, so the codes reach from -8 to +7 steps; an
asymmetric group chooses it, so that the sixteen steps cover the group's own range.

THE PRICE. 4 bits a weight, 16 bits of scale and 4 bits of zero a group: with groups of 64 that is
4 + 20/64 = 4.31 bits, 3.7 times less than 16. And an error: with steps of size `scale`, up to half a step a weight.

THE LAYOUT, that of GPTQ's files. A weight is [N, K] = [out_features, in_features], as torch has it. Eight codes that
are neighbours along K share a 32-bit word, the first one in the lowest four bits (the lowest nibble):

    w[n, 0..7]  codes     3   10    8    0   15    7    8    1
    nibble                0    1    2    3    4    5    6    7
    bits                0-3  4-7 8-11 ...                28-31
    word = 3 + 10*16 + 8*16^2 + 0*16^3 + 15*16^4 + 7*16^5 + 8*16^6 + 1*16^7 = 0x187F08A3   (read from right to left)

    qweight  int32 [K/8, N]                the words; a column holds the codes of one output
    scales   fp16  [K/group_size, N]
    qzeros   int32 [K/group_size, N/8]     eight zeros that are neighbours along N share a word, lowest nibble first

NEXT. Lesson 1 does the quantizing and packing in one pass over the weight, in Triton.
EXERCISE. Run this file, and work out one of its scales, its zero and a code or two by hand.
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

CODES_PER_WORD = 8  # 4-bit codes in an int32
MAX_CODE = 15
SYMMETRIC_ZERO = 8

# A scale must survive being stored as fp16, and 15 steps of it must not overflow fp16 either.
MIN_SCALE = 2.0**-24  # the smallest positive fp16
MAX_SCALE = 4364.0  # 15 * 4364 = 65460 <= 65504, the largest fp16

# How `search` tries narrower ranges: 32 of them, 1/64 apart, from the full range down to half of it.
# Powers of two, so that every candidate is the same number on every machine.
SEARCH_STEPS = 32
SEARCH_STEP = 1.0 / 64

# Weights quantized at a time: few enough to stay in a CPU's cache, where the search is twelve times faster.
CHUNK = 2**18


class QuantizedWeight(NamedTuple):
    """A weight of [out_features, in_features] = [N, K] in the format above. All shapes follow from the tensors.

    Attributes:
        qweight: int32 [K/8, N].
        scales: fp16 [K/group_size, N].
        qzeros: int32 [K/group_size, ceil(N/8)].
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[0] * CODES_PER_WORD

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]

    @property
    def group_size(self) -> int:
        """How many weights along K share a scale and a zero."""
        return self.in_features // self.scales.shape[0]


def check_group_size(in_features: int, group_size: int) -> None:
    """Raises ValueError, listing the group sizes that would do, unless `group_size` is one of `group_sizes`."""
    allowed = group_sizes(in_features)
    if group_size not in allowed:
        raise ValueError(
            f"group_size {group_size} does not fit in_features {in_features}; "
            f"possible: {', '.join(map(str, allowed)) or 'none (in_features must be a multiple of 16)'}"
        )


def group_sizes(in_features: int) -> list[int]:
    """The group sizes that cut in_features evenly and are multiples of 16, as tensor cores take 16 weights along K."""
    return [size for size in range(16, in_features + 1, 16) if in_features % size == 0]


def check_weight(weight: Tensor, group_size: int) -> None:
    """Raises ValueError unless `weight` is a floating [N, K] that can be cut into groups of `group_size`."""
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, it must be [out_features, in_features]")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"weight is {weight.dtype}, it must be float16, bfloat16 or float32")
    check_group_size(weight.shape[1], group_size)


def choose_scales(groups: Tensor, symmetric: bool, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """The scale and zero that make sixteen levels span each group's range.

    Args:
        groups: float32 [..., group_size].
        symmetric: zero = 8. The codes reach eight steps down and seven up, and a step away from both ends there is
            half a step more that still rounds to them: 8.5 and 7.5. Which end of the range gets the longer side is
            ours to choose, for a scale may be negative: the longer end does.
            Otherwise the sixteen levels span [min(w, 0), max(w, 0)], with zero rounded to a whole code.
        shrink: spans only this fraction of the range. Clipping the few largest weights makes steps finer for all.

    Returns:
        scales: float16 [...], magnitude in [MIN_SCALE, MAX_SCALE], so an all-zero group needs no special case.
        zeros: int32 [...], 0..15.
    """
    below = -groups.amin(-1).clamp(max=0.0)  # how far the range reaches below 0.0, and above
    above = groups.amax(-1).clamp(min=0.0)
    if symmetric:
        longer, shorter = torch.maximum(below, above), torch.minimum(below, above)
        step = torch.maximum(longer * (1 / 8.5), shorter * (1 / 7.5))
    else:
        step = (below + above) * (1 / MAX_CODE)
    scales = (step * shrink).clamp(MIN_SCALE, MAX_SCALE).to(torch.float16)
    if symmetric:
        scales = torch.where(above > below, -scales, scales)
        return scales, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.int32)
    return scales, torch.round((below * shrink * reciprocal(scales)).clamp(max=MAX_CODE)).to(torch.int32)


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scale: float16 -> float32. Encoding multiplies by it, as one division a group is cheaper than one a weight.

    To get the same codes on every machine, all of them must round alike: this division as IEEE prescribes, no other
    division anywhere (on a GPU torch turns x / 15 into x * (1/15)), and halves to even.
    """
    return 1.0 / scales.float()


def encode(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest code of each weight: float32 [..., group_size], with a scale and zero per group -> int32, 0..15."""
    # Where the weight lies between the lowest level, 0.0, and the highest, 1.0; what lies outside is clipped.
    lowest = (zeros.float() * (1 / MAX_CODE))[..., None]
    share = (groups * (reciprocal(scales) * (1 / MAX_CODE))[..., None] + lowest).clamp(0.0, 1.0)
    return torch.round(share * MAX_CODE).to(torch.int32)


def squared_error(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Sum of squared errors that a scale and zero leave in each group: float32 [..., group_size] -> float64 [...].

    Summed in float64, so that the order of summation, which differs from machine to machine, decides nothing.
    """
    levels = (encode(groups, scales, zeros) - zeros[..., None]).float()
    return ((groups - levels * scales[..., None].float()).double() ** 2).sum(-1)


def search_scales(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and zero with the least squared error among SEARCH_STEPS narrower and narrower ranges.

    Args and returns are those of `choose_scales`. Of equally good ranges the widest is kept.
    """
    best_scales, best_zeros = choose_scales(groups, symmetric)
    best_error = squared_error(groups, best_scales, best_zeros)
    for step in range(1, SEARCH_STEPS):
        scales, zeros = choose_scales(groups, symmetric, shrink=1.0 - step * SEARCH_STEP)
        error = squared_error(groups, scales, zeros)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def pack(codes: Tensor) -> Tensor:
    """Packs eight codes that are neighbours along dimension 0 into a word: [R, C] of 0..15 -> int32 [ceil(R/8), C].

    Missing rows at the end count as zeros.
    """
    rows, columns = codes.shape
    padded = codes.new_zeros((-(-rows // CODES_PER_WORD) * CODES_PER_WORD, columns), dtype=torch.int32)
    padded[:rows] = codes
    words = torch.zeros_like(padded[::CODES_PER_WORD])
    for nibble in range(CODES_PER_WORD):
        words |= padded[nibble::CODES_PER_WORD] << (4 * nibble)
    return words


def unpack(words: Tensor, rows: int) -> Tensor:
    """The inverse of `pack`: int32 [R/8, C] -> int32 [rows, C] of 0..15."""
    shifts = 4 * torch.arange(CODES_PER_WORD, dtype=torch.int32, device=words.device)
    codes = (words[:, None, :] >> shifts[None, :, None]) & 0xF  # [R/8, 8, C]; & drops the sign that >> drags along
    return codes.flatten(0, 1)[:rows]


def pack_weight(codes: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    """Brings what was chosen into the layout above.

    Args:
        codes: integers 0..15, [N, K].
        scales: float16 [N, K/group_size].
        zeros: integers 0..15, [N, K/group_size].
    """
    return QuantizedWeight(
        qweight=pack(codes.t()),  # [K/8, N]
        scales=scales.t().contiguous(),  # [K/group_size, N]
        qzeros=pack(zeros).t().contiguous(),  # [K/group_size, ceil(N/8)]
    )


def unpack_weight(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_weight`: codes int32 [N, K]; scales float16 and zeros int32, [N, K/group_size] both."""
    codes = unpack(weight.qweight, weight.in_features).t()
    return codes, weight.scales.t(), unpack(weight.qzeros.t(), weight.out_features)


def quantize_reference(
    weight: Tensor, group_size: int, symmetric: bool = False, search: bool = False
) -> QuantizedWeight:
    """Quantizes a weight to int4, round to nearest.

    Args:
        weight: float16, bfloat16 or float32 [N, K], finite.
        group_size: weights along K that share a scale; divides K, multiple of 16. K itself: one scale a row.
        symmetric: the zero is 8 everywhere.
        search: tries SEARCH_STEPS ranges a group and keeps the one with the least squared error.

    Raises:
        ValueError: naming the shape, dtype or group size that does not fit.
    """
    check_weight(weight, group_size)
    choose = search_scales if search else choose_scales
    codes, scales, zeros = [], [], []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        groups = rows.float().unflatten(1, (-1, group_size))  # [n, K/group_size, group_size]
        chosen = choose(groups, symmetric)  # two of [n, K/group_size]
        codes.append(encode(groups, *chosen).flatten(1))  # [n, K]
        scales.append(chosen[0])
        zeros.append(chosen[1])
    return pack_weight(torch.cat(codes), torch.cat(scales), torch.cat(zeros))


def dequantize_reference(weight: QuantizedWeight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for: -> `dtype` [N, K], rounded once from the exact product."""
    codes, scales, zeros = unpack_weight(weight)
    levels = codes.unflatten(1, (-1, weight.group_size)) - zeros[..., None]  # [N, K/group_size, group_size]
    return (levels.float() * scales[..., None].float()).flatten(1).to(dtype)


def main() -> None:
    """Shows a group of sixteen weights on its way through the format."""
    weight = torch.tensor([[-0.7, 0.1, 0.2, 1.4, -0.3, 0.0, 0.9, 0.5, -0.2, 0.3, -0.6, 0.8, 0.1, -0.4, 0.6, -0.1]])
    for symmetric in (True, False):
        packed = quantize_reference(weight, group_size=16, symmetric=symmetric)
        words = [f"0x{word & 0xFFFFFFFF:08X}" for word in packed.qweight[:, 0].tolist()]
        print(f"\n{'symmetric' if symmetric else 'asymmetric'}, one group of 16")
        print("  weights    ", " ".join(f"{w:5.2f}" for w in weight[0].tolist()))
        print("  codes      ", " ".join(f"{c:5d}" for c in unpack(packed.qweight, 16)[:, 0].tolist()))
        print("  words      ", " ".join(words), " (a word's first code is its rightmost digit)")
        print(f"  scale, zero {packed.scales.item():.4f}, {int(packed.qzeros.item()) & 0xF}")
        restored = dequantize_reference(packed, torch.float32)
        print("  restored   ", " ".join(f"{w:5.2f}" for w in restored[0].tolist()))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    main()
