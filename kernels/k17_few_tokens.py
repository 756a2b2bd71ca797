"""Lesson 17: one to sixteen tokens. NEW: the whole weight is on its way before the kernel asks what x is.

Run it:  python -m kernels.k17_few_tokens --check     (against float64; needs an NVIDIA GPU of sm_80 or newer)
         python -m kernels.k17_few_tokens --bench

THE IDEA. A layer of GPT-2 is small: 0.3 to 5 MB in int4, a microsecond of memory's time or less. Yet lesson 10 takes
two to five. It waits: for x, which the kernel ahead has only just written; for the codes, a step at a time, each a
microsecond away; and it computes, four instructions a weight. So ask for everything at once,

    loads of the weight |=========================|           all of it, into registers: as many warps as that takes
    the kernel ahead    ...............|                      is still at work meanwhile (lesson 9's early launch)
    x                                  |====|                 into shared memory, each number once
    tensor cores                            |=|               registers x shared memory: nothing to wait for
    sum over the warps                        |=|  store

and take tensor cores after all: they make eight columns where one token needs one, but what counts is instructions,
and one of theirs multiplies 256 weights. Two are left to do for a weight, in place of lesson 10's four, for one token
or eight: `row_tiles.py`, which lessons 18 and 20 share, has the operands and how they come straight from memory.

THE PRICE. 2048 x 2048: 2.3 MB, 0.5 microseconds at an H200's 4.2 TB/s, hidden behind the kernel ahead if that takes as
long. What is left is a chain: x from the L2 cache (0.7 microseconds), the products (0.4), the sum over the warps (0.2),
the store, and the end of one kernel and the beginning of the next, for which a chain of empty kernels takes 0.7.
So 2 microseconds, for anything up to 8 tokens.

WHO READS WHAT. A program makes 16 rows of out^T. Its warps share the columns, a block of 64 in turn:

    block            0    1    2    3    4    5   ...       a warp's thread keeps 16 bytes of each of its blocks:
    warp (of four)   0    1    2    3    0    1   ...       13 blocks are 52 registers: on eight warps K = 6400

MEASURED on an H200 (results/k17_few_tokens.json: command, versions, date; group size 64), microseconds (times fp16):

    N x K        2304x768    768x3072    4800x1600   1600x6400   2048x2048   8192x2048
    M = 1        1.8 (2.5)   2.0 (3.8)   2.8 (2.4)   3.6 (3.0)   2.1 (2.9)   4.3 (2.5)
    M = 8        1.9 (2.3)   2.1 (3.6)   3.6 (1.9)   4.6 (2.3)   2.3 (2.6)   4.9 (2.2)
    M = 16       2.4 (1.8)   3.0 (2.6)   4.8 (1.4)       -       2.8 (2.2)   8.2 (1.3)

As predicted for few bytes; 8192 x 2048 is bytes again, 9.4 MB at half the memory's pace. Lesson 10 took 2.6 and 5.7 for
the last two and one token, lesson 9 with its two kernels 4.6 and 8.3 for 16 (group size 128, results/attempts.json).
  All of K in registers fails for a large layer: 8192 x 8192 took 16 and 23 microseconds for one token and for eight,
where lesson 10 takes 15 for one. There is room for one program a multiprocessor, and there are four times as many. So
one token's large layers come in passes (`passes_kernel`): registers for 8 to 32 blocks, and while those are multiplied
the next ones are on their way. That takes a barrier at which no thread needs another: the assembler, who counts
registers, moves the next pass's loads behind this one's products, but not across a barrier. (It shows in the machine
code, where a test looks.) Predicted: 11 microseconds; reading alone takes 8. Group size 128, results/attempts.json:

    N x K                     8192x4096    16384x4096    4096x8192    8192x8192    8192x8192, group size 64
    fp16                        19.4          34.5         22.3         38.8         39.3
    lesson 10                    8.7          16.6         10.6         15.5         16.3
    all of K in registers        8.6          16.1          8.3         16.5         16.3
    in passes, dealt out         7.9          12.9          8.7         14.1         13.6
    in passes, neighbours        7.0          10.8          7.1      12.1 .. 14.2  12.6 .. 15.3

The first passes dealt their blocks out to the warps in turn, as above: 86 instructions a block, a quarter of them to
work out addresses. With neighbours for a warp, one follows the other at a fixed distance, which a load's instruction
holds, and they may share a group: 70 instructions (77 with groups of 64), and 64 registers a thread in place of 69. So
four programs of 8 warps fit on a multiprocessor rather than three, and all 512 run at once. Hence the rule: two blocks
a warp and pass, and four where there are so few programs that all of them fit even so (`pass_options`). Predicted: 12.5
microseconds for 8192 x 8192. Timed side by side it took 12.1 where the first passes took 13.7, with groups of 64 13.3
and 13.7; with one block a warp and pass 17.6, with four 13.3, with four and half as many warps 12.2. But the same
kernel took from 12.1 to 15.3 in seven timings within minutes, in three processes; why is not known, and others repeat
to a few percent. (Long before, the first passes took 14.1 and 13.6.)
  Tried and failed (results/attempts.json, group size 128). x into registers as well, each thread its own part: the
assembler moves such loads down to where they are used, one wait after another, and 2048 x 2048 at M = 8 took 4.3
microseconds where it now takes 2.4. Unpacking all codes before the wait, while there is time: four registers of
operands for one of codes, so fewer programs at a time, and 5.7 in place of 4.3 at 8192 x 2048. Unpacking a few pays in
lesson 18, where kernels differ; here, one in a row of equals, it took 18% less to 18% more, mostly 0 to 6% more.
  The bias is loaded with the weight, too. Behind the products it cost 0.05 to 0.2 microseconds (2.2 for 2.1 at 2048 x
2048 and one token). In passes it stays behind, where a register more would be one too many.
  To let the next kernel in before this one's own turn has come, as lesson 18 does: 4.7 for 5.2 at 2048 x 8192, but 3.0
for 2.1 at 2048 x 2048, and nothing at 8192 x 8192 (11 for 12.2 was predicted). Where all kernels do so, and all are
alike, programs that cannot do anything yet take the room of those that could.
  A surprise: 4 tokens took longer than 8 (at 2048 x 2048 2.6 microseconds and 2.4) as long as the missing tokens were
read as copies of the last. All programs then read the same few bytes five times over, and one slice of the L2 cache had
to serve them.

NEXT. A layer takes two microseconds, and between two of them lie a LayerNorm, a GELU or a sum, which take as long each
(lesson 18). EXERCISE. Count the bytes that all programs together read of x, for 8192 x 2048 and M = 16, and compare
with the weight's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import common
from kernels.prepared import BLOCK, TILE_ROWS, PreparedWeight, prepare
from kernels.row_tiles import (
    ROWS,
    accumulate,
    barrier,
    copy,
    launch_options,
    load_weight,
    multiply,
    places_of_codes,
    share_tokens,
)

MOST_TOKENS = 16
MOST_COLUMNS = 8192  # of w: its codes, 16 blocks a warp, fill the registers
MOST_NUMBERS = 65536  # of x, with tokens rounded up: 128 KB of shared memory
MOST_COLUMNS_IN_PASSES = 32768  # 64 KB of shared memory


@gluon.jit
def few_tokens_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    BLOCK_M: gl.constexpr,  # 1, 8 or 16: at least M
    STEP: gl.constexpr,  # blocks of 64 columns a warp
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes 16 numbers of x @ w^T + bias for each token."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    first_row = gl.program_id(0) * ROWS
    # NEW: all that can be known of the weight, asked for at once.
    codes, words = load_weight(codes_ptr, scale_zeros_ptr, first_row, N, blocks, GROUP_SIZE, STEP, num_warps)
    bias = load_bias(bias_ptr, first_row, N, HAS_BIAS, mma)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = share_tokens(x_ptr, M, K, blocks, BLOCK_M, STEP, num_warps)
    out = multiply(x, (), codes, words, BLOCK_M, STEP, mma, num_warps)  # [16, TOKENS]
    store(out, bias, out_ptr, first_row, M, N, mma)


@gluon.jit
def load_bias(bias_ptr, first_row, N, HAS_BIAS: gl.constexpr, mma: gl.constexpr):
    """What is added to ROWS numbers of each token, fp32 [ROWS]: the biases, or zeros."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, mma))
    if HAS_BIAS:
        offs_n = first_row + gl.arange(0, ROWS, layout=layout)
        return gl.load(bias_ptr + gl.minimum(offs_n, N - 1)).to(gl.float32)
    else:
        return gl.zeros([ROWS], gl.float32, layout)


@gluon.jit
def store(out, bias, out_ptr, first_row, M, N, mma: gl.constexpr):
    """Adds biases fp32 [ROWS] to ROWS numbers of each token, fp32 [ROWS, TOKENS], and stores them."""
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    offs_n = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + (offs_m * N)[None, :] + offs_n[:, None]
    out = (out + bias[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptrs, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@gluon.jit
def load_pass(
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    tile,
    N,
    blocks,
    first_block,
    GROUP_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # no pass reaches past the end of K
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Like `load_weight`, but warp w has STEP neighbours, from block first_block + STEP w on; past the end, zeros."""
    warp, row, half_word = places_of_codes(num_warps)
    starts = (warp * (STEP * 256))[:, None] + (row * 16)[None, :]
    places = starts[:, :, None, None] + half_word[None, None, :, :]
    code_ptrs = codes_ptr + tile.to(gl.int64) * (blocks * 256) + places
    row_ptrs = scale_zeros_ptr + gl.minimum(tile * ROWS + row, N - 1)
    # Whether a warp's blocks begin where a group does. Then a group's later blocks need no word of their own.
    SHARED: gl.constexpr = GROUP_SIZE % (64 * STEP) == 0 or 64 * STEP % GROUP_SIZE == 0
    codes = ()
    words = ()
    for i in gl.static_range(STEP):
        block = first_block + warp * STEP + i
        there = ((block < blocks) | EVEN)[:, None]
        # NEW: block after block at a fixed distance, i * 256, which goes into the load's own instruction.
        codes += (gl.load(code_ptrs + (first_block + i) * 256, mask=there[:, :, None, None], other=0),)
        if i * 64 % GROUP_SIZE == 0 or not SHARED:  # else: the same group as the neighbour before
            word_ptrs = row_ptrs[None, :] + (block * 64 // GROUP_SIZE * N)[:, None]
            word = gl.load(word_ptrs, mask=there, other=0)
        words += (word,)
    return codes, words


@gluon.jit
def copy_pass(x, x_ptr, K, first_block, STEP: gl.constexpr, num_warps: gl.constexpr):
    """Asks for a pass's blocks of x, [STEP * W, 64]: warp after warp each one's first, then each one's second, ..."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])  # 16 bytes a thread
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    first_column = (first_block + row % num_warps * STEP + row // num_warps) * 64
    copy(x, x_ptr + first_column[:, None] + column[None, :], (first_column < K)[:, None])


@gluon.jit
def passes_kernel(
    x_ptr,  # fp16 or bf16 [K]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [N]
    M,  # 1
    N,
    K,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    PASSES: gl.constexpr,
    EVEN: gl.constexpr,
    STEP: gl.constexpr,  # blocks of 64 columns a warp and pass
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes 16 numbers of w @ x + bias, in passes along K: while one is multiplied, the next one's weight comes."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    BLOCKS: gl.constexpr = STEP * num_warps
    tile = gl.program_id(0)
    codes, words = load_pass(codes_ptr, scale_zeros_ptr, tile, N, blocks, 0, GROUP_SIZE, EVEN, STEP, num_warps)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    x = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [PASSES, BLOCKS, 64], shared)
    for i in gl.static_range(PASSES):
        copy_pass(x.index(i), x_ptr, K, i * BLOCKS, STEP, num_warps)
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()
    acc = gl.zeros([num_warps, ROWS, 8], gl.float32, mma)
    for i in range(PASSES - 1):
        next_codes, next_words = load_pass(
            codes_ptr, scale_zeros_ptr, tile, N, blocks, (i + 1) * BLOCKS, GROUP_SIZE, EVEN, STEP, num_warps
        )
        barrier()  # no thread needs another here; but the assembler would move the loads behind the products
        acc = accumulate(acc, x.index(i), codes, words, 1, 0, STEP, mma, num_warps)
        codes, words = next_codes, next_words
    acc = accumulate(acc, x.index(PASSES - 1), codes, words, 1, 0, STEP, mma, num_warps)
    bias = load_bias(bias_ptr, tile * ROWS, N, HAS_BIAS, mma)
    store(gl.sum(acc, 0), bias, out_ptr, tile * ROWS, M, N, mma)


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for 1 to 16 tokens with an int4 weight, accumulated in float32; the same bits every time.

    Args:
        x: float16 or bfloat16 [..., K], with 1 to 16 tokens, on an NVIDIA GPU of sm_80 or newer. K is at most 8192,
            with more than 8 tokens 4096, with one 32768.
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
    if not common.has_mma(x.device):
        raise ValueError(f"x is on {x.device}, this kernel needs an NVIDIA GPU of sm_80 or newer")
    x_2d = common.aligned_tokens(x)
    m = x_2d.shape[0]
    if not 1 <= m <= MOST_TOKENS:
        raise ValueError(f"x has shape {list(x.shape)}, this kernel multiplies 1 to {MOST_TOKENS} tokens of {k}")
    block_m = 1 if m == 1 else 8 if m <= 8 else 16
    most_columns = MOST_COLUMNS_IN_PASSES if m == 1 else min(MOST_COLUMNS, MOST_NUMBERS // block_m)
    if k > most_columns:
        raise ValueError(f"x has shape {list(x.shape)}, for {m} tokens K is at most {most_columns}")
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    multiprocessors = common.multiprocessors(x.device)
    if m == 1 and in_passes(n, k, multiprocessors):
        kernel, options = passes_kernel, pass_options(n, k, multiprocessors)
    else:
        kernel, options = few_tokens_kernel, {"BLOCK_M": block_m, **launch_options(k)}
    kernel[(common.cdiv(n, TILE_ROWS),)](
        x_2d,
        weight.codes,
        weight.scale_zeros,
        bias,
        out,
        m,
        n,
        k,
        weight.blocks,
        HAS_BIAS=bias is not None,
        GROUP_SIZE=weight.group_size,
        **options,
        **common.early_launch(),
    )
    return out.view(*x.shape[:-1], n)


def in_passes(n: int, k: int, multiprocessors: int = common.H200) -> bool:
    """Whether one token's product with a weight [n, k] is made in passes: rows too long for registers, or too many.

    With more than 4096 columns in registers there is room for one program of 16 rows on each of the multiprocessors,
    with 4096 for two.
    """
    most_rows = multiprocessors * TILE_ROWS * (2 if k == 4096 else 1)
    return k > MOST_COLUMNS or (k >= 4096 and n > most_rows)


def pass_options(n: int, k: int, multiprocessors: int = common.H200) -> dict[str, int]:
    """How many passes there are, blocks of 64 columns a warp and pass, and warps: so that all programs run at once.

    Where that can be. A multiprocessor has registers for 32 warps with two blocks a warp and pass, for 16 or more with
    four.
    """
    warps = 4 if k <= 4096 else 8
    step = 4 if common.cdiv(n, TILE_ROWS) * warps <= multiprocessors * 16 else 2
    columns = BLOCK * step * warps
    return {"PASSES": common.cdiv(k, columns), "EVEN": k % columns == 0, "STEP": step, "num_warps": warps}


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, where there is a GPU that can run it."""
    if not common.has_mma(common.DEVICE):
        yield "mma.sync needs an NVIDIA GPU of sm_80 or newer, and this machine has none", None
        return
    shapes = [(1, 40, 2048, 64), (3, 33, 384, 128), (8, 1000, 1600, 320), (5, 70, 8192, 128), (2, 4100, 4096, 4096)]
    # In passes, the last of them with fewer blocks; of 4 and of 2 blocks a warp, 8 warps and 4.
    shapes += [(1, 1000, 8256, 64), (1, 33, 12800, 128), (1, 4300, 8256, 192), (1, 8470, 4096, 128)]
    yield from common.check_matmul(matmul, prepare, shapes)


WIDE = ((2304, 768), (768, 3072), (4800, 1600), (2048, 2048), (8192, 2048))  # N, K: GPT-2's, and two
LONG = ((1600, 6400),)  # more columns than 16 tokens may have
PASSED = ((8192, 8192),)


def bench() -> list[common.Row]:
    """Times layers of GPT-2 124M and XL, and two more, beside torch's own fp16 matmul."""
    wide = common.bench_layers(matmul, prepare, WIDE, tokens=(1, 4, 8, 16), group_size=64)
    long = common.bench_layers(matmul, prepare, LONG, tokens=(1, 4, 8), group_size=64)
    return wide + long + common.bench_layers(matmul, prepare, PASSED, tokens=(1,), group_size=64)


if __name__ == "__main__":
    common.run_lesson(check, bench)
