"""Lesson 12: the weight through Hopper's tensor cores at cuBLAS's pace. NEW: Gluon; waiting only where one must.

Run it:  python -m kernels.k12_hopper --check     (against float64; needs a Hopper GPU, H100 or H200)
         python -m kernels.k12_hopper --bench

THE IDEA. Lesson 8's loop does three things in turn: wait for data, dequantize, multiply. While it dequantizes, the
tensor cores idle; while they multiply, it waits, for Triton puts a wait behind every wgmma that reads registers. The
hardware could do all three at once. Triton does not let us say so; Gluon, its lower storey, does: the same language,
but layouts, shared memory, copies and waits are ours to write. So:

    a producer warp   asks the copy engine (TMA) for tiles of x, some steps ahead, and does nothing else
    two warpgroups    dequantize step k + 1 while the tensor cores still multiply step k, and wait for k only then

    producer    |x0|x1|x2|x3|   |x4|   |x5|        a tile of x per free stage in shared memory
    warpgroups  |deq 0|deq 1|deq 2|deq 3|deq 4     in registers
    tensor cores      | wgmma 0 | wgmma 1 | ...    never idle, if deq is shorter than wgmma

Two mbarriers a stage tell who may go on: `full`, when the copy engine has delivered; `empty`, when the product that
read the stage is done.

THE PRICE. At M = 2048, 8192 x 8192: 275 GFLOP, 350 to 400 microseconds at the 700 to 800 TFLOP/s that an H200 keeps up.
With tiles of 256 tokens x 128 outputs a step of 64 along K takes the tensor cores 1024 clocks; dequantizing its 8192
weights takes some 3 instructions a weight / 128 lanes = 200 clocks, hidden behind them. So: FP16's speed, from a
quarter of the bytes.

WHO READS WHAT. Each warpgroup makes 64 of the 128 outputs, out^T = w x^T. What wgmma wants of its left operand in
registers is little: thread 4r + c of warp v holds, of rows 16v + r and 16v + 8 + r, columns 2c, 2c + 1, 2c + 8, 2c + 9

    slice i = nibble i     half-words [BLOCK_N, 16] of a block, loaded in just this layout, straight into registers:
                           its four slices are the left operands of four products. No shuffles, no shared memory.

MEASURED on an H200 (results/k12_hopper.json: command, versions, date; 8192 x 8192, group size 128):

    M            128     512    2048
    lesson 12     40      91     376    microseconds (group size 64: 41, 92, 397)
    of fp16    0.95x   1.01x   0.95x    67%, 117% and 113% of the roofline

Predicted: fp16's speed at M = 2048, 350 to 400 microseconds. Here it is 5% slower; in a bench of the front door's it
was 5% faster, 382 where fp16 took 401 (results/attempts.json). fp16 itself takes from 354 to 404. Call it equal.
  A surprise: more than all of the roofline. Its ceiling is a product of 8192 x 8192 x 8192 repeated for a tenth of a
second; a kernel is timed in bursts of a millisecond. Probably the GPU lowers its clock within the longer time.
  Tried and failed, at M = 2048 (results/attempts.json). One warpgroup's dequantizing beside the other's multiplying,
each on its own barriers ("ping-pong"): 409 microseconds, where both in step with one product in flight took 395.
Dequantizing slice by slice between the four products of a step: 439, probably as the assembler moves the pieces
about. Plain rows of K / 2 bytes in place of tiles of 16 x 64: 385, where tiles took 373.

NEXT. FP16's speed is the end of this road: the tensor cores are busy. Lesson 13 makes them do less.
EXERCISE. Take BLOCK_M = 128. Count clocks for wgmma and for dequantizing again, and say why it is slower per token.
"""

from collections.abc import Iterator

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
from kernels.parts import add_up
from kernels.prepared import BLOCK, PreparedWeight, prepare
from kernels.rings import describe_swizzled, load_tile

BLOCK_N = 128  # 64 outputs for each of two warpgroups


@gluon.jit
def unpack(half_word):
    """int16 -> its four codes as fp16: 1024 + code, 1024 + 16 code, 1024 + code, 1024 + 16 code (lesson 6)."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 shifted;
        shr.u32 shifted, $4, 8;
        lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $2, shifted, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, shifted, 0x00f000f0, 0x64006400, 0xea;
        }""",
        "=r,=r,=r,=r,r",
        [half_word],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def dequantize(half_words, words, DTYPE: gl.constexpr, layout: gl.constexpr):
    """int16 [BLOCK_N, 16] and the rows' scale_zeros [BLOCK_N] -> DTYPE [BLOCK_N, 64], laid out as a left operand."""
    scale = gl.expand_dims((words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True), 1)
    zero = gl.expand_dims((words >> 16).to(gl.int16).to(gl.float16, bitcast=True), 1)  # 1024 + zero
    c0, c1, c2, c3 = unpack(half_words)
    even = gl.join((c0 - zero) * scale, (c2 - zero) * scale)  # [BLOCK_N, 16, 2]: slices 0 and 2
    odd = gl.join((c1 * 0.0625 - (zero - 960.0)) * scale, (c3 * 0.0625 - (zero - 960.0)) * scale)
    ROWS: gl.constexpr = half_words.shape[0]
    w = gl.join(even, odd).permute([0, 2, 3, 1]).reshape([ROWS, 64])  # k = 32 (pair) + 16 (odd) + j
    return gl.convert_layout(w, layout, assert_trivial=True).to(DTYPE)  # trivial: no register changes its thread


@gluon.jit
def producer(x_desc, x_tiles, full, empty, row, first, steps, STAGES: gl.constexpr):
    """NEW: one warp, which keeps STAGES tiles of x on their way."""
    # Lesson 9's early launch: wait for the kernel before, let the next one start.
    gdc_wait()
    gdc_launch_dependents()
    for step in range(steps):
        stage = step % STAGES
        # A barrier's phases alternate. A stage is empty for the first time in phase 1: before anyone used it.
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        load_tile(x_desc, [row, (first + step) * 64], full.index(stage), x_tiles.index(stage))


@gluon.jit
def multiply(
    x_tiles,
    full,
    empty,
    codes_ptr,
    scale_zeros_ptr,
    rows,
    first,
    steps,
    blocks,
    N,
    GROUP_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """w x^T over a part of K, by two warpgroups: -> fp32 [BLOCK_N, BLOCK_M]."""
    DTYPE: gl.constexpr = x_tiles.dtype
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    BLOCK_N: gl.constexpr = rows.shape[0]
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, left))
    row_starts = (rows // 16).to(gl.int64) * (blocks * 256) + rows % 16 * 16
    codes_ptrs = codes_ptr + row_starts[:, None] + j[None, :]  # [BLOCK_N, 16]
    scale_zeros_ptrs = scale_zeros_ptr + rows  # [BLOCK_N]

    # The next STAGES steps' codes and scales wait in registers.
    codes = ()
    words = ()
    for stage in gl.static_range(STAGES):
        block = gl.minimum(first + stage, blocks - 1)
        codes += (gl.load(codes_ptrs + block * 256),)
        words += (gl.load(scale_zeros_ptrs + block * 64 // GROUP_SIZE * N),)

    acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, mma))
    in_flight = gl.zeros([BLOCK_N, 64], DTYPE, left)  # what the last product reads
    for start in range(0, steps, STAGES):
        next_codes = ()
        next_words = ()
        for stage in gl.static_range(STAGES):
            w = dequantize(codes[stage], words[stage], DTYPE, left)
            block = gl.minimum(first + start + stage + STAGES, blocks - 1)
            next_codes += (gl.load(codes_ptrs + block * 256),)
            next_words += (gl.load(scale_zeros_ptrs + block * 64 // GROUP_SIZE * N),)
            mbarrier.wait(full.index(stage), start // STAGES & 1)
            # NEW: start this product, and only then wait for the one before. Its registers and its stage are free.
            acc = warpgroup_mma(w, x_tiles.index(stage).permute([1, 0]), acc, is_async=True)
            acc, in_flight = warpgroup_mma_wait(1, deps=(acc, in_flight))
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=start + stage > 0)
            acc = warpgroup_mma_init(acc)
            in_flight = w
        codes = next_codes
        words = next_words
    acc, in_flight = warpgroup_mma_wait(0, deps=(acc, in_flight))
    return acc


@gluon.jit
def store(acc, bias_ptr, out_ptr, pid_m, pid_n, M, N, HAS_BIAS: gl.constexpr, num_warps: gl.constexpr):
    """Writes fp32 [BLOCK_N, BLOCK_M] + bias to out, 8 neighbours along N a thread: 16 bytes."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, num_warps], [0, 1])
    offs_n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    if HAS_BIAS:
        mma: gl.constexpr = acc.type.layout
        rows = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma)), N - 1)
        acc += gl.load(bias_ptr + rows).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    out_ptrs = out_ptr + offs_m.to(gl.int64)[None, :] * N + offs_n[:, None]
    gl.store(out_ptrs, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@gluon.jit
def consumer(
    x_tiles,
    full,
    empty,
    codes_ptr,
    scale_zeros_ptr,
    bias_ptr,
    out_ptr,
    pid_m,
    pid_n,
    part,
    first,
    steps,
    blocks,
    M,
    N,
    BLOCK_N: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Two warpgroups: multiply, and write the tile, or their part's share of it (lesson 9)."""
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, left)), N - 1)
    acc = multiply(
        x_tiles, full, empty, codes_ptr, scale_zeros_ptr, rows, first, steps, blocks, N, GROUP_SIZE, STAGES, mma
    )
    # These warps wait, too, before they write: the memory may have been another's until the kernel before ended.
    gdc_wait()
    store(acc, bias_ptr, out_ptr + part.to(gl.int64) * M * N, pid_m, pid_n, M, N, HAS_BIAS, num_warps)


@gluon.jit
def hopper_kernel(
    x_desc,  # fp16 or bf16 [M, K], read in tiles [BLOCK_M, 64]; what lies outside reads as 0
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]; with SPLIT_K > 1 fp32 [SPLIT_K, M, N]
    M,
    N,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes a part of a tile [BLOCK_M, BLOCK_N] of x @ w^T + bias."""
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    pid = gl.program_id(0)
    part = gl.program_id(1)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * gl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = gl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    # Whole rounds of STAGES steps; those past the end of K multiply zeros.
    rounds = gl.cdiv(blocks, SPLIT_K * STAGES)
    first = part * rounds * STAGES
    steps = gl.maximum(gl.minimum(gl.cdiv(blocks - first, STAGES), rounds), 0) * STAGES

    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()  # the copy engine must see the barriers

    gl.warp_specialize(
        [
            (
                consumer,
                (
                    x_tiles,
                    full,
                    empty,
                    codes_ptr,
                    scale_zeros_ptr,
                    bias_ptr,
                    out_ptr,
                    pid_m,
                    pid_n,
                    part,
                    first,
                    steps,
                    blocks,
                    M,
                    N,
                    BLOCK_N,
                    HAS_BIAS,
                    GROUP_SIZE,
                    STAGES,
                    num_warps,
                ),
            ),
            (producer, (x_desc, x_tiles, full, empty, pid_m * BLOCK_M, first, steps, STAGES)),
        ],
        [1],  # warps of the producer
        [24],  # and its registers: the warpgroups get the rest
    )


def launch_options(m: int, n: int, k: int, multiprocessors: int = common.H200) -> dict[str, int] | None:
    """The tallest tiles that still make enough programs for the machine; None where none do, and lesson 9 is better."""
    for block_m in (256, 128, 64):
        tiles = common.cdiv(m, block_m) * common.cdiv(n, BLOCK_N)
        # Sharing a tile costs a round trip of its sums: only where each part is still 32 steps long.
        split = 1 if block_m == 256 else max(1, min(4, multiprocessors // tiles, k // BLOCK // 32))
        split = 2 ** (split.bit_length() - 1)
        if tiles * split >= 100 and block_m <= max(64, m):
            return {"BLOCK_M": block_m, "SPLIT_K": split, "STAGES": 4 if block_m == 256 else 8}
    return None


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
    options = launch_options(m, n, k, common.multiprocessors(x.device)) or {"BLOCK_M": 64, "SPLIT_K": 1, "STAGES": 8}
    tiles = common.cdiv(m, options["BLOCK_M"]) * common.cdiv(n, BLOCK_N)
    split = options["SPLIT_K"] > 1
    parts = torch.empty((options["SPLIT_K"], m, n), dtype=torch.float32, device=x.device) if split else out
    hopper_kernel[(tiles, options["SPLIT_K"])](
        describe_swizzled(x_2d, (options["BLOCK_M"], BLOCK)),
        weight.codes,
        weight.scale_zeros,
        bias,
        parts,
        m,
        n,
        weight.blocks,
        HAS_BIAS=bias is not None and not split,
        GROUP_SIZE=weight.group_size,
        BLOCK_N=BLOCK_N,
        GROUP_M=8,
        SPLIT_K=options["SPLIT_K"],
        STAGES=options["STAGES"],
        num_warps=8,
        launch_pdl=True,
    )
    if split:
        add_up(parts, bias, out)
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, where there is a Hopper GPU."""
    if not common.is_hopper(common.DEVICE):
        yield "wgmma needs a Hopper GPU (H100, H200), and this machine has none", None
        return
    shapes = [(1, 40, 512, 64), (130, 200, 1600, 320), (300, 4096, 4096, 128), (513, 1000, 2048, 2048)]
    yield from common.check_matmul(matmul, prepare, shapes)


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare, tokens=(128, 512, 2048))


if __name__ == "__main__":
    common.run_lesson(check, bench)
