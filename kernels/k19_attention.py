"""Lesson 19: attention of one token over a cache. NEW: programs along the context; the last or the next kernel adds up.

Run it:  python -m kernels.k19_attention --check     (against float64; needs no GPU)
         python -m kernels.k19_attention --bench     (on a GPU)

THE IDEA. A new token asks every key in the cache, and takes the values' weighted mean: for a head, L keys and L values
of 64 numbers. There is one query a head, so nothing to share and no tensor core to fill: it is a matrix-vector product
twice, with a softmax between. GPT-2 124M has 12 heads, an H200 132 multiprocessors. A program a head would leave most
of them idle and walk along the context step by step; so a head gets a program for each 128 positions, or 64 if there
are several sequences (Dao et al. 2023, "Flash-Decoding for long-context inference"):

    head h   | 0..127 | 128..255 | 256..383 | ...     each: scores, their largest, weights, their total, weighted sum
                 |         |          |
                 +---------+----------+               the last one to finish, by a counter, brings the parts to one
                           |                          scale and adds them up; always in this order: the same bits
                          out

Softmax lets itself be cut like that (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"): with
weights exp(score - top) relative to a part's own largest score, sums join as  sum of exp(top_i - top) * part_i. A part
keeps its weighted mean and, as one logarithm, log2 of its weights' sum: what softmax makes of these logarithms are the
parts' shares.

A single sequence's parts, if there are several, are left as they are: the projection behind, lesson 18's kernel, joins
them as it loads x (`share_parts` in row_tiles.py). Each of its programs does so anew and reads eight parts in place of
one x: 26 KB at 1024 positions of GPT-2 XL. In return no program stores, counts and loads once more, each a trip to the
L2 cache.

NEW as well: all keys and values but the newest were written many kernels ago. Their loads go before `gdc_wait`, and
are under way while the kernel ahead is still making query, key and value.

THE PRICE. Bytes: 2 * 64 * 2 a position and head; at 1024 positions 3.1 MB for 12 heads, 0.8 microseconds at 4.2 TB/s.
As in lesson 17 there is a chain: query, scores, largest, total, sum over 128 rows, with a barrier each, 1 microsecond;
and if parts are joined here, a store, a counter and a load, each a trip to the L2 cache: 1.5 more.

MEASURED on an H200 (results/k19_attention.json: command, versions, date), microseconds, parts joined here, in fp32:

    heads, length      12, 128     12, 512     12, 1024    25, 128     25, 512     25, 1024
    one sequence       1.9         3.1         3.5         1.9         3.4         4.6
    eight              2.3         5.8         8.6         3.3         10.9        18.4
    torch, one         19          23          23          20          23          25

torch's own takes a mask, two copies into the cache and its attention kernel, in fp16. Eight sequences of 1024 reach
67 to 69% of the memory's pace; one is all chain, as predicted.
  A whole step (results/attempts.json), microseconds, with parts joined here and joined by the projection:

    position           124 of 128     508 of 512     1020 of 1024
    GPT-2 124M         129  130       152  143       158  159
    GPT-2 medium       278  278       309  287       330  319
    GPT-2 XL           804  799       895  852       930  882

Predicted for XL at 1020: 870. Joining brings what it should, a microsecond a layer; lesson 20's output layer brought 6
microseconds in place of 10. What GPT-2 124M loses at 1020 is not understood. A single part is not left to the
projection: in a cache of 128, at position 104, XL lost 8 microseconds by it, at 124 it won 5.
  Several sequences want smaller programs. Four warps with 128 positions, or two, meet at 20 barriers, and each warp
waits for the slowest; one warp with 64 positions meets nobody, and a multiprocessor has room for twelve such. A step
in parts of 128 positions with four warps (two where there are more than 1024 programs), and of 64 with one
(results/attempts.json; 124M's upper row is lesson 18's, let in at once):

    eight sequences    124M, 512   124M, 1024   medium, 1024   large, 1024   XL, 512   XL, 1024
    of 128             250         286          640            1101          1427      1769
    of 64              230         266          617            1061          1357      1729

Parts of 32 are as good for large and XL, but not for 124M (277). One sequence loses up to 8% by it, and so do eight in
a cache of 128 (124M: 198 in one part, 211 in two). Hence `part_length`. Alone, kernel behind kernel, it gains less: 4
to 8% of another day's times with parts of 128, and loses 6% at 25 heads and 1024 positions.
  Tried and failed (results/attempts.json). A program a head: a step of GPT-2 124M at position 1000 took 226
microseconds, and takes 169. Programs that have nothing to do, and there are many, fetching the MLP's weights into the
L2 cache meanwhile: a step of XL took 970 microseconds, without that 863. A step does not wait for bytes. Programs of
one warp that walk along several steps, so that fewer parts are joined: for eight sequences, 25 heads and 1024 positions
two steps of 32 take 17.0 microseconds for 18.4, four 20.2 (14.5 were predicted), and a decode step of XL then takes
1755 and 1840 for 1741, of 124M 293 and 287 for 268. (Only medium's gains by two steps: 591 for 629.)

NEXT. The step's two ends: where tokens become numbers, and numbers a token (lesson 20). EXERCISE. Of eight
sequences parts are joined here. How many bytes would all programs of XL's projection read together if they did it?
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.stream import BLOCK_L, Parts, attend_reference, part_length


@triton.jit
def attention_kernel(
    qkv_ptr,  # fp16 [B, 3C], the new token's query, key and value
    k_ptr,  # fp16 [B, H, L, D]
    v_ptr,  # fp16 [B, H, L, D]
    positions_ptr,  # int64 [B], where the new token stands
    out_ptr,  # JOIN: fp16 [B, C]
    outs_ptr,  # fp16 [B, H, SPLITS, BLOCK_D]
    logs_ptr,  # fp32 [B, H, SPLITS]
    arrived_ptr,  # int32 [B, H]
    H,
    L,
    scale,  # of the scores, times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SPLITS: tl.constexpr,
    JOIN: tl.constexpr,  # whether the last part to be done joins them all in out, or the next kernel does
    PDL: tl.constexpr,
):
    """A part of the context of one head of one sequence."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    position = tl.load(positions_ptr + b)  # written before the embedding, which waits: see lesson 18
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
        tl.extra.cuda.gdc_launch_dependents()  # not before: see lesson 18
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
    out = (tl.sum(weights[:, None] * v.to(tl.float32), 0) + new) / total  # [BLOCK_D]

    pair = b * H + head
    if splits > 1 or not JOIN:  # NEW
        tl.store(outs_ptr + (pair * SPLITS + split) * BLOCK_D + d, out.to(tl.float16))
        tl.store(logs_ptr + pair * SPLITS + split, top + tl.log2(total))
    if JOIN:
        if splits > 1:  # NEW
            tl.debug_barrier()  # all threads have stored; then the count goes up, and whoever reads it sees the stores
            if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") != splits - 1:
                return
            tl.store(arrived_ptr + pair, 0)  # for the next launch
            part = tl.arange(0, SPLITS)
            there = part < splits
            # .cg: not from this multiprocessor's own cache, which may hold what was there before.
            logs = tl.load(logs_ptr + pair * SPLITS + part, mask=there, other=float("-inf"), cache_modifier=".cg")
            outs_offs = (pair * SPLITS + part)[:, None] * BLOCK_D + d[None, :]
            outs = tl.load(outs_ptr + outs_offs, mask=there[:, None], other=0.0, cache_modifier=".cg")
            shares = tl.exp2(logs - tl.max(logs, 0))  # [SPLITS]
            out = tl.sum(outs.to(tl.float32) * shares[:, None], 0) / tl.sum(shares, 0)
        tl.store(out_ptr + b * C + head * D + d, out.to(out_ptr.dtype.element_ty), mask=in_d)


def attend(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor, parts: Parts) -> Tensor:
    """Writes a new token's key and value into the cache, and attends from it to all up to itself.

    The cache up to there, and `positions`, are read before this kernel waits, while several ahead of it may still be
    running (lesson 18). Between it and whatever wrote them must be a kernel that lets the next one in only behind its
    own wait, such as the embedding or another layer's attention, or one of torch's.

    Args:
        qkv: float16 [B, 3C]: query, key and value of one new token for each sequence, C = H * D.
        k, v: float16 [B, H, L, D], the cache; changed at `positions`.
        positions: int64 [B] (or [B, 1]), where the new tokens stand, below L.
        parts: made for this cache's sizes.

    Returns:
        float16 [B, C].
    """
    out = torch.empty((len(k), k.shape[1] * k.shape[3]), dtype=qkv.dtype, device=qkv.device)
    _launch(qkv, k, v, positions, out, parts)
    return out


def attend_in_parts(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor, parts: Parts) -> None:
    """The same, but leaves its parts as they are in `parts`, for the next kernel to join."""
    _launch(qkv, k, v, positions, None, parts)


def _launch(qkv: Tensor, k: Tensor, v: Tensor, positions: Tensor, out: Tensor | None, parts: Parts) -> None:
    batch_size, heads, length, head_size = k.shape
    block_l, block_d = part_length(batch_size, length), parts.outs.shape[3]
    attention_kernel[(heads, batch_size, common.cdiv(length, block_l))](
        qkv,
        k,
        v,
        positions,
        out,
        *parts,
        heads,
        length,
        math.log2(math.e) / math.sqrt(head_size),
        D=head_size,
        BLOCK_D=block_d,
        BLOCK_L=block_l,
        SPLITS=parts.logs.shape[2],
        JOIN=out is not None,
        num_warps=4 if block_l == BLOCK_L else max(1, block_d // 64),
        **common.early_launch(),
    )


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
    """Times a layer's attention in GPT-2 124M and XL beside torch's, which needs a mask and a copy into the cache."""
    return [
        _bench_layer(batch_size, heads, length)
        for heads in (12, 25)
        for batch_size in (1, 8)
        for length in (128, 512, 1024)
    ]


def _bench_layer(batch_size: int, heads: int, length: int) -> common.Row:
    size = 64
    copies = common.copies_to_fill_cache(4 * batch_size * heads * length * size)
    shape = (batch_size, heads, length, size)
    caches = [tuple(common.random_tensor(*shape, seed=seed) for seed in (i, i + 1)) for i in range(copies)]
    qkv = common.random_tensor(batch_size, 3 * heads * size, seed=9)
    positions = torch.full((batch_size,), length - 1, device=qkv.device)
    parts = Parts.empty(batch_size, heads, size, length, qkv.device)
    fp16 = common.microseconds(attend_reference, [(qkv, k, v, positions) for k, v in caches])
    calls = [(qkv, k, v, positions, parts) for k, v in caches]
    time = common.microseconds(attend, calls)
    floor = common.floor_microseconds(2 * caches[0][0].nbytes)
    return {
        "batch": batch_size,
        "heads": heads,
        "length": length,
        "microseconds": time,
        "in_parts_microseconds": common.microseconds(attend_in_parts, calls),
        "torch_microseconds": fp16,
        "share_of_roofline": floor / time,
    }


if __name__ == "__main__":
    common.run_lesson(check, bench)
