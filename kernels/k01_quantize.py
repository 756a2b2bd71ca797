"""Lesson 1: quantize and pack a weight in one pass. NEW: a Triton kernel, a reduction over a tile, bits.

Run it:  python -m kernels.k01_quantize --check     (against lesson 0; needs no GPU)
         python -m kernels.k01_quantize --bench     (on a GPU)

THE IDEA. In plain torch each step of quantizing (maximum, scale, divide, round, clamp, shift, or) reads the weight
from memory and writes it back. One kernel that keeps a tile of the weight in registers reads each number once.

THE PRICE, before any code. An 8192 x 8192 fp16 weight is 134.2 MB to read; at group size 64 its codes are 33.6 MB to
write, scales 2.1 MB and zeros 0.5 MB: 170.4 MB in all. The arithmetic is a few operations a weight, nothing beside
that. At 4.2 TB/s, what a plain copy reaches on an H200, the floor is 40 microseconds.

THE SEARCH costs no more bytes. `search` tries 32 ranges a group and keeps the best (lesson 0); the tile is in
registers already, so it is paid in arithmetic alone, where plain torch would read the weight 32 more times.

WHO READS WHAT. A program owns BLOCK_N rows and, along K, GROUPS groups of GROUP_SIZE:

              K = in_features, contiguous in memory
         +----------------------------------------------+
         |          | group | group |                   |
       N |  . . . . |#######|#######|  BLOCK_N rows     |     reads   [BLOCK_N, GROUPS, GROUP_SIZE] weights
         |          |   one program |                   |     writes  [GROUPS * GROUP_SIZE / 8, BLOCK_N] words
         +----------------------------------------------+

A row of the tile is contiguous when read (along K) and its words are contiguous when written across rows (along N):
the tile is transposed on the way, through shared memory, which Triton arranges by itself.

MEASURED on an H200 (results/k01_quantize.json: command, versions, date): 49 microseconds at group size 64, 82% of a
plain copy's bandwidth, symmetric or not; 81% to 85% for groups of 16 to 128. Groups of 4096 and whole rows of 8192
reach 51% and 42%: a program's eight rows then fill the registers, and nothing else runs while they load. The search
takes 1.4 milliseconds, all arithmetic, most of it the float64 sums that make its choice the same on every machine.
  Predicted: 45 microseconds, the floor and a little. The first version took 88 (results/attempts.json): not bytes but
instructions were the limit. A division, a floor and a conversion to an integer for every weight are slow
instructions; ROUND below and one division a group brought 53.
  A surprise: the last 4 microseconds came from programs of a single warp. Packing the zeros adds up eight rows; in
one warp that needs no barrier at which the others wait.

NEXT. Lesson 2 goes the other way. EXERCISE. Large groups: walk along K in two passes, the second one from the cache,
instead of holding whole groups in registers. What do you predict for 8192, and what do you measure?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.k00_reference import (
    CODES_PER_WORD,
    MAX_SCALE,
    MIN_SCALE,
    SEARCH_STEP,
    SEARCH_STEPS,
    QuantizedWeight,
    check_weight,
    quantize_reference,
)

MIN_SCALE_ = tl.constexpr(MIN_SCALE)
MAX_SCALE_ = tl.constexpr(MAX_SCALE)
SEARCH_STEP_ = tl.constexpr(SEARCH_STEP)


# NEW: rounding without a rounding instruction, which a GPU issues at an eighth of the rate of an addition. Near
# 1.5 * 2^23 neighbouring floats are 1.0 apart, so adding that number rounds to a whole one (halves to even, as
# torch.round does), which then stands in the lowest bits of the sum.
ROUND = tl.constexpr(1.5 * 2**23)
# Eight such sums, each moved to its nibble, bring the bits of ROUND itself along; those always add up to this.
EIGHT_ROUNDS = tl.constexpr(sum(0x4B400000 << 4 * nibble for nibble in range(8)) & 0xFFFFFFFF)


@triton.jit
def choose_scales_tile(below, above, shrink, SYMMETRIC: tl.constexpr):
    """Lesson 0's `choose_scales`: how far each group reaches below and above 0.0 -> scale fp16, 1/scale, zero fp32."""
    if SYMMETRIC:
        step = tl.maximum(tl.maximum(below, above) * (1 / 8.5), tl.minimum(below, above) * (1 / 7.5))
    else:
        step = (below + above) * (1 / 15)
    scale = tl.minimum(tl.maximum(step * shrink, MIN_SCALE_), MAX_SCALE_).to(tl.float16)
    if SYMMETRIC:
        scale = tl.where(above > below, -scale, scale)
    inverse = tl.div_rn(1.0, scale.to(tl.float32))  # as IEEE rounds it; plain `/` may be off in the last bit
    if SYMMETRIC:
        zero = tl.full(below.shape, 8.0, tl.float32)
    else:
        zero = (tl.minimum(below * shrink * inverse, 15.0) + ROUND) - ROUND
    return scale, inverse, zero


@triton.jit
def rounded_codes_tile(w, inverse, zero):
    """Lesson 0's `encode`, on a tile: fp32 [N, G, I] with [N, G] inverses and zeros -> codes 0..15, plus ROUND."""
    share = w * (inverse * (1 / 15))[:, :, None] + (zero * (1 / 15))[:, :, None]
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)  # costs nothing: the addition before it can saturate
    return share * 15.0 + ROUND


@triton.jit
def squared_error_tile(w, scale, inverse, zero):
    """Lesson 0's `squared_error`, on a tile: -> fp64 [N, G]. Weights of 0.0, such as padding, have no error."""
    levels = rounded_codes_tile(w, inverse, zero) - (zero + ROUND)[:, :, None]
    error = (w - levels * scale.to(tl.float32)[:, :, None]).to(tl.float64)
    return tl.sum(error * error, axis=2)


@triton.jit
def quantize_kernel(
    w_ptr,  # fp16, bf16 or fp32 [N, K]
    qweight_ptr,  # int32 [K/8, N]
    scales_ptr,  # fp16 [K/GROUP_SIZE, N]
    qzeros_ptr,  # int32 [K/GROUP_SIZE, ceil(N/8)]
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # GROUP_SIZE rounded up to a power of two: Triton's tiles have no other sizes
    GROUPS: tl.constexpr,  # groups a program handles
    BLOCK_N: tl.constexpr,  # rows a program handles, a multiple of 8
    SYMMETRIC: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # 1: the whole range and nothing else
):
    """Quantizes and packs a tile of BLOCK_N rows by GROUPS groups."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS], counted along K
    offs_i = tl.arange(0, GROUP_BLOCK)  # [GROUP_BLOCK], inside a group
    n_groups = K // GROUP_SIZE

    # The tile, once, into registers. What lies outside reads as 0.0, which widens no range: ranges include 0.0.
    offs_k = offs_g[:, None] * GROUP_SIZE + offs_i[None, :]  # [GROUPS, GROUP_BLOCK]
    mask = ((offs_g < n_groups)[:, None] & (offs_i < GROUP_SIZE)[None, :])[None, :, :] & (offs_n < N)[:, None, None]
    w = tl.load(w_ptr + offs_n.to(tl.int64)[:, None, None] * K + offs_k[None, :, :], mask=mask, other=0.0)
    w = w.to(tl.float32)  # [BLOCK_N, GROUPS, GROUP_BLOCK]

    # NEW: a reduction. Each group's range, its scale and its zero.
    below = tl.maximum(-tl.min(w, axis=2), 0.0)  # [BLOCK_N, GROUPS]
    above = tl.maximum(tl.max(w, axis=2), 0.0)
    scale, inverse, zero = choose_scales_tile(below, above, 1.0, SYMMETRIC)
    if SEARCH_STEPS > 1:
        best_error = squared_error_tile(w, scale, inverse, zero)
        for step in range(1, SEARCH_STEPS):
            new_scale, new_inverse, new_zero = choose_scales_tile(below, above, 1.0 - step * SEARCH_STEP_, SYMMETRIC)
            error = squared_error_tile(w, new_scale, new_inverse, new_zero)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            scale = tl.where(better, new_scale, scale)
            inverse = tl.where(better, new_inverse, inverse)
            zero = tl.where(better, new_zero, zero)

    # NEW: packing. Eight neighbours move to their nibbles; their sum is their bitwise or, as no two overlap.
    codes = rounded_codes_tile(w, inverse, zero).to(tl.int32, bitcast=True)
    nibbles = tl.reshape(codes, [BLOCK_N, GROUPS, GROUP_BLOCK // 8, 8]) << (4 * tl.arange(0, 8))
    words = tl.sum(nibbles, axis=3) - EIGHT_ROUNDS  # [BLOCK_N, GROUPS, GROUP_BLOCK/8]
    offs_j = tl.arange(0, GROUP_BLOCK // 8)
    offs_row = offs_g[:, None] * (GROUP_SIZE // 8) + offs_j[None, :]  # [GROUPS, GROUP_BLOCK/8], row of qweight
    word_mask = ((offs_g < n_groups)[:, None] & (offs_j < GROUP_SIZE // 8)[None, :])[None, :, :]
    word_mask = word_mask & (offs_n < N)[:, None, None]
    qweight_ptrs = qweight_ptr + offs_row.to(tl.int64)[None, :, :] * N + offs_n[:, None, None]
    tl.store(qweight_ptrs, words, mask=word_mask)

    group_mask = (offs_g < n_groups)[None, :] & (offs_n < N)[:, None]  # [BLOCK_N, GROUPS]
    tl.store(scales_ptr + offs_g[None, :] * N + offs_n[:, None], scale, mask=group_mask)

    # The zeros pack along N, across rows; rows past the end count as 0.
    zero = tl.where((offs_n < N)[:, None], zero, 0.0).to(tl.int32)
    zero_nibbles = tl.reshape(zero, [BLOCK_N // 8, 8, GROUPS]) << (4 * tl.arange(0, 8))[None, :, None]
    zero_words = tl.sum(zero_nibbles, axis=1)  # [BLOCK_N/8, GROUPS]
    offs_z = tl.program_id(0) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    zero_mask = (offs_g < n_groups)[None, :] & (offs_z < tl.cdiv(N, 8))[:, None]
    tl.store(qzeros_ptr + offs_g[None, :] * tl.cdiv(N, 8) + offs_z[:, None], zero_words, mask=zero_mask)


SEGMENT = 128  # weights along K that a program handles, if its groups are not longer
TILE = 2048  # weights that a program handles, about
WEIGHTS_PER_THREAD = 64


def launch_options(group_size: int) -> dict[str, int]:
    """Block sizes and warps, from the three numbers above; at least eight rows, whose zeros share a word."""
    group_block = triton.next_power_of_2(group_size)
    groups = max(1, SEGMENT // group_block)
    block_n = max(8, TILE // (groups * group_block))
    warps = block_n * groups * group_block // (32 * WEIGHTS_PER_THREAD)
    return {
        "GROUP_BLOCK": group_block,
        "GROUPS": groups,
        "BLOCK_N": block_n,
        "num_warps": max(1, min(16, warps)),
    }


def quantize(weight: Tensor, group_size: int, symmetric: bool = False, search: bool = False) -> QuantizedWeight:
    """Quantizes a weight to int4 in one pass; arguments, result and errors are those of `quantize_reference`.

    Args:
        weight: float16, bfloat16 or float32 [N, K], finite, on a GPU (or on a CPU, in Triton's interpreter).
        group_size: divides K, multiple of 16.
    """
    check_weight(weight, group_size)
    weight = weight.contiguous()
    n, k = weight.shape
    packed = QuantizedWeight(
        qweight=torch.empty((k // CODES_PER_WORD, n), dtype=torch.int32, device=weight.device),
        scales=torch.empty((k // group_size, n), dtype=torch.float16, device=weight.device),
        qzeros=torch.empty((k // group_size, triton.cdiv(n, 8)), dtype=torch.int32, device=weight.device),
    )
    options = launch_options(group_size)
    grid = (triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(k // group_size, options["GROUPS"]))
    quantize_kernel[grid](
        weight,
        *packed,
        n,
        k,
        GROUP_SIZE=group_size,
        SYMMETRIC=symmetric,
        SEARCH_STEPS=SEARCH_STEPS if search else 1,
        enable_fp_fusion=False,  # a * b + c rounds twice, as in lesson 0: a fused one would change a code now and then
        **options,
    )
    return packed


def check() -> Iterator[common.Check]:
    """The kernel's codes, scales and zeros against lesson 0's: equal bit for bit."""
    for n, k, group_size in [(40, 256, 64), (17, 384, 96), (8, 1600, 1600)]:
        weight = common.random_tensor(n, k, seed=n)
        for symmetric in (True, False):
            for search in (False, True):
                ours = quantize(weight, group_size, symmetric, search)
                reference = quantize_reference(weight, group_size, symmetric, search)
                equal = all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
                yield f"{n} x {k}, {group_size=}, {symmetric=}, {search=}", equal


def bench() -> list[common.Row]:
    """Times an 8192 x 8192 fp16 weight for several group sizes, beside the time its bytes allow."""
    n = k = 8192
    weights = [common.random_tensor(n, k, seed=seed) for seed in range(3)]
    rows = []
    for group_size in (16, 32, 64, 128, 256, 1024, 4096, 8192):
        for symmetric, search in [(True, False), (False, False), (False, True)]:
            packed = quantize(weights[0], group_size, symmetric, search)
            n_bytes = 2 * n * k + sum(t.numel() * t.element_size() for t in packed)
            time = common.microseconds(quantize, [(w, group_size, symmetric, search) for w in weights])
            rows.append(
                {
                    "n": n,
                    "k": k,
                    "group_size": group_size,
                    "symmetric": symmetric,
                    "search": search,
                    "microseconds": time,
                    "gigabytes_per_second": n_bytes / time / 1000,
                    "share_of_copy": common.floor_microseconds(n_bytes) / time,
                }
            )
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
