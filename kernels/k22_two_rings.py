"""Lesson 22: sixteen to five hundred tokens. NEW: the weight comes by the copy engine too, from a ring of its own.

Run it:  python -m kernels.k22_two_rings --check     (against float64; needs a Hopper GPU, H100 or H200)
         python -m kernels.k22_two_rings --bench

THE IDEA. Lesson 12 was made for thousands of tokens. For 128 its tiles are too large: 8192 x 2048 has 64 of them for
132 multiprocessors, and each fills all the registers, so that the next kernel's programs find no room until it has
ended. Lesson 17 was made for a handful, and asks for the whole weight before it knows x. Here the two are put together,

    tiles       64 rows of out^T by 16 to 128 tokens: for most layers 64 to 256 programs
    two rings   in shared memory, filled by the copy engine (TMA): one for x, as in lesson 12; one for the codes and
                scales, 6 to 24 blocks of 64 columns deep, which the producer warp fills before it waits (`gdc_wait`)
    registers   hold a step of the weight and its operands, no more: where tiles are many, two programs fit

    kernel ahead   ...........................|
    producer       |codes 0|1|2| ... |7|      |x0|x1|x2|x3|   |x4, codes 8| ...
    warpgroup                                    |deq 0|deq 1| ...
    tensor cores                                       | wgmma 0 | wgmma 1 | ...

so that the next kernel's programs move in while this one computes, and have their weight when it ends.

One barrier fewer than one would think: whoever is done with a stage of x is done with that step's codes, so the
producer that waits for the one may refill the other. Some tiles (`RINGS`) spare one more: the weight lies in x's ring,
and a barrier counts both deliveries. With two, the first operands can be made while x is on its way.

THE PRICE. 8192 x 2048, 128 tokens: 128 programs, 64 x 128 x 2048 products each, 8192 clocks of a multiprocessor's
tensor cores, 4.7 microseconds. Each program reads all of x, 0.5 MB, from the L2 cache: 64 MB together, 8 to 11
microseconds at 6 to 8 TB/s. So 9 or 10, where lesson 12 takes 14.8 and fp16 11.4.
  With few tokens there is another price. A step is a chain: wait for the barriers, fetch the codes from shared memory,
make operands of them, start the products. A block of 64 columns at a time takes 400 to 500 clocks however few tokens
there are, and 8192 columns are 128 of them. So a step has two blocks, and four where rows are long and tokens few: the
machine code has 84 instructions a block in place of 100, a quarter of the barriers, and a block takes 110 clocks.

WHO READS WHAT. A block of a row tile is 512 bytes in one piece (kernels.prepared), a program's 64 rows are four of
them, and one order to the copy engine brings all that a step reads, as a box of three dimensions:

    x        [WIDE, tokens, 64] of [K/64, M, 64]           as wgmma reads it, swizzled
    codes    int16 [WIDE, 4, 256] of [K/64, N/16, 256]     a block is [64, 16], the left operand of lesson 12: by one
                                                           ldmatrix of four matrices a warp
    scales   int32 [its groups, 64] of [groups, N]         each thread two: of rows r and r + 8

Blocks past the end of K, and rows past the end of N, read as zeros: the copy engine's doing. They add zeros.

Where a multiprocessor has a single program with few tokens, one warpgroup is too slow: it waits for its own loads. Two
share K then, a step each in turn, and the second one's sums go through shared memory to the first. (Each ring has an
even number of steps for them, so that each has slots of its own. A barrier shows no more than whether the number of
deliveries is odd or even. In a slot that changed hands, one would miss a delivery, and take the next for the last.)
Where there are few tiles, programs share K as in lesson 12, and `parts.py` adds up: as many as there is room for, with
512 columns or so for each (`parts_of`).

MEASURED on an H200 (results/k22_two_rings.json: command, versions, date; group size 128), microseconds (times fp16):

    N x K           512x2048     2048x2048     8192x2048     2048x8192     8192x8192
    M = 16        2.9 (1.95)    3.5 (1.71)    4.9 (2.17)    5.9 (2.33)   13.0 (2.61)
    M = 32        3.1 (1.88)    3.3 (1.83)    5.0 (2.18)    6.5 (2.19)   15.3 (2.27)
    M = 64        2.9 (1.98)    4.0 (1.55)    6.9 (1.70)    7.9 (1.81)   20.0 (1.85)
    M = 128       3.5 (1.71)    4.6 (1.46)    8.5 (1.36)   10.6 (1.46)   28.2 (1.33)
    M = 256       3.9 (1.52)    6.2 (1.07)   13.8 (1.09)   16.0 (1.33)   49.9 (1.05)
    M = 512       4.4 (1.45)    8.1 (1.12)   26.5 (0.98)   26.0 (1.15)    101 (0.93)

The best of the lessons before took, with 128 tokens, 5.1, 9.3, 14.8, 19.7 and 40.6 (results/attempts.json); with 16,
18.7 of 8192 x 8192. Large layers with hundreds of tokens are not its: the front door leaves them to lessons 11 and 12.
The last column goes with the clock rate: 16 tokens took 12.5 to 14.8 microseconds on one day, 13.0 to 13.9 after the
rest that `common.py` gives the GPU since 2026-11-24, and most numbers below are from before that. So where those of
8192 x 8192 lie closer than a tenth, they may be of two clock rates.

Steps of one block took 20.8 microseconds for 16 tokens of 8192 x 8192, 9.4 of 2048 x 8192 and 5.8 of 8192 x 2048; for
longer ones 11.5, 6.0 and 4.2 were predicted. So the chain was a third of it, where rows are long. What is left? Leave
out one thing at a time, and see what it had cost (sums wrong, times right; another day's, results/attempts.json):

                          whole    no operands made   no x loaded   no weight loaded   weight in the L2 cache
    16, 8192 x 8192       14.4          15.0             14.0            13.0                  13.8
    16, 8192 x 2048        5.7           4.4              5.1             4.4                   4.9
    128, 8192 x 2048       9.0           7.7              8.5             8.7                   9.0

With long rows, nothing: neither bytes nor instructions nor waits (a third warpgroup that shares K takes 14.0 where two
take 14.4). NVIDIA's profiler, ncu, agrees. Of what they could, the memory moves 44%, the L2 cache 48%, and the
schedulers issue 38% (16 tokens; with 128 28, 37 and 26%; launches alone, with cold caches, of 17 and 29 us). So ask the
other way about: let each warpgroup read a clock before and behind each wait, and store it (results/attempts.json).
Clocks, means of all programs, with rings of 4 and 8 steps, as they were:

                          codes there?   fetch them,       x there?   products,      turn to   kernel's end
                                         first operands               operands       first x   to next turn
    16, 8192 x 8192            98             191            400         659           1136      0.65 us
    16, 8192 x 2048           100             194            139         736            739      0.57 us
    16, 2048 x 8192            91             206            102         653           4098      2.2 us, add_up between
    128, 8192 x 2048          106             154             53         104            789      0.75 us

    x came late, once      A barrier that need not be waited for takes 85 clocks. But at steps 6 to 9 of 0 to 31,
                           8192 x 8192, x let them wait for up to 2,200, some 3,000 in all. By then the next kernel's
                           programs had moved in, had asked for 8 steps of weight each, and x stood in line behind
                           them. Rings twice as long end that, but leave no room for the next kernel, and have x wait
                           behind this kernel's own weight: 3,700 clocks to the first x. Shorter ones it is: 6 steps
                           in both rings take 13.6 microseconds where 4 and 8 take 15.5, and 5.3 for 5.6 at 8192 x 2048.
    two waits a step       cost 85 clocks more than one. In one ring, with one barrier for x and weight, side by side:
                           12.7 for 13.2 (16 tokens of 8192 x 8192; predicted 0.3 less), 14.1 for 14.6 (32), 25.9 for
                           27.1 (512 of 2048 x 8192). Short rows are for it and against it: 3.9 for 4.1 (16 of
                           6400 x 1600), but 5.0 for 4.7 (8192 x 2048) and 4.8 for 4.4 (1600 x 6400 in five parts). And
                           512 of 2048 x 2048 gain nothing, 8.0 for 8.0, where 7.1 was predicted.
    the parts' sum         kept the next kernel's programs out until its own turn had come; so their weight came late.
                           Now it lets them in at once: 6.5 for 7.9 (16 tokens of 2048 x 8192), 12.0 for 13.6 (128).
    128 tokens             have one warpgroup do it all in a row, 465 clocks a block where the products take 256. Steps
                           of two blocks: 351. And it should have the multiprocessor to itself, as in lesson 23: 3 and 4
                           steps in the rings, which leave no room for a second program, take 8.6 microseconds, 3 and 3,
                           which do, 9.8 (ALONE; 8192 x 2048). Perhaps it is not the second program: dealing them out
                           evenly, 132 of them, changes little (9.1 for 9.1 with 512 tokens of 2048 x 2048, 7.3
                           predicted; 12.0 for 12.5 and, alone, 10.2 for 10.7 with 128 of 2048 x 8192), and a weight
                           that is asked for a step later comes later, too. Four parts of 2048 x 8192, not two: 10.8.

And two things that no clock told (results/attempts.json; the times before and after, side by side):

    parts                  had 2048 columns or more. But to add them up costs about a microsecond, and so do 20 blocks.
                           In parts of 512 columns 16 tokens of 768 x 3072 take 2.9 microseconds for 4.9, of 1600 x 6400
                           4.5 for 6.7, and 128 tokens of that 8.5 for 14.0. Being spared less than 1024 columns does
                           not pay (1280 x 1280 in two: 3.2 for 2.9). 128 tokens have more to add up: parts of 1024
                           (2048 x 2048 in four parts of 512: 6.1 for 5.3).
    short rows             of 8192 x 2048 are eight steps of four blocks, four for each warpgroup; and the first cannot
                           begin before all of its four are there. Steps of two blocks (SHORT): 4.7 for 5.3 with 16
                           tokens, 5.0 for 6.0 with 32. Long rows are faster with four (13.4 for 14.8, 16 tokens of
                           8192 x 8192), and so are 32 tokens in parts (6.7 for 8.5, 2048 x 8192), we do not know why.
                           Long rows with 128 tokens, a multiprocessor to each program, want rings of 5 steps or more
                           (28.8 for 31.6, 8192 x 8192), short ones 3 and 4.

  And a line (`spread`): the second warpgroup's sums lie in shared memory so that no two threads of a warp want one
bank. 32 tokens take 2 to 4% less (3.4 for 3.5 at 2048 x 2048), 64 up to 3%, 16 nothing: rows of 16 were already
spread over twice as many banks as rows of 32.

  A surprise, still with one block a step: what counts is not bytes. Tiles of 128 rows x 64 tokens carry a third fewer
of them, weight and x, through the L2 cache than 64 x 128 (8192 x 2048, 128 tokens: 52 MB instead of 77), and took 11.2
microseconds where those took 9.8. Nor is it the number of programs: at 2048 x 2048 and 128 tokens 64 of them with 64
tokens took 6.0, 128 with 32 tokens 6.5. With steps of two blocks, and two warpgroups in each program, that turned
round: 5.4 and 4.5, 512 tokens of 512 x 2048 5.8 and 4.4. Where it makes 256 programs of 128 it did not: 1024 tokens of
that 5.8 and 7.2.
  Tried and failed (results/attempts.json). The next step's codes in registers before the wait: 5.3 for 5.8 at
8192 x 2048 and 16 tokens, but 16.9 for 15.3 at 8192 x 8192. With one block a step, 8192 x 2048: each program starting
elsewhere along K, so that not all ask for the same tile of x at once: 10.9 for 9.8, though a division more a block is
part of that; deeper rings and one program a multiprocessor: 8.8 for 5.8 at 16 tokens; 128 rows a program: 11.2 and 7.4;
256 rows: 18.3 at 128 tokens.
  Scales after the product, as in lesson 17: 73 instructions a block in place of 81, with 16 tokens and groups of 128.
But then the sums of one group must wait in registers while those of the next are made, and round the loop's end. Either
the assembler waits behind every product, or, where the compiler saw no harm in copying such sums, they were copied
before they were there, and a third of the result was wrong; nor was it faster (14.2 for 14.2 at 8192 x 8192).
  mma.sync, lesson 17's instruction, in place of wgmma, with 16 tokens: 15.4 for 13.6 at 8192 x 8192 (11 to 11.5 was
predicted), 4.7 for 5.3 at 8192 x 2048; with four warpgroups that share K 14.3 and 5.5 (12 and 4.5). Either takes 13
clocks of a multiprocessor for 64 x 16 x 16 products, so this is not what the kernel waits for. Sums of their own for
each 16 columns, so that no product need wait for the one before: no faster. To give a stage of x back before the wait
for a product, not after it: no faster, with 128 tokens up to 0.3 slower. To let the next kernel in before its own wait,
as lesson 18 does: 12.4 for 9.2 with 128 tokens of 8192 x 2048; not until all of its own tiles are ordered: 13.8 for
13.6, and up to 4 more elsewhere. Two warpgroups that share K with 128 tokens: 9.9 for 8.8. The next operands made
before the wait for the product before last, so that two products are under way: 9.1 for 9.0 (7.3 predicted), and wrong
sums. 132 programs in place of 128, so that the next kernel's are dealt out evenly: 5.3 for 5.3 (4.9). To give a stage
back at a step's end, where one of three waits of the whole warpgroup for itself falls away (Triton puts them around
`arrive`): 13.8 for 13.2, and 8.1 for 8.0 with 512 tokens of 2048 x 2048. Each of two warpgroups that share K to finish
half of the tokens, as in lesson 23: 14.1 for 13.5 with 16 tokens of 8192 x 8192, no more than 2% either way with 64.
Before the wait, an order for a tile of x that is not there, so that the copy engine has read x's description: 5.0 for
4.9, and 8.7 for 8.1.
  Parts that meet in pairs inside the kernel, the first to arrive leaving its sums for the second, in place of a launch
that adds them up. 2048 x 8192: 8.6 for 7.7 with 16 tokens and four parts, 11.4 for 9.3 with 64, and 12.5 for 13.5 with
128 and two (6.6 and 11.7 predicted). A meeting, through the L2 cache, takes longer than a kernel that is started early.
  Three traps. If the loop might have no step, the assembler may find accumulators that no product has written, and puts
a wait behind every product (its message C7515). Hence the `assume`. The same where registers go from the producer to
two partitions (C7512): there, nobody's are moved. And each barrier's initialization is followed by a wait for the
whole block: rings of 8 and 32 steps had 48 of them, half a microsecond before the first order.

NEXT. Two programs of a cluster that share x's tiles ("multicast") would halve what comes from the L2 cache: Triton 3.6
has no word for it, 3.7 has. EXERCISE. Of the 84 instructions, 16 take the zeros away. Let the codes be 1024 + code in
the product, and subtract 1024 + zero times the sum of x from the result. How many digits does that cost, and whose?
"""

import functools
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
from kernels.parts import add_up, parts_with_work
from kernels.prepared import BLOCK, PreparedWeight, prepare
from kernels.rings import describe_swizzled, describe_weight, fetch_weight, load_tile, plain_plane, spread
from kernels.row_tiles import unpack

ROWS = gl.constexpr(64)  # outputs a program: what one warpgroup's wgmma makes
# Warpgroups that share K, and tokens a program -> blocks of a step, and steps in the ring of x and in the weight's.
# No steps in the weight's: it lies in x's ring, and its deliveries are told to x's barriers.
RINGS = {
    (2, 16): (4, 6, 0),
    (2, 32): (4, 6, 0),
    (2, 64): (2, 6, 8),
    (1, 16): (4, 3, 5),
    (1, 32): (2, 4, 8),
    (1, 64): (2, 4, 8),
    (1, 128): (2, 3, 3),
}
SHORT = (2, 8, 8)  # the same for two warpgroups and up to 32 tokens, where a program's rows are short
ALONE = (2, 3, 4)  # and for 128 tokens, if each program may have a multiprocessor: then no second one fits beside it
ALONE_LONG = (2, 5, 0)  # where its rows are long
FEWEST_PROGRAMS = {128: 75, 64: 64, 32: 64, 16: 1}  # tokens a program -> with fewer programs, lower tiles are faster


@gluon.constexpr_function
def unroll_of(wide):
    """Steps in the loop's body: two products are under way, the registers of one, then of the other."""
    return 2 if wide == 1 else 1


@gluon.constexpr_function
def groups_of(wide, group_size):
    """Groups that a step of `wide` blocks reads."""
    return max(1, wide * 64 // group_size)


@gluon.constexpr_function
def plane_of(height, dtype):
    """How wgmma wants a block of x, [height, 64], to lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([height, 64], dtype)


@gluon.jit
def dequantize(half_words, words, DTYPE: gl.constexpr, layout: gl.constexpr):
    """int16 [ROWS, 16] and the rows' scale_zeros [ROWS] -> DTYPE [ROWS, 64], a left operand: as in lesson 12."""
    scale = gl.expand_dims((words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True), 1)
    zero = gl.expand_dims((words >> 16).to(gl.int16).to(gl.float16, bitcast=True), 1)  # 1024 + zero
    c0, c1, c2, c3 = unpack(half_words)
    even = gl.join((c0 - zero) * scale, (c2 - zero) * scale)  # [ROWS, 16, 2]: slices 0 and 2
    odd = gl.join((c1 * 0.0625 - (zero - 960.0)) * scale, (c3 * 0.0625 - (zero - 960.0)) * scale)
    w = gl.join(even, odd).permute([0, 2, 3, 1]).reshape([ROWS, 64])  # k = 32 (pair) + 16 (odd) + j
    return gl.convert_layout(w, layout, assert_trivial=True).to(DTYPE)  # trivial: no register changes its thread


@gluon.jit
def producer(x_desc, codes_desc, words_desc, x_ring, weight_ring, row, tile, first, steps, GROUP_SIZE: gl.constexpr):
    """One warp, which keeps both rings full."""
    x_tiles, full, empty = x_ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    WIDE: gl.constexpr = x_tiles.shape[1]
    SLOTS: gl.constexpr = weight_ring[0].shape[0]
    # NEW: the weight is no other kernel's work. As much of it as there is room for is on its way before the wait.
    for step in range(gl.minimum(steps, SLOTS)):
        fetch_weight(codes_desc, words_desc, weight_ring, tile, step, (first + step) * WIDE, GROUP_SIZE)
    gdc_wait()
    gdc_launch_dependents()
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        load_tile(x_desc, [(first + step) * WIDE, row, 0], full.index(stage), x_tiles.index(stage))
        # NEW: the stage is empty, so step - STAGES is done with its slot, too.
        ahead = step - STAGES + SLOTS
        if (ahead >= SLOTS) & (ahead < steps):
            fetch_weight(codes_desc, words_desc, weight_ring, tile, ahead, (first + ahead) * WIDE, GROUP_SIZE)


@gluon.jit
def multiply(x_ring, weight_ring, share, steps, SHARES: gl.constexpr, ONE_RING: gl.constexpr):
    """w x^T over steps share, share + SHARES, ..., by a warpgroup: -> fp32 [ROWS, BLOCK_M]."""
    x_tiles, x_full, x_empty = x_ring
    codes, words, weight_full = weight_ring
    STAGES: gl.constexpr = x_tiles.shape[0]
    WIDE: gl.constexpr = x_tiles.shape[1]
    BLOCK_M: gl.constexpr = x_tiles.shape[2]
    SLOTS: gl.constexpr = codes.shape[0]
    GROUPS: gl.constexpr = words.shape[1]
    UNROLL: gl.constexpr = unroll_of(WIDE)
    # One block after another, as the products want them: the same bytes.
    x_blocks = x_tiles._reinterpret(x_tiles.dtype, [STAGES * WIDE, BLOCK_M, 64], plane_of(BLOCK_M, x_tiles.dtype))
    code_blocks = codes._reinterpret(gl.int16, [SLOTS * WIDE, ROWS // 16, 256], plain_plane(16))
    word_groups = words._reinterpret(gl.int32, [SLOTS * GROUPS, 1, ROWS], plain_plane(32))
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    gl.assume(steps >= SHARES * UNROLL)  # or the assembler would wait after each product: see above
    acc = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_M], gl.float32, mma))
    in_flight = gl.zeros([ROWS, 64], x_tiles.dtype, left)  # what the last product reads
    for start in range(share, steps, SHARES * UNROLL):
        for i in gl.static_range(UNROLL):
            step = start + i * SHARES
            slot = step % SLOTS
            stage = step % STAGES
            mbarrier.wait(weight_full.index(slot), step // SLOTS & 1)
            half_words = ()  # of all the step's blocks at once
            for j in gl.static_range(WIDE):
                half_words += (code_blocks.index(slot * WIDE + j).reshape([ROWS, 16]).load(left),)
            scale_zeros = ()
            for group in gl.static_range(GROUPS):
                of_group = word_groups.index(slot * GROUPS + group).reshape([ROWS])
                scale_zeros += (of_group.load(gl.SliceLayout(1, left)),)
            for j in gl.static_range(WIDE):
                w = dequantize(half_words[j], scale_zeros[j * GROUPS // WIDE], x_tiles.dtype, left)
                if j == 0 and not ONE_RING:  # else it came with the codes
                    mbarrier.wait(x_full.index(stage), step // STAGES & 1)
                acc = warpgroup_mma(w, x_blocks.index(stage * WIDE + j).permute([1, 0]), acc, is_async=True)
                acc, in_flight = warpgroup_mma_wait(1, deps=(acc, in_flight))  # the product before this one is done
                if j == 0:
                    before = x_empty.index((step + STAGES - SHARES) % STAGES)
                    mbarrier.arrive(before, count=1, pred=step >= SHARES)
                acc = warpgroup_mma_init(acc)
                in_flight = w
    acc, in_flight = warpgroup_mma_wait(0, deps=(acc, in_flight))
    return acc


@gluon.jit
def store(acc, bias_ptr, out_ptr, pid_m, tile, M, N, HAS_BIAS: gl.constexpr):
    """Writes fp32 [ROWS, BLOCK_M] + bias to out, 8 neighbours along N a thread: 16 bytes.

    A part, fp32, goes out as it lies in the registers: 8 threads have 8 neighbours, 32 bytes. To exchange them would
    take 16 to 30 KB more of shared memory, and with 128 tokens a multiprocessor would no longer hold two programs.
    """
    BLOCK_M: gl.constexpr = acc.shape[1]
    IS_PART: gl.constexpr = out_ptr.dtype.element_ty == gl.float32
    layout: gl.constexpr = acc.type.layout if IS_PART else gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    offs_n = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    if HAS_BIAS:
        mma: gl.constexpr = acc.type.layout
        rows = gl.minimum(tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma)), N - 1)
        acc += gl.load(bias_ptr + rows).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    out_ptrs = out_ptr + offs_m.to(gl.int64)[None, :] * N + offs_n[:, None]
    gl.store(out_ptrs, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@gluon.jit
def second_share(x_ring, weight_ring, handed_over, steps, ONE_RING: gl.constexpr):
    """The second of two warpgroups: leaves its sums in shared memory."""
    sums, summed = handed_over
    sums.store(multiply(x_ring, weight_ring, 1, steps, 2, ONE_RING))
    mbarrier.arrive(summed, count=1)


@gluon.jit
def first_share(
    x_ring, weight_ring, handed_over, given, HAS_BIAS: gl.constexpr, SHARES: gl.constexpr, ONE_RING: gl.constexpr
):
    """The first warpgroup, or the only one: adds what the second has, and writes the tile."""
    bias_ptr, out_ptr, pid_m, tile, steps, M, N = given
    acc = multiply(x_ring, weight_ring, 0, steps, SHARES, ONE_RING)
    if SHARES == 2:
        sums, summed = handed_over
        mbarrier.wait(summed, 0)
        acc += sums.load(acc.type.layout)
    gdc_wait()  # as in lesson 12: the memory may have been another's until the kernel before ended
    store(acc, bias_ptr, out_ptr, pid_m, tile, M, N, HAS_BIAS)


@gluon.jit
def two_rings_kernel(
    x_desc,  # fp16 or bf16 [K/64, M, 64], read in tiles [WIDE, BLOCK_M, 64]
    codes_desc,  # int16 [blocks, N/16, 256], in tiles [WIDE, ROWS / 16, 256]
    words_desc,  # int32 [groups, N], in tiles [groups_of(WIDE, GROUP_SIZE), ROWS]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]; with SPLIT_K > 1 fp32 [SPLIT_K, M, N]
    M,
    N,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    SHARES: gl.constexpr,  # warpgroups that share K: 1 or 2
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring of x
    SLOTS: gl.constexpr,  # of the weight's ring: at least STAGES, or 0 for x's
):
    """Makes a part of a tile [BLOCK_M, ROWS] of x @ w^T + bias."""
    WIDE: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[1]
    GROUPS: gl.constexpr = groups_of(WIDE, GROUP_SIZE)
    tile = gl.program_id(0)
    pid_m = gl.program_id(1)
    part = gl.program_id(2)

    # Whole rounds of steps; those past the end of K multiply zeros.
    ROUND: gl.constexpr = SHARES * unroll_of(WIDE)
    all_steps = gl.cdiv(blocks, WIDE)
    most = gl.cdiv(all_steps, SPLIT_K * ROUND) * ROUND
    first = part * most
    steps = gl.maximum(gl.minimum(gl.cdiv(all_steps - first, ROUND) * ROUND, most), ROUND)

    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, WIDE, BLOCK_M, 64], x_desc.layout)
    ONE_RING: gl.constexpr = SLOTS == 0
    PLACES: gl.constexpr = STAGES if ONE_RING else SLOTS
    codes = gl.allocate_shared_memory(gl.int16, [PLACES, WIDE, ROWS // 16, 256], codes_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [PLACES, GROUPS, ROWS], words_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(x_full.index(stage), count=2 if ONE_RING else 1)  # orders that are told to it
        mbarrier.init(x_empty.index(stage), count=1)
    if ONE_RING:
        weight_full = x_full
    else:
        weight_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(SLOTS):
            mbarrier.init(weight_full.index(slot), count=1)
    if SHARES == 2:
        summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(summed, count=1)
    fence_async_shared()  # the copy engine must see the barriers

    x_ring = (x_tiles, x_full, x_empty)
    weight_ring = (codes, words, weight_full)
    row = pid_m * BLOCK_M
    given = (bias_ptr, out_ptr + part.to(gl.int64) * M * N, pid_m, tile, steps, M, N)
    if SHARES == 2:
        sums = gl.allocate_shared_memory(gl.float32, [ROWS, BLOCK_M], spread(BLOCK_M))
        handed_over = (sums, summed)
        gl.warp_specialize(
            [
                (first_share, (x_ring, weight_ring, handed_over, given, HAS_BIAS, SHARES, ONE_RING)),
                (second_share, (x_ring, weight_ring, handed_over, steps, ONE_RING)),
                (
                    producer,
                    (x_desc, codes_desc, words_desc, x_ring, weight_ring, row, tile, first, steps, GROUP_SIZE),
                ),
            ],
            [4, 1],  # warps of the last two
            [256, 256],  # and their registers: more than there are, which leaves everyone what they began with
        )
    else:
        gl.warp_specialize(
            [
                (first_share, (x_ring, weight_ring, (), given, HAS_BIAS, SHARES, ONE_RING)),
                (
                    producer,
                    (x_desc, codes_desc, words_desc, x_ring, weight_ring, row, tile, first, steps, GROUP_SIZE),
                ),
            ],
            [1],
            [24],
        )


@functools.lru_cache(maxsize=4096)  # every launch asks
def launch_options(m: int, n: int, k: int, group_size: int, multiprocessors: int = common.H200) -> Mapping[str, int]:
    """The tallest tiles that still make enough programs for the machine, and who shares K."""
    height = next(height for height in (16, 32, 64, 128) if height >= min(m, 128))
    while True:
        tiles = common.cdiv(n, ROWS.value) * common.cdiv(m, height)
        split = parts_of(k, height, multiprocessors // tiles)
        # With K whole and a multiprocessor each, programs of 32 tokens beat half as many of 64: 4.5 for 5.4 us.
        crowded = height != 64 or split > 1 or 2 * tiles > multiprocessors
        if crowded and tiles * split >= FEWEST_PROGRAMS[height]:
            break
        height //= 2
    # Two share K where one could not hide its loads: with little to multiply, or a long way to go.
    shares = 2 if tiles * split * height <= (8192 if k // split >= 4096 else 4096) else 1
    wide, stages, slots = rings_of(height, split, k // split, shares, tiles * split <= multiprocessors)
    while wide > 1 and (wide * BLOCK) % group_size and group_size % (wide * BLOCK):  # a step would cut groups in two
        wide, stages, slots = wide // 2, stages * 2, slots * 2
    rounds = common.cdiv(k, BLOCK * wide * shares * unroll_of(wide))  # of steps; a program has whole ones, one at least
    split = parts_with_work(rounds, split)
    options = {"BLOCK_M": height, "WIDE": wide, "SPLIT_K": split, "SHARES": shares, "STAGES": stages, "SLOTS": slots}
    if shares == 1:
        options["maxnreg"] = 80 if height <= 32 else 128  # on average: 24 for the producer, for the others the rest
    return options


def parts_of(k: int, height: int, most: int) -> int:
    """How many programs share K: of 512 columns, or of 1024 with 128 tokens; one alone, if that spares it few."""
    split = max(1, min(most, common.cdiv(k, max(512, 8 * height))))
    return split if k - k // split > 1024 else 1


def rings_of(height: int, split: int, columns: int, shares: int, alone: bool) -> tuple[int, int, int]:
    """Blocks of a step, and steps in both rings, for `split` programs a tile of `columns` columns, `shares` warpgroups.

    alone: whether each program may have a multiprocessor.
    """
    if height == 128 and alone:
        return ALONE if columns <= 4096 else ALONE_LONG
    if shares == 2 and columns <= 2048 and (height == 16 or (height == 32 and split == 1)):
        return SHORT
    return RINGS[shares, height]


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias with an int4 weight, accumulated in float32; the same bits every time.

    Args:
        x: float16 or bfloat16 [..., K], on a Hopper GPU.
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
    x_2d = common.aligned_tokens(x)
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out.view(*x.shape[:-1], n)
    options = dict(launch_options(m, n, k, weight.group_size, common.multiprocessors(x.device)))
    height, wide, split = options.pop("BLOCK_M"), options.pop("WIDE"), options["SPLIT_K"]
    parts = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else out
    two_rings_kernel[(common.cdiv(n, ROWS.value), common.cdiv(m, height), split)](
        describe_swizzled(x_2d.view(m, k // BLOCK, BLOCK).permute(1, 0, 2), (wide, height, BLOCK)),
        *describe_weight(weight.codes, weight.scale_zeros, wide, groups_of(wide, weight.group_size), ROWS.value),
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
    shapes = [(16, 42, 512, 64), (130, 201, 1600, 320), (70, 2048, 8192, 128), (513, 2048, 2048, 2048)]
    yield from common.check_matmul(matmul, prepare, shapes)


SHAPES = ((512, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (8192, 8192))  # N, K


def bench() -> list[common.Row]:
    """Times five layers, 16 to 512 tokens, beside torch's own fp16 matmul."""
    return common.bench_layers(matmul, prepare, SHAPES, tokens=(16, 32, 64, 128, 256, 512), group_size=128)


if __name__ == "__main__":
    common.run_lesson(check, bench)
