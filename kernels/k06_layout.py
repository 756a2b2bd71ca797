"""Lesson 6: the weight in an order made for the kernel. NEW: the prepared layout, and eight codes by five instructions.

Run it:  python -m kernels.k06_layout --check     (against float64; needs no GPU)
         python -m kernels.k06_layout --bench     (on a GPU)

THE IDEA, first half. A file is written once and read by many programs: its order is a treaty. But nothing forces a
kernel to read that order. When a model is loaded, `prepare` (kernels/prepared.py) deals the codes anew, so that
lesson 5's trick gives tiles of *neighbours*: one nibble of all the half-words of a block of 64 is a slice of 16
weights that follow each other along K, and so do the columns of x that it meets. Their loads are wide again.
  The rows are dealt anew, too, into tiles of 16 rows by 64 columns. In plain rows a step would read 32 bytes here and
the next 32 bytes K / 2 bytes further on; a tile's 512 bytes lie together, and the tiles of 16 rows follow each other
along K. Memory is read in runs, and a warp's load is one of them.

THE IDEA, second half. A register holds two half-words, and a GPU's `lop3` computes any function of three inputs, bit
by bit. `(register & 0x000F000F) | 0x64006400` therefore makes two fp16 numbers 1024 + code of it in one instruction.
For the nibble above, do not shift, mask with 0x00F000F0: that is 1024 + 16 * code, as fp16 can hold it exactly, and
undoing it is free, because a multiplication and a subtraction are one instruction (`fma`), rounded once:

    (1024 + 16 * code) * (1/16) - (64 + zero)  =  code - zero

Only the upper two nibbles need a shift, both the same. Eight codes: one shift and four lop3.

THE PRICE, before any code. A weight costs 5/8 of an instruction to unpack, half of one to subtract, half to scale: 1.6,
where lesson 5 spent 3.6 by the same count, and the loads of x shrink from eight a step to four, of 16 bytes a thread
and not 2. To issue them for 67M weights takes 4 microseconds; the bytes take 9 (lesson 4). Now bytes can decide again.
Compiled for Hopper, the loop has 3.7 instructions a weight at M = 1 and group size 64, all counted, and 2.9 at
group size 128, where a step is 128 long. (Lesson 4: 13. Lesson 5: 6.5.)

WHO READS WHAT.

    codes  [N/16, K/64, 16, 16] half-words    tile, tile along K, row in the tile, half-word in the row

                 k = 0..63   64..127  128..191               a step of a program reads [BLOCK_N, BLOCK_K/4] of it:
                +---------+---------+---------+-             BLOCK_N / 16 runs of 512 bytes (BLOCK_K = 64: a tile
    rows 0..15  | tile    |  tile   |  tile   |              each) or 1024 (128: two tiles)
                | 512 B   |  512 B  |  512 B  |
                +---------+---------+---------+-             a row of a tile: 16 half-words, 32 bytes;
    rows 16..31 |         |         |         |              half-word j has codes j, 16 + j, 32 + j, 48 + j,
                                                             from the lowest nibble up

      slice i = 0..3 of a step at k, made from nibble i of each half-word:
        x  [BLOCK_M, BLOCK_K/4]               columns k + 16 i .. k + 16 i + 15   (and 64 further on, if BLOCK_K is 128)
        w  [BLOCK_K/4, BLOCK_N]
    scale_zeros  [groups, N] words            a row a step where a step lies in one group; else a row a slice

MEASURED on an H200 (results/k06_layout.json: command, versions, date; 8192 x 8192, group size 64): 47 microseconds at
M = 1, 0.82x of fp16 and 18% of the roofline; 0.72x at M = 16, 0.31x at 128, 0.25x at 512; 850 microseconds at
M = 2048, 0.43x and 49% of the roofline. Against lesson 5 that is 1.9 times as fast at M = 1 and 7 times at M = 2048.
Predicted: 1.0x of fp16 at M = 1, as 128 programs wait for their products one after the other, and not for bytes; 0.5x
at M = 2048. Both were too hopeful by about a fifth.
  A surprise: group size 128 has 4% fewer bytes and takes 30% less time at M = 1, 33 microseconds: 1.16x, the first
int4 matmul of this course to beat fp16. Its steps are 128 long, so there are half as many. Time goes by steps, then,
each with four products that wait for one another, and not by bytes.
  Tried: the plain twin of `unpack`. The compiler works on one half-word at a time and puts pairs together afterwards,
25 instructions for 5; the whole loop of a prototype had 5.6 a weight for 3.1 (compiled, group size 128).
  Tried, in lesson 12's kernel: plain rows of K / 2 bytes in place of the tiles. 385 microseconds at M = 2048, where
tiles took 373 (results/attempts.json).

NEXT. On Hopper the dequantized tile must go through shared memory, for its tensor cores take the right operand from
nowhere else. Lesson 7. EXERCISE. Shift for every nibble, with 0x000F000F as the only mask. How many
instructions are eight codes then, and which later ones does it save?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.prepared import PreparedWeight, prepare


# NEW
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
def layout_kernel(
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
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T, w dequantized on the way."""
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

    # NEW: the half-words of a step, and the columns of x that their lowest nibbles meet: 0..15 (64..79, ...).
    offs_h = tl.arange(0, BLOCK_K // 4)  # [BLOCK_K/4]
    offs_k = offs_h // 16 * 64 + offs_h % 16
    # A row of tiles has blocks * 256 half-words: written so, the compiler knows a multiple of 16, and loads wide.
    row_starts = (row_n // 16).to(tl.int64) * (blocks * 256) + row_n % 16 * 16
    offs_codes = offs_h // 16 * 256 + offs_h % 16
    code_ptrs = codes_ptr + row_starts[None, :] + offs_codes[:, None]  # [BLOCK_K/4, BLOCK_N]
    x_ptrs = x_ptr + row_m.to(tl.int64)[:, None] * K + offs_k[None, :]  # [BLOCK_M, BLOCK_K/4]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # NEW: four slices of one tile of half-words.
        nibbles = unpack(tl.load(code_ptrs), ASM)  # four of [BLOCK_K/4, BLOCK_N]
        for i in tl.static_range(4):
            # Groups are multiples of 16: where they are not multiples of a step, each slice lies in one all the same.
            if i == 0 or GROUP_SIZE % BLOCK_K != 0:
                group = (k + 16 * i) // GROUP_SIZE
                scale_zero = tl.load(scale_zeros_ptr + group * N + row_n)  # [BLOCK_N]
                scale = (scale_zero & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)[None, :]
                zero = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True)[None, :]  # 1024 + zero
            # code - zero: (1024 + code) - (1024 + zero), or (1024 + 16 code) / 16 - (64 + zero)
            level = nibbles[i] - zero if i % 2 == 0 else nibbles[i] * 0.0625 - (zero - 960)
            w = (level * scale).to(x_ptr.dtype.element_ty)  # [BLOCK_K/4, BLOCK_N]
            if GROUP_SIZE % BLOCK_K == 0:
                x = tl.load(x_ptrs + 16 * i)
            else:  # the last block may reach past the end of K
                x = tl.load(x_ptrs + 16 * i, mask=(offs_k < K - k - 16 * i)[None, :], other=0.0)
            acc = tl.dot(x, w, acc)
        code_ptrs += BLOCK_K // 64 * 256
        x_ptrs += BLOCK_K

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for m tokens."""
    block_k = 128 if group_size % 128 == 0 else 64
    if m <= 32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}
    if m <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
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
    layout_kernel[grid](
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
