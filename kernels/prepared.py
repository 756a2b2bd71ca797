"""The layout that the fast kernels read: made from the file's format when a model is loaded, never saved.

The same codes, scales and zeros, in another order. From lesson 6 on the kernels read it, and lesson 6 says why it is
faster. The weight is cut into tiles of 16 rows by 64 columns, 512 bytes each, which follow one another along K:

    codes  int16 [N/16, K/64, 16, 16]      row n's 64 codes from column 64 b on: codes[n // 16, b, n % 16], 32 bytes

so that a warp which reads a tile, or several side by side, reads one run of bytes; memory likes that best. A row of a
tile is 16 half-words:

    half-word j                  bits  0-3      4-7      8-11     12-15
                                 code  k = j    16 + j   32 + j   48 + j          (k counted from the tile's start)

So the lowest nibbles of a row's half-words are its codes 0..15, in order, the next nibbles its codes 16..31, and so
on: masking and shifting whole tiles of half-words yields *slices* of 16 neighbours along K, which is just what one
tensor-core instruction multiplies.

    scale_zeros  int32 [groups, N]   a group's scale, fp16, in the low 16 bits; in the high ones fp16 1024 + zero

Why 1024: a nibble put under the bits of fp16's 1024.0, 0x6400, *is* the fp16 number 1024 + code, with no conversion.
Subtracting 1024 + zero leaves code - zero, exactly. One 4-byte word a group, as hardware copies nothing narrower
than 4 bytes from memory to shared memory on its own.

    row_scales   fp32 [N]            the largest |w| that a row's codes allow, / 127: for 8-bit activations (lesson 13)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.k00_reference import QuantizedWeight, pack_weight, unpack_weight

BLOCK = 64  # columns of a tile
TILE_ROWS = 16
SLICE = 16  # codes of a slice
ONE_KILO = 1024  # fp16 has steps of 1 from here to 2048


class PreparedWeight(NamedTuple):
    """A weight of [out_features, in_features] = [N, K] in the layout above.

    Attributes:
        codes: int16 [ceil(N/16), ceil(K/64), 16, 16]. Codes past the end of N and of K are 0.
        scale_zeros: int32 [ceil(64 * ceil(K/64) / group_size), N]. Scales past the end of K are 0.
        row_scales: float32 [N].
        in_features: K.
        group_size: how many weights along K share a scale and a zero.
    """

    codes: Tensor
    scale_zeros: Tensor
    row_scales: Tensor
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        """N."""
        return self.scale_zeros.shape[1]

    @property
    def blocks(self) -> int:
        """How many tiles of 64 columns cover K, the last one perhaps only partly used."""
        return self.codes.shape[1]


def prepare(weight: QuantizedWeight) -> PreparedWeight:
    """Rearranges a weight for the fast kernels, on its own device. `restore` is the exact inverse."""
    n, k, group_size = weight.out_features, weight.in_features, weight.group_size
    tiles, blocks = -(-n // TILE_ROWS), -(-k // BLOCK)
    chosen, _, zeros = unpack_weight(weight)
    codes = torch.zeros((tiles * TILE_ROWS, blocks * BLOCK), dtype=torch.int16, device=chosen.device)
    codes[:n, :k] = chosen
    half_words = torch.zeros((tiles, blocks, TILE_ROWS, SLICE), dtype=torch.int16, device=codes.device)
    for nibble, part in enumerate(codes.view(tiles, TILE_ROWS, blocks, 4, SLICE).unbind(3)):
        half_words |= part.transpose(1, 2) << (4 * nibble)

    words = _bits(zeros.t() + ONE_KILO) << 16 | _bits(weight.scales)  # [K/group_size, N]
    scale_zeros = torch.zeros((-(-blocks * BLOCK // group_size), n), dtype=torch.int32, device=codes.device)
    scale_zeros[: len(words)] = words
    return PreparedWeight(half_words, scale_zeros, row_scales_of(scale_zeros), k, group_size)


def row_scales_of(scale_zeros: Tensor) -> Tensor:
    """A weight's `row_scales`, float32 [N], from its `scale_zeros` [groups, N]."""
    scales = (scale_zeros & 0xFFFF).to(torch.int16).view(torch.float16).float()
    zeros = (scale_zeros >> 16).to(torch.int16).view(torch.float16).float() - ONE_KILO
    # A code lies at most max(zero, 15 - zero) steps from its zero. Where there is no group the scale is 0.
    return (scales.abs() * torch.maximum(zeros, 15 - zeros)).amax(0) / 127


def restore(weight: PreparedWeight) -> QuantizedWeight:
    """The weight in the file's format again."""
    n, k = weight.out_features, weight.in_features
    rows = weight.codes.int().transpose(1, 2)  # [N/16, 16, K/64, 16]
    nibbles = [(rows >> (4 * nibble)) & 0xF for nibble in range(4)]
    codes = torch.stack(nibbles, dim=3).flatten(2).flatten(0, 1)[:n, :k]  # [N, K]
    words = weight.scale_zeros[: k // weight.group_size]
    scales = (words & 0xFFFF).to(torch.int16).view(torch.float16)
    zeros = (words >> 16).to(torch.int16).view(torch.float16).int() - ONE_KILO
    return pack_weight(codes, scales.t(), zeros.t())


def _bits(numbers: Tensor) -> Tensor:
    """The 16 bits of each number as fp16, in an int32."""
    return numbers.to(torch.float16).contiguous().view(torch.int16).int() & 0xFFFF
