"""Lesson 10: one token: a matrix-vector product. NEW: no tensor cores, the weight's loads ahead of everything else.

Run it:  python -m kernels.k10_gemv --check     (against float64; needs no GPU)
         python -m kernels.k10_gemv --bench     (on a GPU)

THE IDEA. Generating text, a model multiplies by one token at a time. Then every code is used once, for one product
and one sum, and a tensor core would have fifteen of its sixteen columns idle. What counts is how soon the loads of the
weight are under way, and how many at once. So: no shared memory, no barriers, no partner programs; a warp takes a few
whole rows, its 32 threads side by side along K,

    row n     |t0   t1|t2   t3|t4   t5| ... |t30 t31|  16 blocks of 64 codes, 512 bytes, are one load of 16 bytes a
    row n+1   |  ...                                   thread; x, 64 numbers a block, is loaded once for all ROWS rows

loads the next codes before it multiplies by the present ones, and adds up its threads' sums at the very end.

THE PRICE. Bytes: 34.6 MB for 8192 x 8192 at group size 128, 8.2 microseconds at an H200's 4.2 TB/s. And instructions,
of which a multiprocessor issues 128 lanes' worth a clock: 5 to take eight codes apart, 4 to subtract the zeros from
pairs of them, 8 to convert to fp32, 8 to multiply and add, a few more for scales and addresses: some 4 a weight, or
67 million * 4 / (132 * 128) clocks = 9 microseconds. The two overlap; neither is small.

In fp32, why? Pairs of fp16 multiply and add in half the instructions, but 15 * 65504 overflows, and eight fp16
sums lose a digit. The conversion is the price of being right for every x.

NEW as well: what may run before `gdc_wait` (lesson 9's early launch). A weight does not change between kernels, so its
first loads go there: they are under way while the kernel before is still finishing.

MEASURED on an H200 (results/k10_gemv.json: command, versions, date; 8192 x 8192): 15.0 microseconds at group size 128,
16.9 at 64; 2.5x and 2.3x of fp16, 55 and 51% of the roofline. Predicted: 12, nine for the instructions and a start and
an end of one or two. Smaller weights do better against fp16, whose kernels are not made for them: 2.9x at 512 x 2048,
2.0 microseconds in all (results/attempts.json).
  Tried and failed: products and sums of four in fp16, x scaled by a power of two for each block so that nothing
overflows. A fifth fewer instructions, 6% faster, four times the error (results/attempts.json). So instructions alone
are not what it waits for; what else, this measurement does not say.
  A surprise: with each row in one run of bytes, and not in tiles of 16 x 64, this kernel took 2 to 13% less time, where
lesson 12 took 3% more (results/attempts.json). One layout serves all; the tiles stayed.

NEXT. The other end: many tokens, where arithmetic decides (lesson 11). EXERCISE. Work out how many bytes must be
under way at any moment to read 4.2 TB/s when a load takes a microsecond, and how many this kernel has.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.prepared import BLOCK, PreparedWeight, prepare


@triton.jit
def products(word, z, x0, y0, x1, y1, x2, y2, x3, y3):
    """Eight codes, less their zero, times eight numbers: the sum, fp32. All slices share the zero.

    word: int32, two half-words; nibble i and nibble 4 + i belong to slice i, and are multiplied by x_i and y_i, fp32.
    z: 1024 + zero, fp16, twice in an int32.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, c0, c1, c2, c3, sixteenth, offset;
        .reg .f16 l, h;
        .reg .f32 f, p, q;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 offset, 0x63806380;                             // 960, so that
        sub.f16x2 offset, offset, $2;                           // this is -(64 + zero)
        shr.u32 shifted, $1, 8;
        lop3.b32 c0, $1, 0x000f000f, 0x64006400, 0xea;          // (word & mask) | magic
        lop3.b32 c1, $1, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 c2, shifted, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 c3, shifted, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 c0, c0, $2;
        fma.rn.f16x2 c1, c1, sixteenth, offset;
        sub.f16x2 c2, c2, $2;
        fma.rn.f16x2 c3, c3, sixteenth, offset;
        mov.b32 {l, h}, c0;
        cvt.f32.f16 f, l;
        mul.f32 p, f, $3;
        cvt.f32.f16 f, h;
        mul.f32 q, f, $4;
        mov.b32 {l, h}, c1;
        cvt.f32.f16 f, l;
        fma.rn.f32 p, f, $5, p;
        cvt.f32.f16 f, h;
        fma.rn.f32 q, f, $6, q;
        mov.b32 {l, h}, c2;
        cvt.f32.f16 f, l;
        fma.rn.f32 p, f, $7, p;
        cvt.f32.f16 f, h;
        fma.rn.f32 q, f, $8, q;
        mov.b32 {l, h}, c3;
        cvt.f32.f16 f, l;
        fma.rn.f32 p, f, $9, p;
        cvt.f32.f16 f, h;
        fma.rn.f32 q, f, $10, q;
        add.f32 $0, p, q;
        }""",
        "=f,r,r,f,f,f,f,f,f,f,f",
        [word, z, x0, y0, x1, y1, x2, y2, x3, y3],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def product(word, scale_zero, x, y):
    """The same for one slice, its nibbles moved to the lowest place, and scaled: in plain steps."""
    zero = low_half(scale_zero >> 16) - 1024.0
    difference = ((word & 0xF).to(tl.float32) - zero) * x + (((word >> 16) & 0xF).to(tl.float32) - zero) * y
    return difference * low_half(scale_zero)


@triton.jit
def low_half(pair):
    """The fp16 number in the low half of an int32, as fp32."""
    return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def halves(pair, BF16: tl.constexpr):
    """Two numbers, fp16 or bf16, in an int32 -> two fp32. A bf16 number is the upper half of an fp32 one."""
    if BF16:
        x = (pair << 16).to(tl.float32, bitcast=True)
        y = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        x = low_half(pair)
        y = low_half(pair >> 16)
    return x, y


@triton.jit
def load_row(codes_ptr, n, block, blocks):
    """The words of row n in the blocks `block`: int32 [BLOCKS, 8]; past the end of K anything, for there x is 0."""
    word = tl.arange(0, 8)
    row_ptr = codes_ptr + (n // 16).to(tl.int64) * (blocks * 128) + n % 16 * 8
    return tl.load(row_ptr + (block * 128)[:, None] + word[None, :], mask=(block < blocks)[:, None])


@triton.jit
def load_scale_zeros(scale_zeros_ptr, n, block, N, blocks, GROUP_SIZE: tl.constexpr):
    """The scale_zeros of row n in the blocks `block`, for each of their four slices: four int32 [BLOCKS]."""
    mask = block < blocks
    w0 = tl.load(scale_zeros_ptr + block * 64 // GROUP_SIZE * N + n, mask=mask, other=0)
    if GROUP_SIZE % 64 == 0:
        w1, w2, w3 = w0, w0, w0
    else:
        w1 = tl.load(scale_zeros_ptr + (block * 64 + 16) // GROUP_SIZE * N + n, mask=mask, other=0)
        w2 = tl.load(scale_zeros_ptr + (block * 64 + 32) // GROUP_SIZE * N + n, mask=mask, other=0)
        w3 = tl.load(scale_zeros_ptr + (block * 64 + 48) // GROUP_SIZE * N + n, mask=mask, other=0)
    return w0, w1, w2, w3


@triton.jit
def gemv_kernel(
    x_ptr,  # int32 [K/2]: pairs of fp16 or bf16
    codes_ptr,  # int32 [N/16, blocks, 16, 8]: pairs of half-words
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [N]
    N,
    K,
    blocks,
    HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes ROWS numbers of w @ x + bias, BLOCKS blocks of 64 along K at a time."""
    first_row = tl.program_id(0) * ROWS
    block = tl.arange(0, BLOCKS)
    word = tl.arange(0, 8)

    # NEW: the first loads of the weight, before anything else. Each row is a tensor of its own, in a tuple.
    rows, codes, scales, sums = (), (), (), ()
    for r in tl.static_range(ROWS):
        n = tl.minimum(first_row + r, N - 1)
        rows += (n,)
        codes += (load_row(codes_ptr, n, block, blocks),)
        scales += (load_scale_zeros(scale_zeros_ptr, n, block, N, blocks, GROUP_SIZE),)
        sums += (tl.zeros((BLOCKS, 8), dtype=tl.float32),)

    if PDL:  # x is what the kernel before wrote; from here on
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    for start in range(0, blocks, BLOCKS):
        # NEW: the next codes are on their way before the present ones are used.
        next_codes, next_scales, next_sums = (), (), ()
        for r in tl.static_range(ROWS):
            next_codes += (load_row(codes_ptr, rows[r], start + BLOCKS + block, blocks),)
            next_scales += (load_scale_zeros(scale_zeros_ptr, rows[r], start + BLOCKS + block, N, blocks, GROUP_SIZE),)

        # The pairs of x that word w of a block multiplies: 8i + w, for slice i.
        pairs = ((start + block) * 32)[:, None] + word[None, :]  # [BLOCKS, 8]
        x0, y0 = halves(tl.load(x_ptr + pairs, mask=pairs < K // 2, other=0), BF16)
        x1, y1 = halves(tl.load(x_ptr + pairs + 8, mask=pairs + 8 < K // 2, other=0), BF16)
        x2, y2 = halves(tl.load(x_ptr + pairs + 16, mask=pairs + 16 < K // 2, other=0), BF16)
        x3, y3 = halves(tl.load(x_ptr + pairs + 24, mask=pairs + 24 < K // 2, other=0), BF16)

        for r in tl.static_range(ROWS):
            if ASM and GROUP_SIZE % 64 == 0:
                zero = (scales[r][0] >> 16) & 0xFFFF
                pair = (zero | (zero << 16))[:, None].broadcast_to(codes[r].shape)
                total = products(codes[r], pair, x0, y0, x1, y1, x2, y2, x3, y3) * low_half(scales[r][0])[:, None]
            else:
                total = product(codes[r], scales[r][0][:, None], x0, y0)
                total += product(codes[r] >> 4, scales[r][1][:, None], x1, y1)
                total += product(codes[r] >> 8, scales[r][2][:, None], x2, y2)
                total += product(codes[r] >> 12, scales[r][3][:, None], x3, y3)
            next_sums += (sums[r] + total,)
        codes = next_codes
        scales = next_scales
        sums = next_sums

    for r in tl.static_range(ROWS):
        result = tl.sum(sums[r])
        if HAS_BIAS:
            result += tl.load(bias_ptr + rows[r]).to(tl.float32)
        tl.store(out_ptr + first_row + r, result.to(out_ptr.dtype.element_ty), mask=first_row + r < N)


def launch_options(n: int, k: int) -> dict[str, int]:
    """Rows a program, blocks a step and warps: many rows fill the machine by themselves, few need long steps."""
    rows = 4 if n >= 1024 else 2
    blocks = triton.next_power_of_2(common.cdiv(k, BLOCK))
    if n >= 4096 or blocks <= 16:
        return {"ROWS": rows, "BLOCKS": 16, "num_warps": 1}
    if blocks <= 32:
        return {"ROWS": rows, "BLOCKS": 32, "num_warps": 1}
    return {"ROWS": rows, "BLOCKS": 64, "num_warps": 4}


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for a single token, with an int4 weight, accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K], with one token: all dimensions but the last are 1.
        weight: of [N, K], any group size.
        bias: floating [N].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight, bias)
    if x.numel() != k:
        raise ValueError(f"x has shape {list(x.shape)}, this kernel multiplies one token: [1, {k}]")
    x_1d = x.reshape(k).contiguous()
    if x_1d.data_ptr() % 4:
        x_1d = x_1d.clone()  # pairs are read as 4-byte words
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    options = launch_options(n, k)
    gemv_kernel[(common.cdiv(n, options["ROWS"]),)](
        x_1d.view(torch.int32),
        weight.codes.view(torch.int32),
        weight.scale_zeros,
        bias,
        out,
        n,
        k,
        weight.blocks,
        HAS_BIAS=bias is not None,
        BF16=x.dtype == torch.bfloat16,
        GROUP_SIZE=weight.group_size,
        ASM=common.ON_NVIDIA,
        **options,
        **common.early_launch(),
    )
    return out


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, with the same int4 weight."""
    shapes = [(1, 40, 2048, 64), (1, 33, 384, 96), (1, 6, 80, 16), (1, 9, 8192, 8192)]
    return common.check_matmul(matmul, prepare, shapes)


def bench() -> list[common.Row]:
    """Times one token through a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare, tokens=(1,))


if __name__ == "__main__":
    common.run_lesson(check, bench)
