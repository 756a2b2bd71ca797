"""Lesson 11: many tokens. NEW: the whole weight written out once, at the speed of memory, for the vendor's matmul.

Run it:  python -m kernels.k11_dequantize_gemm --check     (against float64; needs no GPU)
         python -m kernels.k11_dequantize_gemm --bench     (on a GPU)

THE IDEA. The lessons before dequantize a tile of the weight anew for every BLOCK_M tokens: at M = 2048 sixteen times.
And then it is fed to a matmul in 200 lines of Triton, beside which the vendor's took years. So stop fusing: make the
fp16 weight once, in memory, and call `torch.nn.functional.linear`. The memory is needed for one layer at a time.
  Lesson 2 did this from the file's order, and had to turn its tiles through shared memory. The prepared order needs no
turning: 8 neighbouring half-words, 16 bytes, hold 8 neighbouring weights of each of 4 slices. A thread takes those of
one slice, and stores 16 bytes.

THE PRICE, before any code. The matmul then costs what fp16 costs, and on top of it comes the round trip, the same for
any M. For 8192 x 8192 at group size 64:

    read   codes 33.6 MB, scales and zeros 4.2 MB       write   fp16 weight 134.2 MB        172 MB at 4.2 TB/s: 41 us
    (and the matmul reads it again: 134.2 MB, which it does in fp16 too)

      M            1      16     128     512    2048    8192
      fp16         38     33      37      89     395    1580     microseconds, H200 (lesson 4; the last: 4 x 2048's)
      + 41      0.48x  0.45x   0.47x   0.68x   0.91x   0.97x     of fp16's speed: never above 1, and ever closer

It pays where a fused kernel is below this line. Lesson 8 is at 0.47x with 128 tokens, 0.54x with 512 and 0.70x with
2048: above the line with few tokens, on it with 128, below it with more. On GPUs of before Hopper, which lesson 12's
kernel does not run on, this is the end of the story for many tokens.

WHO READS WHAT. A program makes BLOCK_N rows of BLOCKS blocks of 64 weights:

    codes        [BLOCK_N, BLOCKS, 4, 8] words      word j of a block four times, once for each slice i: its nibbles i
                                                    and i + 4 are weights 16 i + 2 j and 16 i + 2 j + 1 of the block
    scale_zeros  [BLOCK_N, BLOCKS] words            one a row and block, or four where groups are no multiples of 64
    w            [BLOCK_N, BLOCKS * 64] weights     whole lines: eight threads, 16 bytes each, make 128 bytes of a row

To ask for the same bytes four times costs no memory: the four threads are in one warp, and their request is one.

MEASURED on an H200 (results/k11_dequantize_gemm.json: command, versions, date; 8192 x 8192, group size 64):

    M              1      16     128     512    2048
    lesson 8      38      39      77     160     560    microseconds
    lesson 11     91      87      89     132     413
    of fp16    0.42x   0.39x   0.43x   0.69x   0.87x    9% of the roofline at M = 1, 101% at M = 2048

(group size 128, M = 2048: 393.) Predicted: 0.89x of fp16 at M = 2048, 0.67x at M = 512. `dequantize` alone takes 47
microseconds, 87% of a plain copy's bandwidth.
  At first each thread kept its 8 half-words, and stored their four slices: pieces of 32 bytes, 128 bytes apart, of
which the L2 cache puts each line together. That took 55, and lesson 2, which turns its tiles to write long rows, 49:
the order that needs no turning was the slower one. The stores were suspected, and rightly: with whole lines 46 were
predicted.
  Afterwards, beside lesson 12 (results/attempts.json, front_door), times fp16: 8192 tokens of GPT-2's layers, 124M and
XL, take this lesson 0.92 to 0.97x and lesson 12 0.70 to 0.83x; 2048 tokens 0.79 to 0.88x and 0.45 to 0.94x. Lesson 12's
tiles are all of one size, and where they do not fill the machine's last round, it idles; the vendor has others.
  Tried and failed: a pointer to a scale for each word, which repeats. The compiler then gives neighbouring rows to
neighbouring threads, for the scales' sake, and turns every tile through shared memory: 5 barriers, 12 instructions a
weight. One pointer a block, and the tile keeps the codes' order: no shared memory at all, 7.8 instructions (compiled,
not timed). Lesson 9's early launch, so that the codes are there when the kernel ahead ends: 8192 tokens of GPT-2 took
as long, or up to 1% longer (0.8% less was predicted).

NEXT. Lesson 12: on Hopper dequantizing can hide behind the tensor cores entirely. EXERCISE. The weight need not be
written out whole: cut it in four along N, and each quarter, 34 MB, fits in an H200's L2 cache of 50 MB. Does the
matmul read it from there? What do three more launches cost?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.k00_reference import dequantize_reference, quantize_reference
from kernels.prepared import PreparedWeight, prepare


@triton.jit
def dequantize_prepared_kernel(
    codes_ptr,  # int32 [N/16, blocks, 16, 8]: pairs of half-words
    scale_zeros_ptr,  # int32 [ceil(64 * blocks / GROUP_SIZE), N]
    w_ptr,  # fp16, bf16 or fp32 [N, K]
    N,
    K,
    blocks,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Makes a tile of BLOCK_N rows by BLOCKS blocks of 64 of the weight."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    slices = tl.arange(0, 4)  # of a block
    in_range = (offs_n < N)[:, None] & (offs_b < blocks)[None, :]  # [BLOCK_N, BLOCKS]

    # NEW: each word four times, once for each slice, so that a row's weights come out in their order.
    row_starts = (offs_n // 16).to(tl.int64) * (blocks * 128) + offs_n % 16 * 8
    offs_j = (offs_b * 128)[:, None, None] + (slices * 0)[None, :, None] + tl.arange(0, 8)[None, None, :]  # the same
    word_ptrs = codes_ptr + row_starts[:, None, None, None] + offs_j[None, :, :, :]
    words = tl.load(word_ptrs, mask=in_range[:, :, None, None], other=0)  # [BLOCK_N, BLOCKS, 4, 8]
    if GROUP_SIZE % 64 == 0:  # the block's four slices lie in one group
        scale_zero_ptrs = scale_zeros_ptr + (offs_b * 64 // GROUP_SIZE * N)[None, :] + offs_n[:, None]
        scale_zeros = tl.load(scale_zero_ptrs, mask=in_range, other=0)[:, :, None, None]
    else:
        groups = (offs_b[:, None] * 64 + slices[None, :] * 16) // GROUP_SIZE  # [BLOCKS, 4]
        scale_zero_ptrs = scale_zeros_ptr + groups[None, :, :] * N + offs_n[:, None, None]
        scale_zeros = tl.load(scale_zero_ptrs, mask=in_range[:, :, None], other=0)[:, :, :, None]

    pairs = ((words >> (slices * 4)[None, None, :, None]) & 0x000F000F) | 0x64006400  # twice 1024 + code
    zero = low_half(scale_zeros >> 16)  # 1024 + zero
    left = product(low_half(pairs) - zero, low_half(scale_zeros), w_ptr.dtype.element_ty)
    right = product(low_half(pairs >> 16) - zero, low_half(scale_zeros), w_ptr.dtype.element_ty)
    w = tl.join(left, right).reshape((BLOCK_N, BLOCKS * 64))
    offs_k = tl.program_id(1) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(w_ptrs, w, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


@triton.jit
def low_half(pair):
    """The fp16 number in the low half of an int32."""
    return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def product(level, scale, dtype: tl.constexpr):
    """fp16 level * scale in `dtype`, rounded once: the level is exact in fp16, and in fp32 so is the product."""
    if dtype == tl.float16:
        return level * scale
    else:
        return (level.to(tl.float32) * scale.to(tl.float32)).to(dtype)


def dequantize(weight: PreparedWeight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for, rounded once from the exact product.

    Args:
        weight: of [N, K], any group size, prepared.
        dtype: float16, bfloat16 or float32.

    Returns:
        `dtype` [N, K].

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype is {dtype}, it must be float16, bfloat16 or float32")
    n, k = weight.out_features, weight.in_features
    w = torch.empty((n, k), dtype=dtype, device=weight.codes.device)
    options = launch_options()
    grid = (common.cdiv(n, options["BLOCK_N"]), common.cdiv(weight.blocks, options["BLOCKS"]))
    dequantize_prepared_kernel[grid](
        weight.codes.view(torch.int32),
        weight.scale_zeros,
        w,
        n,
        k,
        weight.blocks,
        GROUP_SIZE=weight.group_size,
        **options,
    )
    return w


def launch_options() -> dict[str, int]:
    """Block sizes and warps: 32 weights a thread, four loads and four stores of 16 bytes."""
    return {"BLOCK_N": 32, "BLOCKS": 4, "num_warps": 8}


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias: the weight written out in x's dtype, then torch's own matmul.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: of [N, K], any group size, prepared.
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    common.check_operands(x, weight, bias)
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias is {bias.dtype}, it must be {x.dtype}, as x is")
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def check() -> Iterator[common.Check]:
    """The weights against lesson 0's, equal bit for bit; the product against float64."""
    for n, k, group_size in [(40, 256, 64), (17, 384, 96), (8, 1600, 1600)]:
        packed = quantize_reference(common.random_tensor(n, k, seed=n), group_size)
        for dtype in [*common.ACTIVATION_DTYPES, torch.float32]:
            equal = torch.equal(dequantize(prepare(packed), dtype), dequantize_reference(packed, dtype))
            yield f"{n} x {k}, {group_size=}, {dtype}", equal
    yield from common.check_matmul(matmul, prepare, [(1, 40, 256, 64), (17, 33, 384, 96), (70, 130, 320, 320)])


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul, and dequantizing alone (m = 0)."""
    rows = common.bench_matmul(matmul, prepare)
    n = k = 8192
    for group_size in (64, 128):
        weights = [prepare(quantize_reference(common.random_tensor(n, k, seed=i), group_size)) for i in range(3)]
        n_bytes = 2 * n * k + weights[0].codes.nbytes + weights[0].scale_zeros.nbytes
        time = common.microseconds(dequantize, [(w,) for w in weights])
        share = common.floor_microseconds(n_bytes) / time
        sizes = {"m": 0, "n": n, "k": k, "group_size": group_size}
        rows.append({**sizes, "microseconds": time, "share_of_roofline": share})
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
