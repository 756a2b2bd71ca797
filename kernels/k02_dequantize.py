"""Lesson 2: from packed int4 back to a weight. NEW: unpacking nibbles, one load that feeds eight results.

Run it:  python -m kernels.k02_dequantize --check     (against lesson 0; needs no GPU)
         python -m kernels.k02_dequantize --bench     (on a GPU)

THE IDEA. Lesson 1 backwards: load a word, shift it right by 0, 4, 8, ... 28, keep four bits each time, subtract the
group's zero, multiply by its scale. A program loads each word once and makes eight weights of it.

WHAT IT IS FOR. With many tokens at once a matrix product is limited by arithmetic, not by bytes: there, dequantizing
the weight once and calling the vendor's fp16 matmul is hard to beat. And lesson 4 does inside the matmul what is done
here outside it.

THE PRICE, before any code. The bytes of lesson 1 the other way round: for 8192 x 8192 at group size 64, 36.2 MB to
read and 134.2 MB to write, 170.4 MB in all; 40 microseconds at the 4.2 TB/s of a plain copy on an H200.

WHO READS WHAT. A program makes a tile of BLOCK_N rows and CHUNKS chunks of CHUNK weights along K. A chunk lies inside
one group, so it needs one scale and one zero a row:

    qweight [K/8, N]   reads [CHUNKS * CHUNK / 8, BLOCK_N] words, contiguous along N
    w       [N, K]     writes [BLOCK_N, CHUNKS * CHUNK] weights, contiguous along K
    word (j, n) -> w[n, 8j .. 8j+7]: nibble i is weight 8j + i

MEASURED on an H200 (results/k02_dequantize.json: command, versions, date): 49 microseconds at group size 64, 83% of a
plain copy's bandwidth, and 83% to 86% for all group sizes from 16 to whole rows. Predicted: 45. Unlike lesson 1, no
reduction and no search: what is left beside the bytes is the transposition through shared memory.
  A surprise: lower tiles are faster with small groups, taller ones with large groups (32 and 64 rows), by 5%: each
row brings a scale and a zero a group, and their loads are narrow.

NEXT. Lesson 3 is the fp16 matmul into which lesson 4 puts this one. EXERCISE. Write the weight transposed, [K, N]. No
shared memory is needed then: how much faster is that, and can torch's matmul take such a weight?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.k00_reference import QuantizedWeight, dequantize_reference, quantize_reference


@triton.jit
def dequantize_kernel(
    qweight_ptr,  # int32 [K/8, N]
    scales_ptr,  # fp16 [K/GROUP_SIZE, N]
    qzeros_ptr,  # int32 [K/GROUP_SIZE, ceil(N/8)]
    w_ptr,  # fp16, bf16 or fp32 [N, K]
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,  # a power of two that divides GROUP_SIZE, at least 16
    CHUNKS: tl.constexpr,  # chunks a program handles
    BLOCK_N: tl.constexpr,
):
    """Makes a tile of BLOCK_N rows by CHUNKS chunks of the weight."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_c = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)  # [CHUNKS]
    n_chunks = K // CHUNK
    in_range = (offs_n < N)[:, None] & (offs_c < n_chunks)[None, :]  # [BLOCK_N, CHUNKS]

    # One scale and one zero a row and chunk; the zero is a nibble of a word that eight rows share.
    group = offs_c * CHUNK // GROUP_SIZE  # [CHUNKS]
    scale = tl.load(scales_ptr + group[None, :] * N + offs_n[:, None], mask=in_range, other=0.0).to(tl.float32)
    zero_word = tl.load(qzeros_ptr + group[None, :] * tl.cdiv(N, 8) + offs_n[:, None] // 8, mask=in_range, other=0)
    zero = (zero_word >> (offs_n % 8 * 4)[:, None]) & 0xF  # [BLOCK_N, CHUNKS]

    # Each word once ...
    offs_j = offs_c[:, None] * (CHUNK // 8) + tl.arange(0, CHUNK // 8)[None, :]  # [CHUNKS, CHUNK/8], row of qweight
    qweight_ptrs = qweight_ptr + offs_j.to(tl.int64)[None, :, :] * N + offs_n[:, None, None]
    words = tl.load(qweight_ptrs, mask=in_range[:, :, None], other=0)  # [BLOCK_N, CHUNKS, CHUNK/8]

    # ... NEW: and eight codes from it. The sign bit that >> drags along is cut off by the mask.
    codes = (words[:, :, :, None] >> (4 * tl.arange(0, 8))) & 0xF  # [BLOCK_N, CHUNKS, CHUNK/8, 8]
    codes = tl.reshape(codes, [BLOCK_N, CHUNKS, CHUNK])
    w = (codes - zero[:, :, None]).to(tl.float32) * scale[:, :, None]

    offs_k = offs_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [CHUNKS, CHUNK]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None, None] * K + offs_k[None, :, :]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=in_range[:, :, None])


def launch_options(group_size: int) -> dict[str, int]:
    """Block sizes and warps: tiles 128 weights wide, of fewer rows where a row has several scales and zeros."""
    chunk = min(128, group_size & -group_size)  # x & -x: the largest power of two that divides x
    return {
        "CHUNK": chunk,
        "CHUNKS": 128 // chunk,
        "BLOCK_N": 64 if chunk == 128 else 32,
        "num_warps": 8 if chunk >= 64 else 4,
    }


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for, rounded once from the exact product.

    Args:
        weight: on a GPU (or on a CPU, in Triton's interpreter).
        dtype: float16, bfloat16 or float32.

    Returns:
        `dtype` [N, K].

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype is {dtype}, it must be float16, bfloat16 or float32")
    weight = QuantizedWeight(*(tensor.contiguous() for tensor in weight))
    n, k = weight.out_features, weight.in_features
    w = torch.empty((n, k), dtype=dtype, device=weight.qweight.device)
    options = launch_options(weight.group_size)
    grid = (triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(k // options["CHUNK"], options["CHUNKS"]))
    dequantize_kernel[grid](*weight, w, n, k, GROUP_SIZE=weight.group_size, **options)
    return w


def check() -> Iterator[common.Check]:
    """The kernel's weights against lesson 0's: equal bit for bit."""
    for n, k, group_size in [(40, 256, 64), (17, 384, 96), (8, 1600, 1600)]:
        for symmetric in (True, False):
            packed = quantize_reference(common.random_tensor(n, k, seed=n), group_size, symmetric)
            for dtype in [*common.ACTIVATION_DTYPES, torch.float32]:
                equal = torch.equal(dequantize(packed, dtype), dequantize_reference(packed, dtype))
                yield f"{n} x {k}, {group_size=}, {symmetric=}, {dtype}", equal


def bench() -> list[common.Row]:
    """Times an 8192 x 8192 weight for several group sizes, beside the time its bytes allow."""
    n = k = 8192
    rows = []
    for group_size in (16, 32, 64, 128, 256, 1024, 4096, 8192):
        packed = [quantize_reference(common.random_tensor(n, k, seed=seed), group_size) for seed in range(3)]
        n_bytes = 2 * n * k + sum(t.numel() * t.element_size() for t in packed[0])
        time = common.microseconds(dequantize, [(p,) for p in packed])
        rows.append(
            {
                "n": n,
                "k": k,
                "group_size": group_size,
                "microseconds": time,
                "gigabytes_per_second": n_bytes / time / 1000,
                "share_of_copy": common.floor_microseconds(n_bytes) / time,
            }
        )
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
