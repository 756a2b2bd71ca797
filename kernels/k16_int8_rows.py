"""Lesson 16: the output layer in int8: many rows, few tokens. NEW: one scale a row, which waits until the sum is done.

Run it:  python -m kernels.k16_int8_rows --check     (against float64; needs no GPU)
         python -m kernels.k16_int8_rows --bench     (on a GPU)

THE IDEA. GPT-2's last layer scores 50,257 tokens, with a weight that also embeds the tokens it reads: a third of the
smallest model, and more sensitive than the rest, as its errors are the logits' own. It gets 8 bits and one scale a
row (`kernels.int8`). Both make the kernel simple. A code is a byte, so nothing is taken apart; its scale is that of the
whole row, so it leaves the sum:

    out[m, n] = sum over k of x[m, k] * code[n, k] * scale[n]  =  scale[n] * (sum over k of x[m, k] * code[n, k])

One token: as in lesson 10, no tensor cores; a program takes ROWS whole rows and goes along K in steps of BLOCK_K,

    rows n..n+ROWS-1   | BLOCK_K codes | BLOCK_K | ... |      a thread loads 16 codes, 16 bytes, at once
                       x, fp32, the same for all rows          and keeps a sum for each of its columns until the end

A few tokens (2 to 16): tensor cores, the weight on the left as in lesson 7: codes -127..127 are fp16 numbers, and bf16
numbers, exactly. Tall and narrow weights have programs enough: nothing is split along K.

THE PRICE. Bytes: 50,257 x 768 is 38.6 MB, 9.2 microseconds at an H200's 4.2 TB/s; 50,257 x 1600 is 80.4 MB, 19
microseconds; FP16 takes twice that. Instructions for one token: a conversion, of which a multiprocessor starts 64 a
clock, and a multiply-add, 128 a clock, for each code: 38.6 million * (1/64 + 1/128) / 132 clocks = 3.9 microseconds,
less than half of what the bytes take. So, unlike lesson 10's, this kernel should be all bytes.

MEASURED on an H200 (results/k16_int8_rows.json: command, versions, date), microseconds (times fp16):

    K            768           1024          1280          1600
    M = 1        13.6 (2.1)    17.3 (2.0)    30.3 (1.5)    37.7 (1.5)
    M = 2        25.4 (1.5)    33.0 (1.5)    41.2 (1.5)    50.8 (1.5)
    M = 8        25.8 (2.1)    33.2 (2.1)    41.0 (2.1)    51.5 (2.1)
    M = 16       25.9 (2.2)    33.5 (2.3)    41.5 (2.2)    51.3 (2.3)

Predicted: 10 and 20 for one token at 768 and 1600, all bytes. At 768 and 1024 it reaches 70% of the memory's pace; 1280
and 1600 are no multiples of the 512 columns of a step, and take whole steps for the rest. With more tokens tl.dot's
copies by way of shared memory decide, not bytes.
  A surprise: two tokens took longer than sixteen, 34.2 and 65.2 at 768 and 1600, as long as missing tokens were read as
copies of the last; lesson 17 found out what that costs. Now they read as zeros, and take 25.3 and 50.9 (25 was
predicted for 768; results/attempts.json). Lesson 20, the same on tensor cores from registers, takes 22.5 and 39.0 for
eight tokens at 768 and 1600, LayerNorm and best token included.

NEXT. What remains of a decode step is in the launches themselves: fuse, and capture. EXERCISE. With int4 codes and
groups of 64 the weight has half the bytes. Work out lesson 10's instructions for it, and which of the two limits it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.int8 import Int8Weight, dequantize_int8, quantize_int8

MOST_TOKENS = 16


@triton.jit
def one_token_kernel(
    x_ptr,  # fp16 or bf16 [K]
    codes_ptr,  # int8 [N, K]
    scales_ptr,  # fp16 [N]
    out_ptr,  # fp16 or bf16 [N]
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes ROWS numbers of w @ x, BLOCK_K columns at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # Rows past the end are read as copies of the last one, which needs no mask, and not stored.
    row_ptrs = codes_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K + offs_k[None, :]  # [ROWS, BLOCK_K]

    # As in lesson 10: the weight's first loads come before x, and the next codes before the present ones are used.
    codes = tl.load(row_ptrs, mask=(offs_k < K)[None, :], other=0)
    scales = tl.load(scales_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    sums = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        next_k = start + BLOCK_K + offs_k
        next_codes = tl.load(row_ptrs + start + BLOCK_K, mask=(next_k < K)[None, :], other=0)
        x = tl.load(x_ptr + start + offs_k, mask=start + offs_k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        sums += codes.to(tl.float32) * x[None, :]
        codes = next_codes
    result = tl.sum(sums, axis=1) * scales  # NEW: the scale, once a row
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def few_tokens_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    codes_ptr,  # int8 [N, K]
    scales_ptr,  # fp16 [N]
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes a tile [ROWS, BLOCK_M] of w @ x^T, which is stored as out."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    tokens = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    code_ptrs = codes_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * K + offs_k[None, :]  # [ROWS, BLOCK_K]
    x_ptrs = x_ptr + tokens[None, :] * K + offs_k[:, None]  # [BLOCK_K, BLOCK_M]
    scales = tl.load(scales_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    acc = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = start + offs_k < K
        codes = tl.load(code_ptrs + start, mask=mask[None, :], other=0)
        x = tl.load(x_ptrs + start, mask=mask[:, None] & (tokens < M)[None, :], other=0.0)
        acc = tl.dot(codes.to(x.dtype), x, acc)  # NEW: whole numbers as they are
    result = acc * scales[:, None]
    out_ptrs = out_ptr + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


@triton.jit
def dequantize_kernel(
    codes_ptr,  # int8 [N, K]
    scales_ptr,  # fp16 [N]
    w_ptr,  # fp16, bf16 or fp32 [N, K]
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes a tile [ROWS, BLOCK_K] of the weight out."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs = rows.to(tl.int64)[:, None] * K + offs_k[None, :]  # [ROWS, BLOCK_K]
    mask = (rows < N)[:, None] & (offs_k < K)[None, :]
    codes = tl.load(codes_ptr + offs, mask=mask, other=0)
    scales = tl.load(scales_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    tl.store(w_ptr + offs, (codes.to(tl.float32) * scales).to(w_ptr.dtype.element_ty), mask=mask)


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for, for the vendor's matmul; bit for bit what `kernels.int8` makes of it.

    Args:
        weight: of [N, K], any shape.
        dtype: float16, bfloat16 or float32.

    Returns:
        `dtype` [N, K].
    """
    n, k = weight.codes.shape
    w = torch.empty((n, k), dtype=dtype, device=weight.codes.device)
    rows, block_k = 16, 256
    grid = (common.cdiv(n, rows), common.cdiv(k, block_k))
    dequantize_kernel[grid](*weight, w, n, k, ROWS=rows, BLOCK_K=block_k)
    return w


def launch_options(m: int, k: int) -> dict[str, int]:
    """Rows a program, columns a step, warps: for m tokens and rows of k codes."""
    if m == 1:
        return {"ROWS": 16, "BLOCK_K": 512 if k > 1024 else 256, "num_warps": 4}
    return {"ROWS": 32, "BLOCK_K": 64, "BLOCK_M": MOST_TOKENS, "num_warps": 4, "num_stages": 4}


def matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T for 1 to 16 tokens with an int8 weight, accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K], with 1 to 16 tokens.
        weight: of [N, K]; rows are read fastest where K is a multiple of 16.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight)
    x_2d = x.reshape(-1, k).contiguous()
    m = len(x_2d)
    if not 1 <= m <= MOST_TOKENS:
        raise ValueError(f"x has shape {list(x.shape)}, this kernel multiplies 1 to {MOST_TOKENS} tokens of {k}")
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    options = {**launch_options(m, k), **common.early_launch()}
    grid = (common.cdiv(n, options["ROWS"]),)
    if m == 1:
        one_token_kernel[grid](x_2d, *weight, out, n, k, **options)
    else:
        few_tokens_kernel[grid](x_2d, *weight, out, m, n, k, **options)
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int8 weight."""
    for m, n, k in [(1, 40, 768), (1, 33, 1600), (1, 5, 48), (3, 70, 200), (16, 130, 768)]:
        weight = quantize_int8(common.random_tensor(n, k, seed=1))
        w = dequantize_int8(weight, torch.float32).double()
        for dtype in common.ACTIVATION_DTYPES:
            x = common.random_tensor(m, k, dtype=dtype, seed=2)
            error = common.relative_error(matmul(x, weight), x.double() @ w.t())
            yield f"{m} x {n} x {k}, {dtype}, relative error {error:.1e}", error < common.tolerance(dtype)
            yield (
                f"{n} x {k}, written out in {dtype}",
                torch.equal(dequantize(weight, dtype), dequantize_int8(weight, dtype)),
            )


def bench() -> list[common.Row]:
    """Times GPT-2's four output layers beside torch's own fp16 matmul."""
    rows = []
    n = 50257
    for k in (768, 1024, 1280, 1600):
        weights = [common.random_tensor(n, k, seed=seed) for seed in range(common.copies_to_fill_cache(n * k))]
        int8 = [quantize_int8(w) for w in weights]
        n_bytes = sum(tensor.nbytes for tensor in int8[0])
        for m in (1, 2, 8, 16):
            x = common.random_tensor(m, k, seed=9)
            fp16 = common.microseconds(torch.nn.functional.linear, [(x, w) for w in weights])
            time = common.microseconds(matmul, [(x, w) for w in int8])
            rows.append(common.matmul_row({"m": m, "n": n, "k": k}, n_bytes, time, fp16))
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
