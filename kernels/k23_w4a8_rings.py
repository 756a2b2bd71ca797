"""Lesson 23: W4A8 for few tokens and many. NEW: int8 products from two rings, for layers of every size.

Run it:  python -m kernels.k23_w4a8_rings --check     (against float64; needs a Hopper GPU, H100 or H200)
         python -m kernels.k23_w4a8_rings --bench

THE IDEA. Lesson 15 has lesson 12's weakness: tiles for thousands of tokens, and codes and scales that its warps fetch
themselves. It never took less than 12 microseconds. Here lesson 22's machinery does lesson 13's arithmetic: a producer
warp has the copy engine fill a ring of x8 and a ring of codes and scales, the latter ahead of the launch before. Two
warpgroups make operands and multiply, in one of two ways:

    rows of their own    128 rows by 128 or 256 tokens: each makes 64 rows, and never minds the other
    sharing K            64 rows by 16 to 128 tokens: each takes every second step, and finishes half of the tokens

NEW: a step is four blocks, 256 columns. A warpgroup makes the operand of one block while the tensor cores still
multiply the one before, so it waits for barriers a quarter as often. Row scales do not depend on x: each thread reads
those of its two rows before anything else, and makes each group's scale a multiple of them when it comes (multiples
worked out once for a weight were no faster: results/attempts.json). The scales of tokens and the biases are fetched by
the producer, while the last products run: nothing waits for memory after them.

THE PRICE. 8192 x 8192, 512 tokens: 128 programs of 128 x 256 x 8192 products, 65,536 clocks of a multiprocessor's
tensor cores: 37 microseconds. Each reads 2 MB of x8 and 0.5 MB of weight, from the L2 cache all but the first time:
330 MB, 45 microseconds at 7 to 8 TB/s. Operands: 84 instructions of each scheduler for a block of 64 x 64, 168 for two
warpgroups in 512 clocks. With 128 tokens that is 168 in 256, with 64 more instructions than clocks. The pass over x:
2 bytes read and 1 written a number, 10 microseconds for 2048 x 8192, and never less than a launch, 1.6.

WHO READS WHAT. Lesson 15's operands from lesson 22's boxes. A step in shared memory:

    x8        two boxes [BLOCK_M, 128], 128 bytes a row, swizzled as wgmma wants them; a block is half a box's columns
    codes     one box int16 [4, rows / 16, 256]: a warpgroup's 64 rows of a block lie together
    scales    one box int32 [groups, rows], as in lesson 22

Blocks past the end of K, rows past the end of N and tokens past the end of M read as zeros.

MEASURED on an H200, all passes counted (results/k23_w4a8_rings.json: command, versions, date; group size 128),
microseconds (times fp16); under it lesson 15 or, up to 64 tokens, lesson 13, both with this lesson's pass over x, and
from before their loops made scale / row_scale (results/attempts.json):

    N x K        512x2048      2048x2048     8192x2048     2048x8192     8192x8192
    M = 1        4.1 (1.37)    4.4 (1.38)    6.1 (1.77)    6.7 (2.11)   16.0 (2.39)
                11.5          11.7          12.2                        37.2
    M = 16       4.4 (1.30)    4.7 (1.30)    6.7 (1.58)    7.0 (1.98)   16.6 (2.05)
                11.2          11.5          12.0          34.7          36.3
    M = 128      4.9 (1.20)    6.0 (1.11)    8.8 (1.31)   10.8 (1.43)   20.5 (1.82)
                12.2          12.4          13.3          37.0          39.1
    M = 512      5.6 (1.14)    8.1 (1.13)   18.4 (1.41)   19.9 (1.44)   50.5 (1.85)
                12.2          12.8          21.9          37.7          69.5
    M = 2048     9.6 (0.92)   18.5 (1.33)   64.6 (1.50)   58.6 (1.54)    192 (2.03)
                14.1          24.6          84.6          74.9           304

Predicted were 5.4, 7.5, 17, 20, 62 at 512 tokens and 8, 15, 65, 58, 215 at 2048: 8192 x 8192 turned out better, the
other large ones about as predicted, the small ones worse. (Measured right behind other large products the last cell was
242: an H200 lowers its clock rate then, and now rests before each measurement, `common.py`.) Group size 64 costs up to
1% more. In small layers the floor is not bytes: at 512 tokens of 512 x 2048 the product alone took 5.2 of what were
5.8 then, and a kernel that does next to nothing takes 1.6.
  Which tile? The first rule took the largest that made 100 programs or more. But 80 programs of 128 x 128 are one round
of an H200's 132 multiprocessors, and 160 of 64 x 128 are two. All tiles but the lowest, for 20 layers and 128 to 8192
tokens, unsplit (results/attempts.json, "every tile"): a round of 8192 columns takes about 50, 31, 21, 15 and 14.5
microseconds, from the largest tile down, and fewer columns, though they take more than their share of that, rank the
tiles alike. So `launch_options` adds up rounds. Over some 120 problems that is 0.2% slower than the best tile in the
mean and 6% at worst, where the first rule was 11% slower in the mean and 71% at worst: 1024 tokens of 1280 x 1280 take
8.8 microseconds for 13.4, 2048 of 768 x 3072 16.8 for 21.3.
  A surprise: fewer bytes were slower. 256 rows x 128 tokens read a fifth less than 128 rows x 256 tokens, and took 61
and 62 microseconds where those, beside them, took 51 (8192 x 8192, 512 tokens): every operand then serves half the
products.
  A trap: rings so small that two programs fit on a multiprocessor. Probably those that the pass over x leaves first get
two programs each, and others none: 128 tiles of 128 x 64 took 15.1 microseconds, with larger rings 11.2 (2048 x 2048,
512 tokens). Hence rings of more than half the shared memory, whether needed or not.
  Tried and failed (results/attempts.json): two warpgroups as one partition of eight warps, in step with each other: 5
to 7% slower with tiles of 256 tokens; lesson 15 was right to let each go its own way. Four warpgroups, 256 rows by 128
tokens: 232 microseconds where the others took 195. The pass over x could let this kernel's programs in before its own
turn has come: 0.8 to 1.0 microseconds saved where x is small, and 6 to 13 lost with 2048 x 8192 numbers, so it does
where x is small. The product itself lets the next kernel in behind its own wait; before it, nothing changes. Nor does
it pay to give a stage back a product earlier, or at the step's end, or to fetch the next step's codes earlier (9.6 for
9.6, 9.7 for 9.5, 9.7 for 9.6 with 128 tokens of 8192 x 2048). Where parts are added up, that launch now lets the next
kernel in at once: 11.3 for 12.6 with 128 tokens of 2048 x 8192.
  With 256 tokens the assembler has no registers left to see a product through the loop's end: it would wait behind
every one (its message C7512). There a step's last product is waited for; the other warpgroup has the tensor cores
meanwhile. Without that need, not to wait gains 3 to 6%.

  Where did a warpgroup's time go with 512 tokens of 2048 x 2048? By ncu's samples of one launch alone, 23% was the
start, 6% waiting for codes, 17% for x8, 29% the loop's instructions, 7% waiting for the other's sums, and 18% the end,
where the other warpgroup had nothing to do. Since then each finishes half of the tile (`exchange`), and the sums lie in
shared memory so that no two threads of a warp want one bank (`spread`): 8.1 for 9.1 microseconds, 8.25 predicted. With
16 tokens there is little to share, and one more wait: 16.6 for 16.0 (8192 x 8192).

NEXT. Small layers. Clocks of the same kernel, nanoseconds since the kernel before it ended: the pass over x has its
turn after 770, and has stored x8 after 2560; the product has its turn after 3070 and the first x8 after 3850, takes 950
for four blocks, and is done after 7240; the sums are exchanged by 7870, everything is stored by 8420. Meanwhile each
multiprocessor takes in 85 to 90 bytes a nanosecond; a kernel that does nothing else takes in 125
(results/attempts.json), so it is not bytes that it waits for. Probably it is operands: 237 nanoseconds a block, more
than 400 clocks, one after the other, where a block's products take 128 clocks and its 84 instructions could be issued
in as many. Would several blocks' operands, made side by side, wait less? EXERCISE. Let the product's programs quantize
the tokens themselves: who would find a token's largest number, and how often would x be read? Say first for which of
the shapes above it could pay.
"""

import functools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import common
from kernels.activations import quantize_activations
from kernels.parts import add_up, parts_with_work
from kernels.prepared import BLOCK, PreparedWeight, prepare
from kernels.rings import describe_swizzled, describe_weight, fetch_weight, load_tile, plain_plane, spread
from kernels.row_tiles import invert, make_operand

TOLERANCE = 0.02  # relative error, as in lesson 13
ROWS = gl.constexpr(64)  # what a warpgroup's wgmma makes
WIDE = gl.constexpr(4)  # blocks of a step
# Rows and tokens of a tile -> steps in the ring of x8 and in the weight's, and about how many microseconds a round of
# such programs, one on each multiprocessor, takes of 8192 columns. Where the warpgroups share K, with 64 rows, both
# rings are even: or a slot would change hands, and who never waited for the other's delivery would take the parity of
# its barrier for that of its own.
TILES = {
    (128, 256): (2, 4, 50.0),
    (128, 128): (4, 4, 31.0),
    (64, 128): (4, 6, 21.0),
    (64, 64): (4, 6, 15.0),
    (64, 32): (8, 14, 14.5),
    (64, 16): (8, 16, 14.0),
}


@gluon.constexpr_function
def even(group_size):
    """Whether steps and groups tile one another."""
    return WIDE.value * 64 % group_size == 0 or group_size % (WIDE.value * 64) == 0


@gluon.constexpr_function
def groups_of(group_size):
    """Groups that a step reads, at most."""
    return max(1, WIDE.value * 64 // group_size) if even(group_size) else 2


@gluon.constexpr_function
def accumulator(tokens, depth):
    """How the sums of a warpgroup's products, `depth` columns each, lie; Triton issues int8 ones up to 128 wide."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(tokens, 128), depth])


@gluon.jit
def fetch_factors(factors, factor_ptrs, row, tile, M, N, HAS_BIAS: gl.constexpr):
    """The scales of the program's tokens, and its biases, into shared memory."""
    token_scales, biases, fetched = factors
    token_scales_ptr, bias_ptr = factor_ptrs
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tokens = gl.minimum(row + gl.arange(0, token_scales.shape[0], layout=layout), M - 1)
    token_scales.store(gl.load(token_scales_ptr + tokens))
    if HAS_BIAS:
        rows = gl.minimum(tile * biases.shape[0] + gl.arange(0, biases.shape[0], layout=layout), N - 1)
        biases.store(gl.load(bias_ptr + rows).to(gl.float32))
    mbarrier.arrive(fetched, count=1)


@gluon.jit
def producer(fetching, x_ring, weight_ring, factors, given, HAS_BIAS: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """One warp, which keeps both rings full."""
    x_desc, codes_desc, words_desc, factor_ptrs = fetching
    _, _, pid_m, tile, first, steps, M, N = given
    row = pid_m * x_desc.block_type.shape[0]
    x_tiles, full, empty = x_ring
    STAGES: gl.constexpr = full.shape[0]
    BOXES: gl.constexpr = WIDE // 2  # of x8, a step
    SLOTS: gl.constexpr = weight_ring[0].shape[0]
    for step in range(gl.minimum(steps, SLOTS)):
        fetch_weight(codes_desc, words_desc, weight_ring, tile, step, (first + step) * WIDE, GROUP_SIZE)
    gdc_wait()  # whoever has seen a tile of x8 may also write: the memory may have been another's until here
    gdc_launch_dependents()
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), BOXES * x_desc.block_type.nbytes)
        for i in gl.static_range(BOXES):
            column = ((first + step) * BOXES + i) * 128
            load_tile(x_desc, [row, column], full.index(stage), x_tiles.index(stage * BOXES + i))
        ahead = step - STAGES + SLOTS  # the stage is empty, so step - STAGES is done with its slot, too
        if (ahead >= SLOTS) & (ahead < steps):
            fetch_weight(codes_desc, words_desc, weight_ring, tile, ahead, (first + ahead) * WIDE, GROUP_SIZE)
    fetch_factors(factors, factor_ptrs, row, tile, M, N, HAS_BIAS)


@gluon.jit
def multiply(
    x_ring,
    weight_ring,
    row_scales,
    first,
    steps,
    GROUP_SIZE: gl.constexpr,
    SHARE_K: gl.constexpr,
    WHICH: gl.constexpr,
):
    """w8 x8^T by a warpgroup, of its rows and all steps or, if they share K, every second step: int32 [64, BLOCK_M]."""
    SHARES: gl.constexpr = 2 if SHARE_K else 1
    TEAMS: gl.constexpr = 1 if SHARE_K else 2
    TEAM: gl.constexpr = 0 if SHARE_K else WHICH
    SHARE: gl.constexpr = WHICH if SHARE_K else 0
    x_tiles, x_full, x_empty = x_ring
    codes, words, weight_full = weight_ring
    STAGES: gl.constexpr = x_full.shape[0]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    SLOTS: gl.constexpr = codes.shape[0]
    GROUPS: gl.constexpr = words.shape[1]
    # One block after another, as the products want them: the same bytes.
    code_blocks = codes._reinterpret(gl.int16, [SLOTS * WIDE * TEAMS, ROWS // 16, 256], plain_plane(16))
    word_groups = words._reinterpret(gl.int32, [SLOTS * GROUPS * TEAMS, 1, ROWS], plain_plane(32))
    mma8: gl.constexpr = accumulator(BLOCK_M, 32)
    left16: gl.constexpr = gl.DotOperandLayout(0, accumulator(BLOCK_M, 16), 2)
    left8: gl.constexpr = gl.DotOperandLayout(0, mma8, 4)
    inverses = gl.convert_layout(invert(row_scales), gl.SliceLayout(1, left16), assert_trivial=True)
    LOOK_AHEAD: gl.constexpr = BLOCK_M < 256  # there are registers left to see a product through the loop's end
    gl.assume(steps >= SHARES)  # or the assembler would wait after each product: see lesson 22
    acc = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_M], gl.int32, mma8))
    for step in range(SHARE, steps, SHARES):
        slot = step % SLOTS
        stage = step % STAGES
        mbarrier.wait(weight_full.index(slot), step // SLOTS & 1)
        half_words = ()  # of all the step's blocks at once
        for j in gl.static_range(WIDE):
            of_block = code_blocks.index((slot * WIDE + j) * TEAMS + TEAM).reshape([ROWS, 16])
            half_words += (of_block.load(left16),)
        block = (first + step) * WIDE
        scale_zeros = ()
        for j in gl.static_range(WIDE):
            if even(GROUP_SIZE):
                group = j * GROUPS // WIDE
            else:  # a group may begin anywhere in the step
                group = (block + j) * 64 // GROUP_SIZE - block * 64 // GROUP_SIZE
            of_group = word_groups.index((slot * GROUPS + group) * TEAMS + TEAM).reshape([ROWS])
            scale_zeros += (of_group.load(gl.SliceLayout(1, left16)),)
        for j in gl.static_range(WIDE):
            w8 = make_operand(half_words[j], scale_zeros[j], inverses, left16, left8)
            if j == 0:
                mbarrier.wait(x_full.index(stage), step // STAGES & 1)
            x8 = x_tiles.index(stage * (WIDE // 2) + j // 2).slice(j % 2 * 64, 64, dim=1)
            # The assembler keeps other hands off w8's registers until the product is waited for.
            acc = warpgroup_mma(w8, x8.permute([1, 0]), acc, is_async=True)
            if LOOK_AHEAD or j > 0:
                acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))  # the product before this one is done
            if LOOK_AHEAD and j == 0:  # and with it the step before
                mbarrier.arrive(x_empty.index((step + STAGES - SHARES) % STAGES), count=1, pred=step >= SHARES)
        if not LOOK_AHEAD:
            acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(acc,)))
            mbarrier.arrive(x_empty.index(stage), count=1)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def exchange(acc, handed_over, WHICH: gl.constexpr):
    """Of two warpgroups' sums of the same tile, int32 [ROWS, BLOCK_M]: half of the tokens each, [ROWS, BLOCK_M / 2]."""
    sums, there = handed_over
    HALF: gl.constexpr = acc.shape[1] // 2
    layout: gl.constexpr = accumulator(HALF, 32)
    first, second = acc.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
    mine = gl.convert_layout(first if WHICH == 0 else second, layout, assert_trivial=True)
    others = gl.convert_layout(second if WHICH == 0 else first, layout, assert_trivial=True)
    sums.index(1 - WHICH).store(others)
    mbarrier.arrive(there.index(1 - WHICH), count=1)
    mbarrier.wait(there.index(WHICH), 0)
    return mine + sums.index(WHICH).load(layout)


@gluon.jit
def store(acc, row_scales, factors, out_ptr, first_row, first_token, part_of_tile, M, N, HAS_BIAS: gl.constexpr):
    """Writes int32 [ROWS, tokens], scaled, + bias to out, 8 neighbours along N a thread: 16 bytes.

    part_of_tile: where in the tile it lies, rows and tokens. A part, fp32, goes out as it lies in the registers, as in
    lesson 22.
    """
    token_scales, biases, fetched = factors
    ROW: gl.constexpr = part_of_tile[0]
    TOKEN: gl.constexpr = part_of_tile[1]
    TOKENS: gl.constexpr = acc.shape[1]
    mma: gl.constexpr = acc.type.layout
    mbarrier.wait(fetched, 0)
    scales = token_scales.slice(TOKEN, TOKENS).load(gl.SliceLayout(0, mma))
    out = acc.to(gl.float32) * scales[None, :] * row_scales[:, None]
    if HAS_BIAS:
        out += biases.slice(ROW, ROWS).load(gl.SliceLayout(1, mma))[:, None]
    IS_PART: gl.constexpr = out_ptr.dtype.element_ty == gl.float32
    layout: gl.constexpr = mma if IS_PART else gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), layout)
    offs_n = first_row + ROW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_m = first_token + TOKEN + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + offs_m.to(gl.int64)[None, :] * N + offs_n[:, None]
    gl.store(out_ptrs, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@gluon.jit
def warpgroup(
    x_ring,
    weight_ring,
    handed_over,
    factors,
    given,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    SHARE_K: gl.constexpr,
    WHICH: gl.constexpr,
):
    """One of two: multiplies, and writes what is its own; if they share K, half of the tokens each."""
    out_ptr, row_scales_ptr, pid_m, tile, first, steps, M, N = given
    BLOCK_M: gl.constexpr = x_ring[0].shape[1]
    ROW: gl.constexpr = 0 if SHARE_K else WHICH * ROWS
    TOKEN: gl.constexpr = WHICH * BLOCK_M // 2 if SHARE_K else 0
    first_row = tile * weight_ring[1].shape[2]
    of_rows: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_M, 32))
    rows = gl.minimum(first_row + ROW + gl.arange(0, ROWS, layout=of_rows), N - 1)
    row_scales = gl.load(row_scales_ptr + rows)
    acc = multiply(x_ring, weight_ring, row_scales, first, steps, GROUP_SIZE, SHARE_K, WHICH)
    if SHARE_K:
        acc = exchange(acc, handed_over, WHICH)
        row_scales = gl.convert_layout(row_scales, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    part_of_tile: gl.constexpr = (ROW, TOKEN)
    store(acc, row_scales, factors, out_ptr, first_row, pid_m * BLOCK_M, part_of_tile, M, N, HAS_BIAS)


@gluon.jit
def w4a8_rings_kernel(
    x_desc,  # int8 [M, 64 * blocks], read in tiles [BLOCK_M, 128]; what lies outside reads as 0
    codes_desc,  # int16 [blocks, N/16, 256], in tiles [WIDE, HEIGHT / 16, 256]
    words_desc,  # int32 [groups, N], in tiles [groups_of(GROUP_SIZE), HEIGHT]: scale_zeros
    token_scales_ptr,  # fp32 [M]
    row_scales_ptr,  # fp32 [N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]; with SPLIT_K > 1 fp32 [SPLIT_K, M, N]
    M,
    N,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring of x
    SLOTS: gl.constexpr,  # of the weight's ring: at least STAGES
):
    """Makes a part of a tile [BLOCK_M, HEIGHT] of x @ w^T + bias."""
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    HEIGHT: gl.constexpr = words_desc.block_type.shape[1]
    SHARE_K: gl.constexpr = HEIGHT == ROWS
    SHARES: gl.constexpr = 2 if SHARE_K else 1
    GROUPS: gl.constexpr = groups_of(GROUP_SIZE)
    tile = gl.program_id(0)
    pid_m = gl.program_id(1)
    part = gl.program_id(2)

    # Whole rounds of steps; those past the end of K multiply zeros.
    all_steps = gl.cdiv(blocks, WIDE)
    most = gl.cdiv(all_steps, SPLIT_K * SHARES) * SHARES
    first = part * most
    steps = gl.maximum(gl.minimum(gl.cdiv(all_steps - first, SHARES) * SHARES, most), SHARES)

    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * WIDE // 2, BLOCK_M, 128], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int16, [SLOTS, WIDE, HEIGHT // 16, 256], codes_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [SLOTS, GROUPS, HEIGHT], words_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(x_full.index(stage), count=1)
        mbarrier.init(x_empty.index(stage), count=1 if SHARE_K else 2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(weight_full.index(slot), count=1)
    handed_over = ()
    if SHARE_K:
        there = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for which in gl.static_range(2):
            mbarrier.init(there.index(which), count=1)
        sums = gl.allocate_shared_memory(gl.int32, [2, ROWS, BLOCK_M // 2], spread(BLOCK_M // 2))
        handed_over = (sums, there)
    fetched = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(fetched, count=1)
    fence_async_shared()  # the copy engine must see the barriers

    x_ring = (x_tiles, x_full, x_empty)
    weight_ring = (codes, words, weight_full)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    factors = (
        gl.allocate_shared_memory(gl.float32, [BLOCK_M], vector),
        gl.allocate_shared_memory(gl.float32, [HEIGHT], vector),
        fetched,
    )
    given = (out_ptr + part.to(gl.int64) * M * N, row_scales_ptr, pid_m, tile, first, steps, M, N)
    fetching = (x_desc, codes_desc, words_desc, (token_scales_ptr, bias_ptr))
    # The accumulators of 256 tokens take 128 registers a thread. The producer leaves the warpgroups all but 24 of its
    # own then; else everyone keeps what they began with, as no one can have 256.
    FULL: gl.constexpr = BLOCK_M == 256
    gl.warp_specialize(
        [
            (warpgroup, (x_ring, weight_ring, handed_over, factors, given, HAS_BIAS, GROUP_SIZE, SHARE_K, 0)),
            (warpgroup, (x_ring, weight_ring, handed_over, factors, given, HAS_BIAS, GROUP_SIZE, SHARE_K, 1)),
            (producer, (fetching, x_ring, weight_ring, factors, given, HAS_BIAS, GROUP_SIZE)),
        ],
        [4, 1],  # warps of the last two, and their registers
        [224 if FULL else 256, 24 if FULL else 256],
    )


@functools.lru_cache(maxsize=4096)  # every launch asks
def launch_options(m: int, n: int, k: int, multiprocessors: int = common.H200) -> Mapping[str, int]:
    """The tiles whose rounds together take the least time; but for the lowest, no more than half of them empty."""
    pairs = common.cdiv(k, 2 * BLOCK * WIDE.value)  # of steps, one for each warpgroup; a part has whole ones
    best = math.inf
    options: dict[str, int] = {}
    for (rows, tokens), (stages, slots, microseconds) in TILES.items():
        if tokens >= 2 * max(m, 16):
            continue
        tiles = common.cdiv(n, rows) * common.cdiv(m, tokens)
        split = 1
        # Programs share K where tokens are few. A part is 2048 columns long or longer.
        while tokens <= 64 and 2 * split * tiles <= multiprocessors and 2 * split * 2048 <= k:
            split *= 2
        split = parts_with_work(pairs, split)
        time = common.cdiv(tiles * split, multiprocessors) * microseconds / split
        if time < best:
            best = time
            options = {"ROWS": rows, "BLOCK_M": tokens, "SPLIT_K": split, "STAGES": stages, "SLOTS": slots}
    return options


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias with an int4 weight and int8 activations, summed exactly in int32; the same bits every time.

    Args:
        x: float16 or bfloat16 [..., K], on a Hopper GPU; quantized to int8 on the way, a scale a token.
        weight: of [N, K]; group size a multiple of 64.
        bias: floating [N].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape, dtype, group size or device that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight, bias)
    common.check_group_size(weight, BLOCK)
    common.check_hopper(x)
    x_2d = x.reshape(-1, k).contiguous()
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out.view(*x.shape[:-1], n)
    x8, token_scales = quantize_activations(x_2d)
    options = dict(launch_options(m, n, k, common.multiprocessors(x.device)))
    rows, tokens, split = options.pop("ROWS"), options.pop("BLOCK_M"), options["SPLIT_K"]
    parts = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else out
    w4a8_rings_kernel[(common.cdiv(n, rows), common.cdiv(m, tokens), split)](
        describe_swizzled(x8, (tokens, 128)),
        *describe_weight(weight.codes, weight.scale_zeros, WIDE.value, groups_of(weight.group_size), rows),
        token_scales,
        weight.row_scales,
        bias,
        parts,
        m,
        n,
        weight.blocks,
        HAS_BIAS=bias is not None and split == 1,
        GROUP_SIZE=weight.group_size,
        num_warps=4,
        launch_pdl=n % 4 == 0,  # else the words are copied first, and may not be read ahead
        **options,
    )
    if split > 1:
        add_up(parts, bias, out)
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, where there is a Hopper GPU."""
    if not common.is_hopper(common.DEVICE):
        yield "wgmma needs a Hopper GPU (H100, H200), and this machine has none", None
        return
    shapes = [
        (1, 40, 512, 64),
        (130, 200, 1600, 320),
        (70, 2048, 8192, 128),
        (300, 4096, 4096, 128),
        (513, 1000, 2048, 64),
    ]
    yield from common.check_matmul(matmul, prepare, shapes, TOLERANCE)


SHAPES = ((512, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (8192, 8192))  # N, K


def bench() -> list[common.Row]:
    """Times five layers, 1 to 2048 tokens, beside torch's own fp16 matmul."""
    return common.bench_layers(matmul, prepare, SHAPES, (1, 16, 64, 128, 256, 512, 1024, 2048), 128)


if __name__ == "__main__":
    common.run_lesson(check, bench)
