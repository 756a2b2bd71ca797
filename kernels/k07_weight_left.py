"""Lesson 7: the weight on the left. NEW: out^T = w @ x^T, and a dequantized weight that never leaves its registers.

Run it:  python -m kernels.k07_weight_left --check     (against float64; needs no GPU)
         python -m kernels.k07_weight_left --bench     (on a GPU)

THE IDEA. A matrix product may be read from either side: out = x @ w^T is out^T = w @ x^T, the same products and sums.
To Hopper's tensor cores it is not the same. Their instruction, `wgmma`, reads the right operand from shared memory
and from nowhere else; the left one may come from registers. x is loaded, to shared memory, as it is. w is *made*, in
registers. So w belongs on the left.

    lesson 6   x @ w^T     codes -> registers -> fp16 w -> SHARED MEMORY, fence, barrier -> wgmma
    lesson 7   w @ x^T     codes -> registers -> fp16 w -> wgmma

THE PRICE, before any code. What goes: in a step of lesson 6 each program stores its tile of w, in four slices, fences
it so that the tensor cores see it, and waits twice for all its warps: a weight costs 2 bytes written to shared memory
and 2 read from there, at 128 bytes a cycle and multiprocessor. At M = 2048 each weight is made sixteen times:
16 * 67M * 4 bytes / (132 * 128 bytes * 1.8 GHz) = 141 microseconds. What comes: nothing; the output's tile is the
other way round in registers, and is turned once, when it is stored.
  And wgmma needs 64 rows on the left. Those are now rows of the weight, of which there are always enough: even a
single token is multiplied by wgmma, while lesson 6 fell back to the tensor instruction of older GPUs.
  Compiled for Hopper at M = 2048 and group size 64, the loop has no store to shared memory and 4.9 instructions a
weight, two barriers a step; lesson 6: four such stores, 5.7 instructions, nine barriers (Triton 3.7.1).
  (tests/kernels/test_ladder.py compiles both and looks.)

WHO READS WHAT. Lesson 6 turned over: a program makes a tile [BLOCK_N, BLOCK_M] of out^T.

    slice i of a step at k:    w  [BLOCK_N, BLOCK_K/4]  @  x^T  [BLOCK_K/4, BLOCK_M]
    codes [BLOCK_N, BLOCK_K/4], lesson 6's tiles the other way round: the same runs of 512 or 1024 bytes
    x^T   is x read with its two strides exchanged, nothing is moved

MEASURED on an H200 (results/k07_weight_left.json: command, versions, date; 8192 x 8192, group size 64):

    M              1      16     128     512    2048
    lesson 6      47      47     123     369     850    microseconds
    lesson 7      53      53      77     160     566
    of fp16    0.73x   0.64x   0.49x   0.57x   0.63x    16% of the roofline at M = 1, 74% at M = 2048

Predicted: as lesson 6 at M = 1, where nothing but waiting decides; 0.6x of fp16 at M = 2048, for the tensor cores'
350 microseconds and the dequantizing's 170 still come one after the other in each program. Their sum, 520, is 8% less
than what was measured; lesson 6 took 280 microseconds more, twice what its trip through shared memory should cost.
  A surprise: at M = 1 and 16 it is 12% slower. The step has as many products as before, and wgmma, which is made for
64 rows and many columns, has 16 columns to work on: probably each of the four takes longer to come back.
  At M = 512 most of the gain may not be this lesson's idea: its tiles are 128 x 128 from 257 tokens on, lesson 6's
only from 513. At M = 2048 both have the same.

NEXT. Lesson 8 looks at who waits for memory, and for how long. EXERCISE. An A100's `mma` takes both operands from
registers. Compile both lessons for sm_80, as the test does for sm_90: 18 instructions a weight at M = 2048 on the
right, 6 on the left. Which warps need which rows of w?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.prepared import PreparedWeight, prepare


@triton.jit
def unpack(half_words, ASM: tl.constexpr):
    """int16 [...] -> four fp16 [...]: 1024 + code for slices 0 and 2, 1024 + 16 * code for slices 1 and 3.

    ASM: two half-words at once, by five instructions. The plain twin below says the same, and Triton's interpreter runs
    it; the compiler makes some twenty-five of it.
    """
    if ASM:
        # lop3 is any function of three inputs, bit by bit; 0xEA is (a & b) | c.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high;
            shr.u32 high, $4, 8;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
            lop3.b32 $2, high, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, high, 0x00F000F0, 0x64006400, 0xEA;
            }""",
            constraints="=r,=r,=r,=r,r",
            args=[half_words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    high = half_words >> 8
    slice_0 = ((half_words & 0x0F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    slice_1 = ((half_words & 0xF0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    slice_2 = ((high & 0x0F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    slice_3 = ((high & 0xF0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    return slice_0, slice_1, slice_2, slice_3


@triton.jit
def weight_left_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [ceil(64 * blocks / GROUP_SIZE), N]
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    blocks,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # 64, or a multiple of it that divides GROUP_SIZE
    GROUP_M: tl.constexpr,
    ASM: tl.constexpr,
):
    """Makes a tile [BLOCK_N, BLOCK_M] of out^T = w @ x^T, w dequantized on the way."""
    # The launch order is lesson 3's.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    # Rows past the end are read as copies of the last one, which needs no mask in the loop, and not stored.
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_m = tl.minimum(offs_m, M - 1)
    row_n = tl.minimum(offs_n, N - 1)

    # The half-words of a step, and the columns of x that their lowest nibbles meet: 0..15 (64..79, ...).
    offs_h = tl.arange(0, BLOCK_K // 4)  # [BLOCK_K/4]
    offs_k = offs_h // 16 * 64 + offs_h % 16
    # A row of tiles has blocks * 256 half-words: written so, the compiler knows a multiple of 16, and loads wide.
    row_starts = (row_n // 16).to(tl.int64) * (blocks * 256) + row_n % 16 * 16
    offs_codes = offs_h // 16 * 256 + offs_h % 16
    code_ptrs = codes_ptr + row_starts[:, None] + offs_codes[None, :]  # [BLOCK_N, BLOCK_K/4]
    x_ptrs = x_ptr + row_m.to(tl.int64)[None, :] * K + offs_k[:, None]  # [BLOCK_K/4, BLOCK_M], x transposed

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # NEW: out's tile transposed
    for k in range(0, K, BLOCK_K):
        nibbles = unpack(tl.load(code_ptrs), ASM)  # four of [BLOCK_N, BLOCK_K/4]
        for i in tl.static_range(4):
            # Groups are multiples of 16: where they are not multiples of a step, each slice lies in one all the same.
            if i == 0 or GROUP_SIZE % BLOCK_K != 0:
                group = (k + 16 * i) // GROUP_SIZE
                scale_zero = tl.load(scale_zeros_ptr + group * N + row_n)  # [BLOCK_N]
                scale = (scale_zero & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)[:, None]
                zero = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True)[:, None]  # 1024 + zero
            # code - zero: (1024 + code) - (1024 + zero), or (1024 + 16 code) / 16 - (64 + zero)
            level = nibbles[i] - zero if i % 2 == 0 else nibbles[i] * 0.0625 - (zero - 960)
            w = (level * scale).to(x_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_K/4]
            if GROUP_SIZE % BLOCK_K == 0:
                x = tl.load(x_ptrs + 16 * i)
            else:  # the last block may reach past the end of K
                x = tl.load(x_ptrs + 16 * i, mask=(offs_k < K - k - 16 * i)[:, None], other=0.0)
            acc = tl.dot(w, x, acc)  # NEW: the weight on the left
        code_ptrs += BLOCK_K // 64 * 256
        x_ptrs += BLOCK_K

    out_ptrs = out_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for m tokens."""
    block_k = 128 if group_size % 128 == 0 else 64
    if m <= 32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}
    if m <= 256:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": block_k, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


def matmul(x: Tensor, weight: PreparedWeight) -> Tensor:
    """x @ w^T with an int4 weight, dequantized on the fly and accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: of [N, K], any group size, prepared.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight)
    x_2d = x.reshape(-1, k).contiguous()
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    options = launch_options(m, weight.group_size)
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]),)
    weight_left_kernel[grid](
        x_2d,
        weight.codes,
        weight.scale_zeros,
        out,
        m,
        n,
        k,
        weight.blocks,
        GROUP_SIZE=weight.group_size,
        ASM=x.is_cuda,
        **options,
    )
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int4 weight."""
    return common.check_matmul(matmul, prepare, [(1, 40, 256, 64), (17, 33, 384, 96), (70, 130, 320, 320)])


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare)


if __name__ == "__main__":
    common.run_lesson(check, bench)
