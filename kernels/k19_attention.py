"""Lesson 19: attention of one token over a cache. NEW: programs along the context, and the last one to finish adds up.

TEXT
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.stream import BLOCK_L, Parts, attend_reference

WARPS = 4


@triton.jit
def attention_kernel(
    qkv_ptr,  # fp16 [B, 3C], the new token's query, key and value
    k_ptr,  # fp16 [B, H, L, D]
    v_ptr,  # fp16 [B, H, L, D]
    positions_ptr,  # int64 [B], where the new token stands
    out_ptr,  # fp16 [B, C]
    outs_ptr,  # fp32 [B, H, SPLITS, BLOCK_D]
    tops_ptr,  # fp32 [B, H, SPLITS]
    totals_ptr,  # fp32 [B, H, SPLITS]
    arrived_ptr,  # int32 [B, H]
    H,
    L,
    scale,  # of the scores, times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A part of the context of one head of one sequence."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    position = tl.load(positions_ptr + b)  # written two kernels ago at least: no need to wait
    row = split * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    seen = row < position
    cache = (b * H + head).to(tl.int64) * L * D
    # All but the new token's key and value have been in the cache for long.
    offs = cache + row[:, None] * D + d[None, :]
    mask = seen[:, None] & in_d[None, :]
    k = tl.load(k_ptr + offs, mask=mask, other=0.0)  # [BLOCK_L, BLOCK_D]
    v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    splits = tl.maximum(tl.cdiv(position, BLOCK_L), 1)
    if split >= splits:
        return

    C = H * D
    token_ptr = qkv_ptr + b * 3 * C + head * D + d  # [BLOCK_D]
    q = tl.load(token_ptr, mask=in_d, other=0.0).to(tl.float32) * scale
    scores = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))  # [BLOCK_L]
    top = tl.max(scores, 0)
    if split == 0:  # the new token sees itself
        new_k = tl.load(token_ptr + C, mask=in_d, other=0.0)
        new_v = tl.load(token_ptr + 2 * C, mask=in_d, other=0.0)
        tl.store(k_ptr + cache + position * D + d, new_k, mask=in_d)
        tl.store(v_ptr + cache + position * D + d, new_v, mask=in_d)
        new_score = tl.sum(new_k.to(tl.float32) * q, 0)
        top = tl.maximum(top, new_score)
        new_weight = tl.exp2(new_score - top)
        new = new_weight * new_v.to(tl.float32)
    else:
        new_weight = 0.0
        new = tl.zeros((BLOCK_D,), tl.float32)
    weights = tl.exp2(scores - top)  # [BLOCK_L], at most 1
    total = tl.sum(weights, 0) + new_weight
    out = tl.sum(weights[:, None] * v.to(tl.float32), 0) + new  # [BLOCK_D]

    if splits > 1:  # NEW
        pair = b * H + head
        tl.store(outs_ptr + (pair * SPLITS + split) * BLOCK_D + d, out)
        tl.store(tops_ptr + pair * SPLITS + split, top)
        tl.store(totals_ptr + pair * SPLITS + split, total)
        tl.debug_barrier()  # all threads have stored; then the count goes up, and whoever reads it sees the stores
        if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(arrived_ptr + pair, 0)  # for the next launch
        part = tl.arange(0, SPLITS)
        there = part < splits
        # .cg: not from this multiprocessor's own cache, which may hold what was there before.
        tops = tl.load(tops_ptr + pair * SPLITS + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(totals_ptr + pair * SPLITS + part, mask=there, other=0.0, cache_modifier=".cg")
        outs_offs = (pair * SPLITS + part)[:, None] * BLOCK_D + d[None, :]
        outs = tl.load(outs_ptr + outs_offs, mask=there[:, None], other=0.0, cache_modifier=".cg")
        shrink = tl.exp2(tops - tl.max(tops, 0))  # [SPLITS]
        total = tl.sum(totals * shrink, 0)
        out = tl.sum(outs * shrink[:, None], 0)
    tl.store(out_ptr + b * C + head * D + d, (out / total).to(out_ptr.dtype.element_ty), mask=in_d)


def attend(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor, parts: Parts) -> Tensor:
    """Writes a new token's key and value into the cache, and attends from it to all up to itself.

    Args:
        qkv: float16 [B, 3C]: query, key and value of one new token for each sequence, C = H * D.
        k, v: float16 [B, H, L, D], the cache; changed at `positions`.
        positions: int64 [B] (or [B, 1]), where the new tokens stand, below L.
        parts: made for this cache's sizes.

    Returns:
        float16 [B, C].
    """
    batch_size, heads, length, head_size = k.shape
    out = torch.empty((batch_size, heads * head_size), dtype=qkv.dtype, device=qkv.device)
    splits = parts.tops.shape[2]
    attention_kernel[(heads, batch_size, triton.cdiv(length, BLOCK_L))](
        qkv,
        k,
        v,
        positions,
        out,
        parts.outs,
        parts.tops,
        parts.totals,
        parts.arrived,
        heads,
        length,
        math.log2(math.e) / math.sqrt(head_size),
        D=head_size,
        BLOCK_D=parts.outs.shape[3],
        BLOCK_L=BLOCK_L,
        SPLITS=splits,
        num_warps=WARPS,
        **common.early_launch(),
    )
    return out


def check() -> Iterator[common.Check]:
    """Attention, and what it wrote to the cache, against float64; twice, as the counters must be 0 again."""
    for heads, size, length, at in ((3, 64, 300, (0, 299)), (2, 20, 130, (128, 5)), (25, 64, 1024, (700, 1023))):
        k, v = (common.random_tensor(2, heads, length, size, seed=seed) for seed in (1, 2))
        parts = Parts.empty(2, heads, size, length, k.device)
        for turn in range(2):
            positions = torch.tensor(at, device=k.device) - turn * min(1, min(at))
            qkv = common.random_tensor(2, 3 * heads * size, seed=3 + turn)
            k64, v64 = k.double(), v.double()
            expected = attend_reference(qkv.double(), k64, v64, positions)
            error = common.relative_error(attend(qkv, k, v, positions, parts), expected)
            written = torch.equal(k.double(), k64) and torch.equal(v.double(), v64)
            what = f"{heads} heads of {size} at {positions.tolist()} of {length}, relative error {error:.1e}"
            yield what, written and error < common.tolerance(torch.float16)


def bench() -> list[common.Row]:
    raise NotImplementedError


if __name__ == "__main__":
    common.run_lesson(check, bench)
