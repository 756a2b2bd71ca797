"""Lesson 9: split-K. NEW: several programs share an output tile, and a second kernel adds up.

Run it:  python -m kernels.k09_split_k --check     (against float64; needs no GPU)
         python -m kernels.k09_split_k --bench     (on a GPU)

THE IDEA. A few tokens make few tiles: with 16 tokens and tiles of 64 outputs, a 2048 x 2048 weight keeps 32 of an
H200's 132 multiprocessors busy, and memory is read at a quarter of its speed. There is work to share in one direction
only, along K: SPLIT_K programs take a part of K each, and write what they have, in fp32, to a workspace of their own.
A second kernel (parts.py) adds the parts up, always in the same order: the result is the same bits every time. (Adding
to the output with atomics saves that kernel, but rounds differently from run to run. Counting who arrives last, and
letting that program add up, saves it too, but needs counters that are zero before every launch, and one
multiprocessor then reads what all have written.)

THE PRICE. Sums written and read once more: at 8192 x 8192, cut in eight, 16 tokens x 128 outputs x 4 bytes = 8 KB a
program beside the 64 KB of codes that it reads for 1024 columns, all of it in the L2 cache. And a second launch. So
split no further than it takes to fill the machine. The bytes alone would take 8.3 microseconds.

NEW as well: the launch. A kernel in a stream starts when the one before it has ended, a gap of a microsecond, in which
memory idles. Hopper can start it early ("programmatic dependent launch"): everything before `gdc_wait` may run while
the kernel before is still finishing, everything behind it sees what that kernel wrote.

WHO READS WHAT. As in lesson 8; program (tile, part) walks

    k = part * K / SPLIT_K  ...  (part + 1) * K / SPLIT_K      in steps of BLOCK_K, of

    codes [BLOCK_N, BLOCK_K / 4] half-words     slice i of a step is nibble i: [BLOCK_N, BLOCK_K / 4] of w
    x     [BLOCK_K / 4, BLOCK_M], four times    the columns of x that slice i multiplies

MEASURED on an H200 (results/k09_split_k.json: command, versions, date; 8192 x 8192, group size 128): 16.7 microseconds
at M = 1, 2.3x of fp16 and half of the roofline, where lesson 8 takes 35; 20 at M = 16, 1.7x and 41%, with groups of 64
21. Foretold was no more than the floor, and half of it is reached.
  From M = 128 on there is little left to split: 0.68x at 128, 0.58x at 512, where lesson 8 has 0.53x and 0.58x. With
128 tokens it took 80 microseconds, now 55 and, with groups of 64, 56; with 16 tokens 19, now 20 and 21. In between the
sum (parts.py) has come to let the next kernel in early, for lesson 22's sake. Side by side with a sum that does not
(results/attempts.json): 20.7 microseconds for 18.3 with 16 tokens, 55 for 79 with 128. Of 18 problems each, 8 and 16
tokens lose 9 and 12% by it in the median, 64 tokens gain 5%.
  A surprise: steps of 64 along K beat steps of 128, though they wait twice as often: 18.7 microseconds where 128 took
20.8 at M = 16 (results/attempts.json). Probably half as much in flight a program leaves room for more programs.
  Tried, at group size 128, with steps of 128 (results/attempts.json). The last of a tile's programs adds up, by
counters: 18.2 microseconds at M = 1 and 19.8 at M = 16, where the second kernel took 17.5 and 20.8. No clear winner, so
the simpler one stayed. Older tensor instructions (`mma.sync`), both operands from registers, K shared by a program's
warps, written in Gluon: 15.0 at M = 1, as good as lesson 10, but 26.3 at M = 16. The same in plain Triton, by a batched
`tl.dot`: 20.8 and 28.4.

NEXT. At one token even this is mostly overhead: a matrix-vector product needs no tensor cores (lesson 10).
EXERCISE. Make SPLIT_K larger and larger for one shape, and say where the time starts to rise, and why.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.parts import add_up
from kernels.prepared import BLOCK, PreparedWeight, prepare

MOST_PARTS = 16


@triton.jit
def unpack(half_word, ASM: tl.constexpr):
    """int16 -> its four codes as fp16 numbers: 1024 + code, 1024 + 16 code, 1024 + code, 1024 + 16 code (lesson 6)."""
    if ASM:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
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
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        c0 = ((half_word & 0x000F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        c1 = ((half_word & 0x00F0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        c2 = (((half_word >> 8) & 0x000F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        c3 = (((half_word >> 8) & 0x00F0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    return c0, c1, c2, c3


@triton.jit
def dequantize_slice(code, word, ODD: tl.constexpr):
    """What `unpack` gave of a slice, fp16 [BLOCK_N, .], and its scale_zeros, int32 [BLOCK_N, 1] -> its weights."""
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + zero
    if ODD:
        return (code * 0.0625 - (zero - 960.0)) * scale  # (1024 + 16 code) / 16 - (64 + zero), all of it exact
    return (code - zero) * scale


@triton.jit
def split_k_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]; with SPLIT_K > 1 fp32 [SPLIT_K, M, N]
    M,
    N,
    K,
    blocks,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of 64
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T + bias, or one part's share of it, transposed."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows_m = tl.minimum(offs_m, M - 1)  # rows past the end are read as the last: no mask in the loop
    rows_n = tl.minimum(offs_n, N - 1)
    j = tl.arange(0, BLOCK_K // 4)  # half-words of a step
    offs_k = j // 16 * 64 + j % 16  # where in the step the first nibbles' codes lie
    row_starts = (rows_n // 16).to(tl.int64) * (blocks * 256) + rows_n % 16 * 16
    codes_ptrs = codes_ptr + row_starts[:, None] + (j // 16 * 256 + j % 16)[None, :]  # [BLOCK_N, BLOCK_K/4]
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * K + offs_k[:, None]  # [BLOCK_K/4, BLOCK_M]

    # NEW: this program's part of K.
    steps = tl.cdiv(K, BLOCK_K)
    first = part * tl.cdiv(steps, SPLIT_K)
    last = tl.minimum(first + tl.cdiv(steps, SPLIT_K), steps)

    if PDL:  # NEW: wait for the kernel before this one, and let the one behind it start
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        codes = unpack(tl.load(codes_ptrs + step * (BLOCK_K // 64 * 256)), ASM)
        for i in tl.static_range(4):
            k = step * BLOCK_K + 16 * i
            x = tl.load(x_ptrs + k) if EVEN_K else tl.load(x_ptrs + k, mask=(offs_k < K - k)[:, None], other=0.0)
            # One word of scales a row where groups are as long as a step (all four slices load the same, so it is
            # loaded once), else one a slice.
            group = (step * BLOCK_K if GROUP_SIZE % BLOCK_K == 0 else k) // GROUP_SIZE
            word = tl.load(scale_zeros_ptr + group * N + rows_n)[:, None]
            w = dequantize_slice(codes[i], word, ODD=i % 2 == 1)  # [BLOCK_N, BLOCK_K/4]
            acc = tl.dot(w.to(x.dtype), x, acc)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
    # NEW: each part has an output of its own.
    out_ptrs = out_ptr + (part * M + offs_m).to(tl.int64)[None, :] * N + offs_n[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def launch_options(m: int, n: int, k: int, group_size: int) -> dict[str, int]:
    """Block sizes, split, warps and stages for m tokens: what was best on an H200, written as a rule."""
    block_n, num_warps = (128, 8) if m > 32 and n * k > 2**22 else (128 if n >= 4096 and m <= 32 else 64, 4)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 256 else 128
    tiles = common.cdiv(m, block_m) * common.cdiv(n, block_n)
    # Enough programs to hide each other's start and end, two to four a multiprocessor, but none with next to no steps.
    programs, least_steps = 512 if m <= 32 else 256, 4 if tiles > 16 else 2
    split = max(1, min(programs // tiles, common.cdiv(k, BLOCK) // least_steps, MOST_PARTS))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": BLOCK,
        "SPLIT_K": 2 ** (split.bit_length() - 1),
        "num_warps": num_warps,
        "num_stages": 4,
    }


def candidates(m: int, n: int, k: int, group_size: int) -> list[dict[str, int]]:
    """Launch options worth trying on a GPU that was never measured (lesson 14), the default first."""
    default = launch_options(m, n, k, group_size)
    wider = 192 - default["BLOCK_N"]  # 64 for 128, 128 for 64
    tried = [
        default,
        {**default, "SPLIT_K": min(MOST_PARTS, default["SPLIT_K"] * 2)},
        {**default, "SPLIT_K": max(1, default["SPLIT_K"] // 2)},
        {**default, "BLOCK_N": wider, "num_warps": 8 if wider == 128 and m > 32 else 4},
        {**default, "num_stages": 3},
    ]
    if group_size % 128 == 0:
        tried.append({**default, "BLOCK_K": 128, "num_stages": 3})
    return [options for number, options in enumerate(tried) if options not in tried[:number]]


def matmul(
    x: Tensor, weight: PreparedWeight, bias: Tensor | None = None, options: dict[str, int] | None = None
) -> Tensor:
    """x @ w^T + bias with an int4 weight, accumulated in float32; the same bits every time.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: of [N, K], any group size.
        bias: floating [N].
        options: launch options; those of `launch_options` if not given.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight, bias)
    x_2d = x.reshape(-1, k).contiguous()
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out.view(*x.shape[:-1], n)
    options = options or launch_options(m, n, k, weight.group_size)
    split = options["SPLIT_K"] > 1
    parts = torch.empty((options["SPLIT_K"], m, n), dtype=torch.float32, device=x.device) if split else out
    tiles = common.cdiv(m, options["BLOCK_M"]) * common.cdiv(n, options["BLOCK_N"])
    split_k_kernel[(tiles, options["SPLIT_K"])](
        x_2d,
        weight.codes,
        weight.scale_zeros,
        bias,
        parts,
        m,
        n,
        k,
        weight.blocks,
        HAS_BIAS=bias is not None and not split,
        EVEN_K=k % BLOCK == 0,
        GROUP_SIZE=weight.group_size,
        GROUP_M=8,
        ASM=common.ON_NVIDIA,
        **options,
        **common.early_launch(),
    )
    if split:
        add_up(parts, bias, out)
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int4 weight."""
    return common.check_matmul(matmul, prepare, [(1, 40, 512, 64), (17, 33, 384, 96), (5, 70, 1024, 128)])


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare)


if __name__ == "__main__":
    common.run_lesson(check, bench)
