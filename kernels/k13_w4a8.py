"""Lesson 13: 8-bit activations (W4A8). NEW: integers all the way, at twice the tensor cores' rate.

Run it:  python -m kernels.k13_w4a8 --check     (against float64; needs no GPU)
         python -m kernels.k13_w4a8 --bench     (on a GPU)

THE IDEA. With thousands of tokens arithmetic decides, and tensor cores multiply 8-bit numbers twice as fast as 16-bit
ones. The weight has but 4 bits; give the activations 8: one scale a token, max |x| / 127 (activations.py). And the
weight? Its codes are small whole numbers already, but every group has a scale of its own, and an integer sum over all
of K wants one scale a row. So round once more: w8 = round((code - zero) * scale / row_scale), 255 levels a row where
a group uses 16. Then the whole sum over K is exact, in int32, and two multiplications at the end undo the scales.

NEW: rounding for nothing. fp16 numbers from 1024 to 2048 are 1 apart, so

    fma(code - zero, scale / row_scale, 1536)

rounds the product to a whole number, and leaves it, as an int8, in the low byte of 1536 + w8. Two half-words' worth
of bytes are then picked together by one `prmt`. 15 instructions for eight weights. scale / row_scale is made in the
loop, by three for a row's weights of a step: a weight comes with its row scales, 4 bytes each (prepared.py).

THE PRICE. Accuracy: activations are off by up to max |x| / 254, so for normal numbers, K = 8192, about 0.9% of their
size, and the weight's second rounding adds about half as much: 1% together, beside the 10% that int4 weights are off
already. Outliers cost more: one activation a hundred times the others leaves them one level. Time: at M = 2048,
8192 x 8192 275 G operations at some 1,300 T a second and not 700, 210 microseconds; and a pass over x first: read 2
bytes, write 1.

WHO READS WHAT. As in lesson 7, out^T = w8 x8^T, with tiles of bytes:

    bytes of codes [BLOCK_N, BLOCK_K / 2]       low nibbles: left operand of the first product, high: of the second
    x8 [BLOCK_K / 2, BLOCK_M], twice            in the order that puts low nibbles' columns first (activations.py)

MEASURED on an H200 (results/k13_w4a8.json: command, versions, date; 8192 x 8192, group size 128), all passes counted:

    M            128     512    2048
    lesson 13     66     130     496    microseconds (group size 64: 70, 138, 529)
    of fp16    0.57x   0.71x   0.72x    39%, 80% and 83% of the roofline of 16-bit arithmetic

The loop makes scale / row_scale itself; as long as they came ready-made it took 66, 132 and 501. Predicted: the tensor
cores' 210 microseconds at M = 2048. It gains a tenth on lesson 8 (553) and no more: probably the tensor cores were not
what it waited for. Dequantizing and multiplying still take turns, and making int8 operands costs more instructions than
fp16 ones. Lesson 15, where they overlap, takes 269. The error came out as foretold: 1.0 to 1.5% (results/matmul.json).
  A surprise, at the other end: with one token it took 87 microseconds at group size 128, in steps of 128 along K, and
43 at 64, in steps of 64, where lesson 10 took 17 to 18 (results/attempts.json). Few tokens are no case for it; the
launcher has taken steps of 64 for them since.

NEXT. Lesson 14 leaves the kernels alone and chooses among their options; lesson 15 puts this idea into lesson 12's
loop. EXERCISE. fp8 instead: a nibble in a byte is an fp8 number (e4m3) already, which? What would that save, and cost?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.activations import quantize_activations
from kernels.prepared import BLOCK, PreparedWeight, prepare

TOLERANCE = 0.02  # relative error; see THE PRICE


@triton.jit
def requantize(byte, word, inverse, ASM: tl.constexpr):
    """Two codes a byte -> two int8: round((code - zero) * scale / row_scale) of the low ones, and of the high ones.

    byte: int8 [BLOCK_N, BLOCK_K/2]; word: scale_zeros [BLOCK_N, 1 or BLOCK_K/2], for the assembly one a row; inverse:
    fp32 1 / row_scale [BLOCK_N, 1].
    """
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    ratio = scale.to(tl.float32) * inverse
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + zero
    if ASM:  # four bytes at a time; the codes of bytes 0 and 2 in one register, of 1 and 3 in another
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 shifted, e0, e1, o0, o1, offset, sixteenth, magic;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 magic, 0x66006600;
            mov.b32 offset, 0x63806380;
            sub.f16x2 offset, offset, $5;
            shr.u32 shifted, $2, 8;
            lop3.b32 e0, $2, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 e1, $2, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 o0, shifted, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 o1, shifted, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 e0, e0, $5;
            sub.f16x2 o0, o0, $5;
            fma.rn.f16x2 e1, e1, sixteenth, offset;
            fma.rn.f16x2 o1, o1, sixteenth, offset;
            fma.rn.f16x2 e0, e0, $3, magic;
            fma.rn.f16x2 o0, o0, $3, magic;
            fma.rn.f16x2 e1, e1, $3, magic;
            fma.rn.f16x2 o1, o1, $3, magic;
            prmt.b32 e0, e0, o0, 0x6240;
            prmt.b32 $1, e1, o1, 0x6240;
            mov.b32 $0, e0;
            }""",
            "=r,=r,r,r,r,r,r",
            [byte, ratio.to(tl.float16).broadcast_to(byte.shape), zero.broadcast_to(byte.shape)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        zero = zero.to(tl.float32) - 1024.0
        low = (((byte & 0xF).to(tl.float32) - zero) * ratio + 12582912.0 - 12582912.0).to(tl.int8)
        high = ((((byte >> 4) & 0xF).to(tl.float32) - zero) * ratio + 12582912.0 - 12582912.0).to(tl.int8)
    return low, high


@triton.jit
def w4a8_kernel(
    x8_ptr,  # int8 [M, 64 * blocks]
    token_scales_ptr,  # fp32 [M]
    codes_ptr,  # int8 [N/16, blocks, 16, 32]: the bytes of the half-words
    scale_zeros_ptr,  # int32 [groups, N]
    row_scales_ptr,  # fp32 [N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    blocks,
    HAS_BIAS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ASM: tl.constexpr,
):
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T + bias, transposed."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows_m = tl.minimum(offs_m, M - 1)
    rows_n = tl.minimum(offs_n, N - 1)
    b = tl.arange(0, BLOCK_K // 2)  # bytes of a step
    row_starts = (rows_n // 16).to(tl.int64) * (blocks * 512) + rows_n % 16 * 32
    codes_ptrs = codes_ptr + row_starts[:, None] + (b // 32 * 512 + b % 32)[None, :]  # [BLOCK_N, BLOCK_K/2]
    x8_ptrs = x8_ptr + rows_m.to(tl.int64)[None, :] * (blocks * 64) + (b // 32 * 64 + b % 32)[:, None]
    column = b // 32 * 64 + b % 2 * 32 + b % 32 // 2  # of the low nibbles; the high ones' lie 16 further

    row_scales = tl.load(row_scales_ptr + rows_n)[:, None]
    inverse = 1.0 / tl.maximum(row_scales, 1e-30)  # a row of zeros has the row scale 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for k in range(0, blocks * 64, BLOCK_K):
        byte = tl.load(codes_ptrs + k // 64 * 512)
        word_ptrs = scale_zeros_ptr + rows_n[:, None]
        if GROUP_SIZE % BLOCK_K == 0:  # a scale and a zero for the whole step
            low, high = requantize(byte, tl.load(word_ptrs + k // GROUP_SIZE * N), inverse, ASM)
        else:  # one for each byte's low nibble, and one for its high one
            low, _ = requantize(byte, tl.load(word_ptrs + ((k + column) // GROUP_SIZE * N)[None, :]), inverse, False)
            words = tl.load(word_ptrs + ((k + column + 16) // GROUP_SIZE * N)[None, :])
            _, high = requantize(byte, words, inverse, False)
        acc = tl.dot(low, tl.load(x8_ptrs + k), acc, out_dtype=tl.int32)
        acc = tl.dot(high, tl.load(x8_ptrs + k + 32), acc, out_dtype=tl.int32)

    out = acc.to(tl.float32) * tl.load(token_scales_ptr + rows_m)[None, :] * row_scales
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def launch_options(m: int, group_size: int) -> dict[str, int]:
    """Block sizes, warps and stages for m tokens."""
    if m <= 64:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": BLOCK, "num_warps": 4, "num_stages": 4}
    block_k = 128 if group_size % 128 == 0 else BLOCK
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias with an int4 weight and int8 activations, summed exactly in int32.

    Args:
        x: float16 or bfloat16 [..., K]; quantized to int8 on the way, a scale a token.
        weight: of [N, K], any group size.
        bias: floating [N].

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
    x8, token_scales = quantize_activations(x_2d)
    options = launch_options(m, weight.group_size)
    grid = (common.cdiv(m, options["BLOCK_M"]) * common.cdiv(n, options["BLOCK_N"]),)
    w4a8_kernel[grid](
        x8,
        token_scales,
        weight.codes.view(torch.int8),
        weight.scale_zeros,
        weight.row_scales,
        bias,
        out,
        m,
        n,
        weight.blocks,
        HAS_BIAS=bias is not None,
        GROUP_SIZE=weight.group_size,
        GROUP_M=8,
        ASM=common.ON_NVIDIA,
        **options,
    )
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int4 weight and the activations as they were."""
    shapes = [(1, 40, 512, 64), (17, 33, 384, 96), (70, 130, 256, 128), (5, 9, 80, 16)]
    return common.check_matmul(matmul, prepare, shapes, TOLERANCE)


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare, tokens=(128, 512, 2048))


if __name__ == "__main__":
    common.run_lesson(check, bench)
