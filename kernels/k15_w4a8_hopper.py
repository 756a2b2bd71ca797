"""Lesson 15: W4A8 in lesson 12's loop. NEW: int8 products from registers; two warpgroups that take turns.

Run it:  python -m kernels.k15_w4a8_hopper --check     (against float64; needs a Hopper GPU, H100 or H200)
         python -m kernels.k15_w4a8_hopper --bench

THE IDEA. Lesson 13's arithmetic, lesson 12's machinery: a producer warp keeps tiles of x8 coming, warpgroups turn
nibbles into int8 in registers and hand them to wgmma. One thing changes. An int8 product takes half the clocks, and
making its operand takes more instructions: hiding one behind the other gets tight. So each warpgroup goes its own way,
with its own barriers, waits for its own products at once, and while it waits the other one makes operands:

    warpgroup 0   make | multiply | make | multiply |          64 of the 128 outputs each
    warpgroup 1          make | multiply | make | multiply     the tensor cores always have one of the two

Nobody arranges that order. Whoever comes second to the tensor cores waits, and from then on they alternate.

THE PRICE. With 256 tokens a step of 64 along K takes the tensor cores 256 clocks a warpgroup; its operand, 64 x 64
weights, takes 15 instructions for eight: 60 clocks of each of the four schedulers, and as much again for loads and
barriers. So twice FP16's speed is the bound, minus the pass over x, 12 microseconds at M = 2048, K = 8192.

WHO READS WHAT. As lesson 12, but that an int8 operand's registers hold four neighbours along K where a fp16 one's hold
two. A thread has two words of a row, each two half-words, each four nibbles: low nibbles of a word's four bytes become
one register, high ones another. That these are not neighbours in K is no matter, as x8 is kept in the same order:

    position 32 s + 16 (second word) + 4 c + byte   <-   column 16 (2 (byte & 1) + s) + half-word      (activations.py)

MEASURED on an H200 (results/k15_w4a8_hopper.json: command, versions, date; 8192 x 8192, group size 128), all passes
counted:

    M            128     512    2048
    lesson 15     41      72     269    microseconds (group size 64: 40, 75, 278)
    of fp16    0.93x   1.27x   1.33x    64%, 143% and 154% of the roofline of 16-bit arithmetic

The loop makes scale / row_scale itself; as long as they came ready-made it took 41, 72 and 262. Of 8-bit arithmetic's
roofline it is 77% at M = 2048. Predicted: half of fp16's time and the 12 microseconds of the pass over x, 206. A
quarter of what was measured is not accounted for.
  A surprise: at M = 128 half the clocks save next to nothing, as lesson 12 takes 40. And from 128 tokens on no matrix
is so small as to take less than 12.7 microseconds. Supposed was: for the launch ahead, which read x and all scales
before anything was multiplied. That was not it: since it only reads x this lesson takes as long, and lesson 23, with
the same launch ahead, 4 to 6 microseconds (results/attempts.json).
  Tried and failed: an int8 operand carried from one round of the loop to the next. The compiler takes it apart into
bytes there, and back together: 100 instructions a step instead of 60.

NEXT. Tokens by the dozen, 16 to 128, and small layers are what is left to win: lesson 23. EXERCISE. What would fp8
activations change in this file, and what would the scales of groups of 64 then cost?
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
from triton.language.extra.cuda import gdc_wait

from kernels import common
from kernels.activations import quantize_activations
from kernels.prepared import BLOCK, PreparedWeight, prepare
from kernels.rings import describe_swizzled, load_tile
from kernels.row_tiles import invert, make_operand

BLOCK_N = 128  # 64 outputs for each of two warpgroups
TOLERANCE = 0.02  # relative error, as in lesson 13


@gluon.jit
def producer(x_desc, x_tiles, full, empty, row, steps, STAGES: gl.constexpr):
    """One warp, which keeps STAGES tiles of x8 on their way."""
    gdc_wait()
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        load_tile(x_desc, [row, step * 64], full.index(stage), x_tiles.index(stage))


@gluon.jit
def consumer(shared, WARPGROUP: gl.constexpr, HAS_BIAS: gl.constexpr, GROUP_SIZE: gl.constexpr, STAGES: gl.constexpr):
    """NEW: one warpgroup, on its own: makes 64 of the tile's outputs."""
    x_tiles, full, empty, token_scales_ptr, codes_ptr, scale_zeros_ptr, row_scales_ptr, bias_ptr, out_ptr = shared[:9]
    pid_m, pid_n, steps, M, N, blocks = shared[9:]
    BLOCK_M: gl.constexpr = x_tiles.shape[1]
    ROWS: gl.constexpr = 64
    WIDTH: gl.constexpr = BLOCK_M if BLOCK_M < 128 else 128  # the widest int8 product that Triton issues
    mma16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    mma8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    left16: gl.constexpr = gl.DotOperandLayout(0, mma16, 2)
    left8: gl.constexpr = gl.DotOperandLayout(0, mma8, 4)
    first_row = pid_n * (2 * ROWS) + WARPGROUP * ROWS
    rows = gl.minimum(first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left16)), N - 1)
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, left16))
    row_starts = (rows // 16).to(gl.int64) * (blocks * 256) + rows % 16 * 16
    codes_ptrs = codes_ptr + row_starts[:, None] + j[None, :]  # [ROWS, 16]
    scale_zeros_ptrs = scale_zeros_ptr + rows  # [ROWS]

    # The weight does not depend on the launch before.
    row_scales = gl.load(row_scales_ptr + rows)
    inverses = invert(row_scales)
    codes = ()
    words = ()
    for stage in gl.static_range(STAGES):
        block = gl.minimum(stage, blocks - 1)
        codes += (gl.load(codes_ptrs + block * 256),)
        words += (gl.load(scale_zeros_ptrs + block * 64 // GROUP_SIZE * N),)
    gdc_wait()

    acc = gl.zeros([ROWS, BLOCK_M], gl.int32, mma8)
    for start in range(0, steps, STAGES):
        next_codes = ()
        next_words = ()
        for stage in gl.static_range(STAGES):
            w8 = make_operand(codes[stage], words[stage], inverses, left16, left8)
            block = gl.minimum(start + stage + STAGES, blocks - 1)
            next_codes += (gl.load(codes_ptrs + block * 256),)
            next_words += (gl.load(scale_zeros_ptrs + block * 64 // GROUP_SIZE * N),)
            mbarrier.wait(full.index(stage), start // STAGES & 1)
            acc = warpgroup_mma(w8, x_tiles.index(stage).permute([1, 0]), warpgroup_mma_init(acc), is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            # Nothing, in assembly, that reads w8: or its registers would be free for other use while wgmma reads them.
            gl.inline_asm_elementwise("// $0 $1 $2 $3 $4", "=r,=r,=r,=r,r", [w8], dtype=gl.int32, is_pure=False, pack=4)
            mbarrier.arrive(empty.index(stage), count=1)
        codes = next_codes
        words = next_words

    rows8 = gl.minimum(first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma8)), N - 1)
    tokens8 = gl.minimum(pid_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma8)), M - 1)
    row_scales = gl.convert_layout(row_scales, gl.SliceLayout(1, mma8), assert_trivial=True)
    out = acc.to(gl.float32) * gl.load(token_scales_ptr + tokens8)[None, :] * row_scales[:, None]
    if HAS_BIAS:
        out += gl.load(bias_ptr + rows8).to(gl.float32)[:, None]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), layout)
    offs_n = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    out_ptrs = out_ptr + offs_m.to(gl.int64)[None, :] * N + offs_n[:, None]
    gl.store(out_ptrs, out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


@gluon.jit
def w4a8_hopper_kernel(
    x_desc,  # int8 [M, 64 * blocks], read in tiles [BLOCK_M, 64]; what lies outside reads as 0
    token_scales_ptr,  # fp32 [M]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    row_scales_ptr,  # fp32 [N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T + bias."""
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    pid = gl.program_id(0)
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * gl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = gl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height
    steps = gl.cdiv(blocks, STAGES) * STAGES  # those past the end of K multiply zeros

    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # NEW: both warpgroups must be done with it
    fence_async_shared()

    shared = (x_tiles, full, empty, token_scales_ptr, codes_ptr, scale_zeros_ptr, row_scales_ptr, bias_ptr, out_ptr)
    shared += (pid_m, pid_n, steps, M, N, blocks)
    gl.warp_specialize(
        [
            (consumer, (shared, 0, HAS_BIAS, GROUP_SIZE, STAGES)),
            (consumer, (shared, 1, HAS_BIAS, GROUP_SIZE, STAGES)),
            (producer, (x_desc, x_tiles, full, empty, pid_m * BLOCK_M, steps, STAGES)),
        ],
        [4, 1],  # warps of the second warpgroup and of the producer
        [240, 24],  # and their registers
    )


def block_m(m: int, n: int) -> int:
    """The tallest tiles that still make enough programs for the machine."""
    for height in (256, 128):
        if common.cdiv(m, height) * common.cdiv(n, BLOCK_N) >= 100:
            return height
    return 64


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias with an int4 weight and int8 activations, summed exactly in int32.

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
    height = block_m(m, n)
    w4a8_hopper_kernel[(common.cdiv(m, height) * common.cdiv(n, BLOCK_N),)](
        describe_swizzled(x8, (height, BLOCK)),
        token_scales,
        weight.codes,
        weight.scale_zeros,
        weight.row_scales,
        bias,
        out,
        m,
        n,
        weight.blocks,
        HAS_BIAS=bias is not None,
        GROUP_SIZE=weight.group_size,
        BLOCK_N=BLOCK_N,
        GROUP_M=8,
        STAGES=4 if height == 256 else 8,
        num_warps=4,
        launch_pdl=True,
    )
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, where there is a Hopper GPU."""
    if not common.is_hopper(common.DEVICE):
        yield "wgmma needs a Hopper GPU (H100, H200), and this machine has none", None
        return
    shapes = [(1, 40, 512, 64), (130, 200, 1600, 320), (300, 4096, 4096, 128), (513, 1000, 2048, 2048)]
    yield from common.check_matmul(matmul, prepare, shapes, TOLERANCE)


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare, tokens=(128, 512, 2048))


if __name__ == "__main__":
    common.run_lesson(check, bench)
