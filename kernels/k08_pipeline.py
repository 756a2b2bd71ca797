"""Lesson 8: asking long before it is needed. NEW: how many steps' tiles are in flight, and what can fly at all.

Run it:  python -m kernels.k08_pipeline --check     (against float64; needs no GPU)
         python -m kernels.k08_pipeline --bench     (on a GPU; also with 1 to 5 stages at M = 16 and M = 2048)

THE IDEA. Memory is far: a load takes some 0.7 microseconds to come back, a thousand cycles. A loop that loads, waits,
and multiplies spends its time on the middle one. So the loop asks for the tiles of step s + 2 before it multiplies
those of step s. `num_stages` = 3 means three sets of tiles in shared memory, one being multiplied, two on their way.
Since lesson 3 the launchers have said so without a word of explanation; here it is the subject.

    step         before   0    1    2    3           num_stages = 3: only the first step waits the whole time
    asks for      0, 1    2    3    4    5           num_stages = 1: ask, wait, multiply, ask, wait, multiply, ...
    multiplies            0    1    2    3

WHAT CAN FLY. The copy from memory to shared memory that needs no registers and no waiting (`cp.async`) moves 4, 8 or
16 bytes a thread, and no fewer. Triton pipelines the loads that such copies can do, if they feed a product:
    codes         8 half-words a thread, 16 bytes      yes
    x             8 numbers a thread, 16 bytes         yes     lesson 5: 2 bytes of every 16, no: it waited every step
    scale, zero   a word of 4 bytes a row              yes     2 bytes of scale and half a byte of zero apart: no.
                                                               That is why `prepare` makes one word of them

THE PRICE, before any code. Little's law: to keep a bandwidth busy, bandwidth x latency bytes must be on their way,
4.2 TB/s * 0.7 us = 2.9 MB, or 22 KB a multiprocessor. At M = 1 a step of 64 rows has 2 KB of codes (group size 64), and
there is one program a multiprocessor: 3 stages keep 4 KB in flight, 5 stages 8 KB, a third of what is needed. Shared
memory pays for it: at M = 2048 a stage is 16 KB of x, 4 KB of codes and 0.5 KB of scales and zeros; two programs a
multiprocessor with 5 stages ask for 205 KB of its 227.

WHO READS WHAT. As in lesson 7.

MEASURED on an H200 (results/k08_pipeline.json: command, versions, date; 8192 x 8192), microseconds:

    num_stages                   1     2     3     4     5
    M = 16, group size 64      227   100    53    41    38      fp16 takes 34: 0.88x at best, 23% of the roofline
    M = 16, group size 128     134    68    38    36    35      0.97x
    M = 2048, group size 64   1318   699   576   577   587      fp16 takes 357 to 374: 0.6x, 72% of the roofline

With the options of `launch_options`, at group size 64: 38 at M = 1 (1.00x; lesson 7: 53), 77 at M = 128 (0.49x), 160 at
M = 512 (0.57x), 560 at M = 2048 (0.65x).
Predicted at M = 16: 125 microseconds with 1 stage, 128 steps that wait 0.7 microseconds each and then work 0.27;
with 3 stages 39, with 5 stages 34 (these two, and the 0.27, are not theory: a prototype took so long at group size
128). At group size 128 they came true, 38 and 35. Little's law asks for more stages still, but that is not what is
waited for now: four products a step, each of which waits for the one before, and the step is no shorter than their
sum. At M = 2048: 1 stage 1.5 times slower than 2, and nothing between 3 and 5, as there are two programs a
multiprocessor, and while one waits the other works.
  A surprise: without a pipeline it is far worse than that. With 1 stage a step at M = 16 takes 1.8 microseconds and not
1: probably it waits twice, for the codes, and then for x, which is asked for only when the codes have come. And at
M = 2048 the second program does not fill the first one's waiting: 1 stage takes 1.9 times as long as 2, and 2.3 times
as long as 3.

NEXT. At M = 1 there are 128 programs of four warps, for 132 multiprocessors that have room for 64 warps each. Lesson 9
cuts K into parts and gives each to a program of its own. And at M = 2048 each program dequantizes while its tensor
cores wait, and waits while they work: lesson 12 gives the two jobs to different warps. EXERCISE. From the bench's
rows for M = 16, work out how long a step waits with 1 stage. Is it the latency assumed above?
"""

import functools
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
def pipeline_kernel(
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
    NUM_STAGES: tl.constexpr,
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

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # NEW: the tiles of NUM_STAGES steps lie in shared memory at a time, all but one on their way.
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
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
            acc = tl.dot(w, x, acc)
        code_ptrs += BLOCK_K // 64 * 256
        x_ptrs += BLOCK_K

    out_ptrs = out_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for m tokens."""
    block_k = 128 if group_size % 128 == 0 else 64
    if m <= 32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 1, "num_warps": 4, "NUM_STAGES": 5}
    if m <= 256:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": block_k, "GROUP_M": 8, "num_warps": 8, "NUM_STAGES": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "NUM_STAGES": 3}


def matmul(x: Tensor, weight: PreparedWeight, num_stages: int | None = None) -> Tensor:
    """x @ w^T with an int4 weight, dequantized on the fly and accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: of [N, K], any group size, prepared.
        num_stages: how many steps' tiles shared memory holds; None: what `launch_options` says.

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
    if num_stages is not None:
        options["NUM_STAGES"] = num_stages
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]),)
    pipeline_kernel[grid](
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
    """Times a square 8192-wide layer beside torch's own fp16 matmul, then again with 1 to 5 stages."""
    rows = [{**row, "num_stages": "default"} for row in common.bench_matmul(matmul, prepare)]
    for num_stages in range(1, 6):
        with_stages = functools.partial(matmul, num_stages=num_stages)
        rows += [{**row, "num_stages": num_stages} for row in common.bench_matmul(with_stages, prepare, (16, 2048))]
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
