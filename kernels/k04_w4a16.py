"""Lesson 4: the textbook fused int4 matmul (W4A16): lesson 3 with lesson 2 inside. NEW: dequantizing in the loop.

Run it:  python -m kernels.k04_w4a16 --check     (against float64; needs no GPU)
         python -m kernels.k04_w4a16 --bench     (on a GPU)

THE IDEA. Never write the fp16 weight to memory at all: where lesson 3 loads a tile of w, load the packed words, and
unpack, subtract, scale in registers, right before the tensor cores. 4-bit weights, 16-bit activations: W4A16.

THE PRICE, before any code. At M = 1 the bytes decide (lesson 3), and there are 3.7 times fewer: for 8192 x 8192 at
group size 64, 36 MB or 9 microseconds where fp16 takes 32. At M = 2048 arithmetic decides, and there is more of it
than before: the best to hope for is fp16's own speed.

THE CATCH. This is the way it is first written down, everywhere: one pointer a weight, `offs_k // 8`. Eight
neighbours along K point at the same word, so every word is loaded eight times over; the cache answers seven of them,
but the instructions are issued all the same, and so are a shift, a mask, a subtraction, a conversion and a
multiplication a weight, while the tensor cores wait. Measured below; the lessons that follow remove these costs one by
one.

WHO READS WHAT. As in lesson 3, with w's tile [BLOCK_K, BLOCK_N] made from

    qweight [BLOCK_K / 8, BLOCK_N] words      element (k, n) is nibble k % 8 of word (k // 8, n)
    scales, zeros [BLOCK_N]                   BLOCK_K divides GROUP_SIZE, so one row of each serves a whole step

MEASURED on an H200 (results/k04_w4a16.json: command, versions, date; 8192 x 8192, group size 64): 79 microseconds at
M = 1, where fp16 takes 38: 0.48x, and 11% of the roofline. At M = 128 0.21x, at M = 2048 0.20x, 24% of the roofline.
Predicted: 0.5x at M = 1, as eight loads of a word make 268 MB of requests out of 34, twice fp16's; and 0.3x where
arithmetic decides.
  Tried and failed: a pointer a weight for scales and zeros as well, which looks just as innocent. 1,334 microseconds
at M = 1 (results/attempts.json), 0.03x: seventeen times slower than this. Zeros that are neighbours along N share a
word, so their addresses repeat and cannot be loaded as vectors, but 4 bytes at a time, each a request of its own.
  A surprise: dequantizing the whole weight to memory first (lesson 2, 49 microseconds) and then calling fp16's matmul
takes as long at 16 tokens, and half as long at 128: 49 + 38 microseconds against 180. Lesson 11 comes back to that.

NEXT. The lessons to come load each word once. EXERCISE. Count the instructions a weight in the loop, and compare
their time at four a cycle and multiprocessor with what was measured at M = 2048.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.k00_reference import QuantizedWeight


@triton.jit
def w4a16_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    qweight_ptr,  # int32 [K/8, N]
    scales_ptr,  # fp16 [K/GROUP_SIZE, N]
    qzeros_ptr,  # int32 [K/GROUP_SIZE, ceil(N/8)]
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T, w dequantized on the way."""
    # The launch order and the tiles of x are lesson 3's.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None], other=0.0)  # BLOCK_K divides K: no end to watch

        # NEW: w's tile is not loaded but made.
        word_ptrs = qweight_ptr + (offs_k // 8).to(tl.int64)[:, None] * N + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
        word = tl.load(word_ptrs, mask=(offs_n < N)[None, :], other=0)
        code = (word >> (offs_k % 8 * 4)[:, None]) & 0xF
        group = k // GROUP_SIZE
        scale = tl.load(scales_ptr + group * N + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
        zero_word = tl.load(qzeros_ptr + group * tl.cdiv(N, 8) + offs_n // 8, mask=offs_n < N, other=0)
        zero = (zero_word >> (offs_n % 8 * 4)) & 0xF
        w = ((code - zero[None, :]).to(tl.float32) * scale.to(tl.float32)[None, :]).to(x.dtype)  # [BLOCK_K, BLOCK_N]

        acc = tl.dot(x, w, acc)

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for m tokens."""
    block_k = min(64, group_size & -group_size)  # x & -x: the largest power of two that divides x
    if m <= 32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}
    if m <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_k, "GROUP_M": 8, "num_warps": 8, "num_stages": 2}


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
    w4a16_kernel[grid](x_2d, *weight, out, m, n, k, GROUP_SIZE=weight.group_size, **options)
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
