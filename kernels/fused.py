"""The parts of a fused decode step: lessons 18 to 21 on a GPU that can run them, and the same in plain torch elsewhere.

A step of a transformer on a few tokens, its residual stream kept in `Stream`:

    embed
    for each block: normed_matmul (query, key, value) -> attend -> add_matmul -> normed_matmul (GELU) -> add_matmul
    score
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.front_door import HAS_TRITON
from kernels.int8 import Int8Weight
from kernels.prepared import BLOCK, PreparedWeight
from kernels.stream import (
    FoldedNorm,
    Layers,
    Mail,
    Parts,
    Stream,
    attend_reference,
    gelu_reference,
    next_power_of_2,
    values,
)

MOST_TOKENS = 8
MOST_SPLITS = 8  # parts of attention that a projection may join: each of its programs loads them all


def can_fuse(weight: object, dtype: torch.dtype, tokens: int) -> bool:
    """Whether lessons 18 to 20 take a weight, in whichever layout it is, where it is, and tokens of `dtype`."""
    if not (HAS_TRITON and isinstance(weight, PreparedWeight) and weight.codes.is_cuda and dtype == torch.float16):
        return False
    # All tokens are in shared memory at once: 8 or 1 of them, rounded up to a power of two of blocks.
    needed = 2 * BLOCK * (1 if tokens == 1 else MOST_TOKENS) * next_power_of_2(weight.blocks)
    device = weight.codes.device
    return (
        tokens <= MOST_TOKENS
        and weight.group_size % BLOCK == 0
        and weight.in_features <= _lesson("k17_few_tokens").MOST_COLUMNS
        and _lesson("common").has_mma(device)
        and needed <= _lesson("common").shared_memory(device)
    )


def embed(
    tokens: Tensor,
    positions: Tensor,
    wte: Tensor | Int8Weight | PreparedWeight,
    wpe: Tensor,
    gamma: Tensor,
    stream: Stream,
) -> None:
    """Begins the stream, see `kernels.k20_step_ends.embed`."""
    if tokens.is_cuda:
        _lesson("k20_step_ends").embed(tokens, positions, wte, wpe, gamma, stream)
    else:
        stream.write(values(wte)[tokens.flatten()].float() + wpe[positions.flatten()].float(), gamma.float())


def normed_matmul(stream: Stream, weight: PreparedWeight, norm: FoldedNorm, eps: float, gelu: bool = False) -> Tensor:
    """LayerNorm, linear layer, GELU, see `kernels.k18_fused_layers.normed_matmul`."""
    if stream.residual.is_cuda:
        return _lesson("k18_fused_layers").normed_matmul(stream, weight, norm, eps, gelu)
    out = _normed_product(stream, values(weight), norm, eps)
    return (gelu_reference(out) if gelu else out).to(torch.float16)


def attend(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor, parts: Parts) -> Tensor:
    """Attention of new tokens over a cache, see `kernels.k19_attention.attend`."""
    if qkv.is_cuda:
        return _lesson("k19_attention").attend(qkv, k, v, positions, parts)
    return attend_reference(qkv, k, v, positions)


def add_matmul(x: Tensor, weight: PreparedWeight, bias: Tensor, stream: Stream, gamma: Tensor) -> None:
    """Linear layer, added to the stream, see `kernels.k18_fused_layers.add_matmul`."""
    if x.is_cuda:
        _lesson("k18_fused_layers").add_matmul(x, weight, bias, stream, gamma)
    else:
        stream.write(stream.residual + x.float() @ values(weight).t() + bias.float(), gamma.float())


def attend_and_add(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    parts: Parts,
    weight: PreparedWeight,
    bias: Tensor,
    stream: Stream,
    gamma: Tensor,
) -> None:
    """`attend`, then `add_matmul`; of a single sequence, the latter joins the parts that the former leaves."""
    batch_size, _, splits, _ = parts.outs.shape
    if qkv.is_cuda and batch_size == 1 and 1 < splits <= MOST_SPLITS and k.shape[3] == BLOCK:
        _lesson("k19_attention").attend_in_parts(qkv, k, v, positions, parts)
        _lesson("k18_fused_layers").add_joined(parts, positions, weight, bias, stream, gamma)
    else:
        add_matmul(attend(qkv, k, v, positions, parts), weight, bias, stream, gamma)


def all_blocks(
    stream: Stream,
    layers: Layers,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    positions: Tensor,
    mail: Mail,
    eps: float,
) -> None:
    """Takes the stream of one token through all blocks, see `kernels.k21_whole_step.all_blocks`."""
    if stream.residual.is_cuda:
        _lesson("k21_whole_step").all_blocks(stream, layers, k, v, positions, mail, eps)
        return
    batch_size, n_head, length, head_size = k[0].shape
    parts = Parts.empty(batch_size, n_head, head_size, length, k[0].device)
    for i in range(len(k)):
        norm_1, norm_2 = (
            FoldedNorm(linears.folded[i], linears.bias[i], layers.gammas[j])
            for linears, j in ((layers.c_attn, 2 * i), (layers.c_fc, 2 * i + 1))
        )
        qkv = normed_matmul(stream, layers.c_attn.weight(i), norm_1, eps)
        proj = layers.attn_proj.weight(i), layers.attn_proj.bias[i]
        attend_and_add(qkv, k[i], v[i], positions, parts, *proj, stream, layers.gammas[2 * i + 1])
        hidden = normed_matmul(stream, layers.c_fc.weight(i), norm_2, eps, gelu=True)
        add_matmul(hidden, layers.mlp_proj.weight(i), layers.mlp_proj.bias[i], stream, layers.gammas[2 * i + 2])


def mail_for(k: Sequence[Tensor], v: Sequence[Tensor]) -> Mail:
    """What `all_blocks` wants for a cache."""
    return Mail.empty(k, v, _lesson("k21_whole_step").programs(k[0].device) if k[0].is_cuda else 1)


def score(stream: Stream, wte: Tensor | Int8Weight | PreparedWeight, norm: FoldedNorm, eps: float) -> Tensor:
    """The last LayerNorm and the output layer: -> logits, float16 [M, V].

    Args:
        stream: of M tokens, at most 8.
        wte: the token embedding [V, C], which is the output layer as well: float16, int8 or int4.
        norm: made for it by `fold_norm`.
        eps: the LayerNorm's.
    """
    if isinstance(wte, PreparedWeight):
        return normed_matmul(stream, wte, norm, eps)
    if isinstance(wte, Int8Weight) and stream.residual.is_cuda:
        return _lesson("k20_step_ends").score(stream, wte, norm, eps)
    return _normed_product(stream, values(wte), norm, eps).to(torch.float16)


def best_tokens(stream: Stream, wte: Tensor | Int8Weight | PreparedWeight, norm: FoldedNorm, eps: float) -> Tensor:
    """The tokens with the best logits: -> int64 [M, 1]. Arguments as in `score`."""
    if isinstance(wte, Int8Weight) and stream.residual.is_cuda:
        return _lesson("k20_step_ends").score_and_pick(stream, wte, norm, eps)[1]
    return score(stream, wte, norm, eps).argmax(-1, keepdim=True)


def _lesson(name: str) -> Any:  # noqa: ANN401
    return importlib.import_module(f"kernels.{name}")  # not before it is needed: there may be no Triton


def _normed_product(stream: Stream, w: Tensor, norm: FoldedNorm, eps: float) -> Tensor:
    x = F.layer_norm(stream.residual, stream.residual.shape[1:], norm.gamma.float(), eps=eps)  # [M, K]
    return F.linear(x.to(w.dtype), w).float() + norm.bias  # [M, N]
