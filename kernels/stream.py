"""The residual stream between the kernels of a decode step, and LayerNorm taken apart so that it fits between them.

    LayerNorm(x) w^T + b  =  ((gamma x) w^T  -  mean (gamma w^T)) / deviation  +  (beta w^T + b)

mean and deviation are x's. So whoever multiplies by w need not know them before it has multiplied: it takes gamma x,
and corrects its sums, a number a row. gamma w^T and beta w^T + b do not depend on x: they are made at load time. And
mean and deviation need no pass over x: each kernel that writes a piece of x leaves the sums of what it wrote.
Attention, which comes between, has its scratch and its reference here as well; and lesson 21, which does all of it in
one kernel, its stacked weights and its mail.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.int8 import Int8Weight, dequantize_int8
from kernels.k00_reference import dequantize_reference
from kernels.prepared import BLOCK, TILE_ROWS, PreparedWeight, restore, row_scales_of

BLOCK_L = 128  # positions of the cache that a program of lesson 19 attends to, if there is one sequence


class Stream(NamedTuple):
    """The residual stream x of M tokens, one row each, with what its readers want.

    Attributes:
        residual: fp32 [M, C], x.
        scaled: fp16 [M, C], x times the weight of the LayerNorm that reads it next.
        sums: fp32 [C/16, M, 2], the sums of x and of its squares over each 16 columns. C is a multiple of 16.
    """

    residual: Tensor
    scaled: Tensor
    sums: Tensor

    @classmethod
    def zeros(cls, m: int, c: int, device: torch.device) -> "Stream":
        """The stream of M tokens and C columns, x = 0."""
        return cls(
            torch.zeros((m, c), device=device),
            torch.zeros((m, c), dtype=torch.float16, device=device),
            torch.zeros((c // TILE_ROWS, m, 2), device=device),
        )

    def write(self, x: Tensor, gamma: Tensor) -> None:
        """Makes x, floating [M, C], the stream, to be read by a LayerNorm with the weight gamma [C]. In plain torch."""
        x = x.float()
        self.residual.copy_(x)
        self.scaled.copy_(x * gamma)
        tiles = x.unflatten(1, (-1, TILE_ROWS))  # [M, C/16, 16]
        self.sums.copy_(torch.stack([tiles.sum(2), tiles.square().sum(2)], 2).transpose(0, 1))


class FoldedNorm(NamedTuple):
    """What a LayerNorm adds to the linear layer behind it.

    Attributes:
        folded: fp32 [N], gamma w^T.
        bias: fp32 [N], beta w^T + b.
        gamma: floating [K], the LayerNorm's weight as it is, for whoever normalises before multiplying.
    """

    folded: Tensor
    bias: Tensor
    gamma: Tensor


def fold_norm(
    weight: Tensor | Int8Weight | PreparedWeight, gamma: Tensor, beta: Tensor, bias: Tensor | None = None
) -> FoldedNorm:
    """Takes a LayerNorm's weight and bias, floating [K], into the linear layer behind it, w [N, K] and bias [N]."""
    w = values(weight)
    bias = torch.zeros(len(w), device=w.device) if bias is None else bias
    return FoldedNorm(w.float() @ gamma.float(), w.float() @ beta.float() + bias.float(), gamma)


def values(weight: Tensor | Int8Weight | PreparedWeight) -> Tensor:
    """The numbers that a weight [N, K] stands for: fp32, or what dtype it has if it is a plain tensor."""
    if isinstance(weight, PreparedWeight):
        return dequantize_reference(restore(weight), torch.float32)
    return dequantize_int8(weight, torch.float32) if isinstance(weight, Int8Weight) else weight


def gelu_reference(x: Tensor) -> Tensor:
    """GELU in the tanh form, GPT-2's: floating [...] -> [...]."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def part_length(batch_size: int, length: int) -> int:
    """Positions that a program of lesson 19 attends to, in a cache of `length`: see there."""
    return BLOCK_L // 2 if batch_size > 1 and length > BLOCK_L else BLOCK_L


class Parts(NamedTuple):
    """Lesson 19's scratch: where the programs of a head leave what they found, for whoever joins it.

    There is room for SPLITS parts, a power of two, at least one for each `part_length` positions of the cache. A part
    has as much to say as its weights add up to.

    Attributes:
        outs: fp16 [B, H, SPLITS, BLOCK_D], the weighted means of values.
        logs: fp32 [B, H, SPLITS], the sums of weights, as logarithms to the base 2.
        arrived: int32 [B, H], how many parts are done; 0 between launches.
    """

    outs: Tensor
    logs: Tensor
    arrived: Tensor

    @classmethod
    def empty(cls, batch_size: int, n_head: int, head_size: int, length: int, device: torch.device) -> "Parts":
        """For a cache of `length` positions."""
        heads = (batch_size, n_head)
        splits = next_power_of_2(-(-length // part_length(batch_size, length)))
        outs = (*heads, splits, next_power_of_2(head_size))
        return cls(
            torch.empty(outs, dtype=torch.float16, device=device),
            torch.empty((*heads, splits), device=device),
            torch.zeros(heads, dtype=torch.int32, device=device),
        )


def attend_reference(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Lesson 19's attention in plain torch, in any dtype: writes the new key and value into k, v [B, H, L, D] too.

    qkv: [B, 3C]; positions: int64 [B]. -> [B, C].
    """
    batch_size, heads, length, head_size = k.shape
    rows = torch.arange(batch_size, device=k.device)
    q, new_k, new_v = qkv.view(batch_size, 3, heads, head_size).unbind(1)  # each [B, H, D]
    k[rows, :, positions.flatten()] = new_k
    v[rows, :, positions.flatten()] = new_v
    seen = torch.arange(length, device=k.device) <= positions.view(-1, 1, 1, 1)  # [B, 1, 1, L]
    out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen)  # [B, H, 1, D]
    return out.reshape(batch_size, heads * head_size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, n at least 1."""
    return 1 << (n - 1).bit_length()


class Linears(NamedTuple):
    """One linear layer of every block: lesson 21 reads those of all blocks from the same few tensors.

    Attributes:
        codes: int16 [n_layer, N/16, K/64, 16, 16], and
        scale_zeros: int32 [n_layer, groups, N], see `kernels.prepared.PreparedWeight`.
        bias: fp32 [n_layer, N]; of a layer behind a LayerNorm what `FoldedNorm` has.
        folded: fp32 [n_layer, N], see `FoldedNorm`; empty of a layer that is not behind a LayerNorm.
        group_size: how many weights along K share a scale and a zero.
    """

    codes: Tensor
    scale_zeros: Tensor
    bias: Tensor
    folded: Tensor
    group_size: int

    def weight(self, layer: int) -> PreparedWeight:
        """A block's weight; codes and scale_zeros are no copies."""
        codes, scale_zeros = self.codes[layer], self.scale_zeros[layer]
        row_scales = row_scales_of(scale_zeros)
        return PreparedWeight(codes, scale_zeros, row_scales, codes.shape[1] * BLOCK, self.group_size)


class Layers(NamedTuple):
    """All blocks of a GPT-2.

    Attributes:
        c_attn, attn_proj, c_fc, mlp_proj: the linear layers.
        gammas: fp32 [2 n_layer + 1, C], the weights of the LayerNorms in their order, the model's last one included.
    """

    c_attn: Linears
    attn_proj: Linears
    c_fc: Linears
    mlp_proj: Linears
    gammas: Tensor


class Mail(NamedTuple):
    """Where lesson 21's programs leave what they made for one another. Twice: a launch that uses one clears the other.

    Attributes:
        halves: int16 [2, n_layer, 10C], fp16 numbers: query, key and value; attention's output; gamma x after it; the
            MLP's inner numbers; gamma x after it.
        words: int32 [2, n_layer, 2C + C/4], fp32 numbers: x and its sums (see `Stream`) after attention and MLP.
        parts: int32 [2, n_layer, H, SPLITS, 128], fp32 numbers: attention to a part of the context, and its weight.
        turns: int32 [programs], how many launches each program has seen.
        distances: int64 [n_layer, 2], how far each layer's keys and values are from the first's keys, in 16 bytes.
    """

    halves: Tensor
    words: Tensor
    parts: Tensor
    turns: Tensor
    distances: Tensor

    @classmethod
    def empty(cls, k: Sequence[Tensor], v: Sequence[Tensor], programs: int) -> "Mail":
        """For a cache, tensors [1, H, L, D], and as many programs; nothing has been sent."""
        _, n_head, length, head_size = k[0].shape
        device, n_layer, c = k[0].device, len(k), n_head * head_size
        places = [[tensor.data_ptr() - k[0].data_ptr() for tensor in pair] for pair in zip(k, v, strict=True)]

        def absent(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            """Mail of this shape, twice and for each block, that nobody has written: all -1."""
            return torch.full((2, n_layer, *shape), -1, dtype=dtype, device=device)

        return cls(
            absent(10 * c, dtype=torch.int16),
            absent(2 * c + c // 4),
            absent(n_head, next_power_of_2(-(-length // BLOCK_L)), 2 * head_size),
            torch.zeros(programs, dtype=torch.int32, device=device),
            torch.tensor(places, device=device) // 16,
        )
