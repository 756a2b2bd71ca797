"""Lesson 5: each packed word loaded once. NEW: eight small products a step, and codes that become fp16 for nothing.

Run it:  python -m kernels.k05_unpack --check     (against float64; needs no GPU)
         python -m kernels.k05_unpack --bench     (on a GPU)

THE IDEA, first half. A sum over k may be taken in any order. So do not ask for w's tile in its order along K, which
made lesson 4 load every word eight times. Load a tile of words, and let nibble i of *all* of them be a tile of w: its
rows are k = i, 8 + i, 16 + i, ... A step is eight products, one a nibble, each with the matching columns of x.

THE IDEA, second half. fp16 has ten bits of mantissa, so from 1024 to 2048 its steps are 1: the number 1024 + c is the
bits of 1024.0, 0x6400, with c in the lowest bits. Or-ing a code to 0x6400 thus *makes* an fp16 number of it, and no
integer is ever converted to a float:

    code 10 = 0b1010       0x6400 | 10 = 0x640A  =  0 11001 0000001010  =  2^10 * (1 + 10/1024)  =  1034.0
    1034.0 - (1024 + zero) = code - zero, exactly; times the scale, rounded once to fp16

Two fp16 numbers share a register, and one instruction subtracts or multiplies both.

THE PRICE, before any code. Lesson 4 needs six instructions a weight: a load, a shift, a mask, a subtraction, a
conversion, a multiplication; compiled for Hopper, with addresses and all, its loop has 13. Here they are an eighth of
a load, a shift, a mask with its or (one instruction, `lop3`), half of one to put two codes in one register, half a
subtraction, half a multiplication: 3.6. A multiprocessor issues 4 x 32 a cycle, so the 67M weights of 8192 x 8192 take
132 of them 8 microseconds at 1.8 GHz, as long as the bytes. But a tile of w is made anew for each BLOCK_M tokens: at
M = 2048 and BLOCK_M = 64, 32 times, 260 microseconds.

THE CATCH. The columns of x are now eight apart: each load fetches 2 bytes of every 16, eight times over. x is small,
and the cache answers; but these are loads again, and no copy to shared memory goes 2 bytes at a time, so each must pass
through registers. Compiled, the loop has 6.5 instructions a weight at M = 1, and 7.4 with BLOCK_M = 64.

WHO READS WHAT. A step takes BLOCK_K = 128 weights along K, so that each product has 16, what tensor cores ask for:

    word  [16, BLOCK_N]                 rows k/8 .. k/8 + 15 of qweight, each word once
    i-th product, i = 0..7:
      x   [BLOCK_M, 16]                 columns k + i, k + 8 + i, k + 16 + i, ...
      w   [16, BLOCK_N]                 nibble i of each word
    scale, zero [CHUNKS, BLOCK_N]       one of each a CHUNK, the largest power of two that fits a group (lesson 2)

MEASURED on an H200 (results/k05_unpack.json: command, versions, date; 8192 x 8192, group size 64). It is slower:

    M              1      16     128     512    2048
    lesson 4      79      81     180     725    1754    microseconds
    lesson 5      88     129     414    1686    5917
    of fp16    0.43x   0.27x   0.09x   0.05x   0.06x    10% of the roofline at M = 1, 7% at M = 2048

Predicted: 0.6x of fp16 at M = 1, half the instructions, but every step waits for its x; 0.35x at M = 2048. Half the
instructions, and up to 3.4 times the time: in this form the idea does not pay. Probably THE CATCH is why, eight loads
of x a step with 2 useful bytes of every 16, which cannot be asked for ahead; no profiler has looked. Two things speak
for it: the loss grows with M, as x does, and lesson 6, which makes those loads wide and keeps the rest, takes 369
microseconds at M = 512, where both have tiles of 64 tokens. Who counts instructions must count waiting as well.
  A surprise: at group size 128 a step has one row of scales and zeros and not two, and M = 1 takes 75 microseconds.
It is the one place where this lesson beats the one before, which takes 78.
  Tried: tiles of 128 x 128. Compiled for an A100, whose warps each dequantize the whole of w's tile, they spill
registers.

NEXT. Lesson 6 puts the codes in an order in which x's columns are neighbours. EXERCISE. bfloat16 has seven bits of
mantissa. From which number on are its steps 1, and does a code fit under it? Why does the kernel make fp16 of the
codes even if x is bfloat16?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.k00_reference import QuantizedWeight


# NEW
@triton.jit
def kilo_plus(nibble):
    """1024 + the lowest four bits: int32 [...] -> fp16 [...], by an `or` and no conversion."""
    return ((nibble & 0xF) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    qweight_ptr,  # int32 [K/8, N]
    scales_ptr,  # fp16 [K/GROUP_SIZE, N]
    qzeros_ptr,  # int32 [K/GROUP_SIZE, ceil(N/8)]
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,  # a power of two that divides GROUP_SIZE, at least 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
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

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    WORDS: tl.constexpr = BLOCK_K // 8
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # NEW: each word once. Past the end of K there are none.
        offs_j = k // 8 + tl.arange(0, WORDS)  # [WORDS], row of qweight
        in_k = offs_j < K // 8
        word_ptrs = qweight_ptr + offs_j.to(tl.int64)[:, None] * N + offs_n[None, :]
        word = tl.load(word_ptrs, mask=in_k[:, None] & (offs_n < N)[None, :], other=0)  # [WORDS, BLOCK_N]

        # One scale and one zero a chunk, then spread over the chunk's words. The zero too goes under 1024.
        offs_c = k // CHUNK + tl.arange(0, CHUNKS)  # [CHUNKS]
        in_range = (offs_c < K // CHUNK)[:, None] & (offs_n < N)[None, :]
        group = (offs_c * CHUNK // GROUP_SIZE)[:, None]
        scale = tl.load(scales_ptr + group * N + offs_n[None, :], mask=in_range, other=0.0)  # [CHUNKS, BLOCK_N]
        zero_word = tl.load(qzeros_ptr + group * tl.cdiv(N, 8) + offs_n[None, :] // 8, mask=in_range, other=0)
        zero = kilo_plus(zero_word >> (offs_n % 8 * 4)[None, :])
        scale = scale[:, None, :].broadcast_to(CHUNKS, WORDS // CHUNKS, BLOCK_N).reshape(WORDS, BLOCK_N)
        zero = zero[:, None, :].broadcast_to(CHUNKS, WORDS // CHUNKS, BLOCK_N).reshape(WORDS, BLOCK_N)

        # NEW: a product a nibble.
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + (offs_j * 8)[None, :]  # [BLOCK_M, WORDS]
        for i in tl.static_range(8):
            x = tl.load(x_ptrs + i, mask=(offs_m < M)[:, None] & in_k[None, :], other=0.0)
            w = (kilo_plus(word >> (4 * i)) - zero) * scale  # fp16 [WORDS, BLOCK_N]
            acc = tl.dot(x, w.to(x.dtype), acc)

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for m tokens."""
    # x & -x: the largest power of two that divides x
    options = {"CHUNK": min(128, group_size & -group_size), "BLOCK_K": 128}
    if m <= 32:
        return options | {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}
    return options | {"BLOCK_M": 64, "BLOCK_N": 128, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}


def matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x @ w^T with an int4 weight, dequantized on the fly and accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: of [N, K], any group size.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight)
    x_2d = x.reshape(-1, k).contiguous()
    weight = QuantizedWeight(*(tensor.contiguous() for tensor in weight))
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    options = launch_options(m, weight.group_size)
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]),)
    unpack_kernel[grid](x_2d, *weight, out, m, n, k, GROUP_SIZE=weight.group_size, **options)
    return out.view(*x.shape[:-1], n)


def prepare(weight: QuantizedWeight) -> QuantizedWeight:
    """This lesson reads the file's format as it is."""
    return weight


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int4 weight."""
    return common.check_matmul(matmul, prepare, [(1, 40, 256, 64), (17, 33, 384, 96), (70, 130, 320, 320)])


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare)


if __name__ == "__main__":
    common.run_lesson(check, bench)
