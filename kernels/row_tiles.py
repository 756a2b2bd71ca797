"""Sixteen rows of an int4 weight times eight or sixteen tokens, on tensor cores, from registers: for lessons 17 on.

The instruction is mma.sync m16n8k16, which every tensor core since sm_80 has: a tile of 16 rows x 16 columns of w times
16 columns x 8 tokens of x^T. A warp's 32 threads hold the operands. Thread 4r + t wants

    of w     rows r and r + 8            columns 2t, 2t + 1, 2t + 8, 2t + 9         of x     token r, the same columns

and that is less of a demand than it seems. A sum does not mind its order: as long as both operands call the same number
"column 2t + 8", any column of memory may be it. So thread t takes four *neighbours*, 4t .. 4t + 3, for its four:

    half-words of a row of a block      0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15        (kernels.prepared)
    thread                                t = 0     t = 1      t = 2        t = 3          8 bytes each, one load
    x of slice i, from column 16 i         ..3       ..7        ..11         ..15          8 bytes each, one load

Half-word j holds columns j of all four slices, so the 8 bytes are the thread's part of four tiles of w: with four
masks and a shift a word they are the operands of four instructions. No shared memory, no exchange between threads.

A program's warps share the columns: block b, of 64, belongs to warp b modulo num_warps (but see lesson 17's passes).
The scale waits until the products of a block are summed (fp32): 4 multiplications for 32 weights, in place of 32. The
zero cannot wait, as 1024 + code would cost the sum three digits.

For lessons 15 and 23 the operands of int8 products: `make_operand`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kernels import common
from kernels.prepared import BLOCK, TILE_ROWS

ROWS = gl.constexpr(TILE_ROWS)  # of the weight, a program
MANY_ROWS = 16384  # of the weight: a thousand programs
# `barrier` is so called since Triton 3.7, `async_load` since 3.9.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def power_of_two_above(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@gluon.jit
def unpack(half_word):
    """int16 -> its four codes as fp16: 1024 + code, 1024 + 16 code, 1024 + code, 1024 + 16 code (lesson 6)."""
    return gl.inline_asm_elementwise(
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
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def requantize(half_words, ratio, zero):
    """Four half-words, two of each of two words -> int8 of the words' low nibbles and high nibbles (lesson 13).

    half_words: int16; ratio: fp16 scale / row_scale; zero: fp16 1024 + zero; all of one shape.
    Returns: low nibbles of the first word, high ones, low ones of the second word, high ones; int8, four in a register.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, e0, e1, o0, o1, offset, sixteenth, magic, first_low, first_high;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 magic, 0x66006600;
        mov.b32 offset, 0x63806380;
        sub.f16x2 offset, offset, $8;
        shr.u32 shifted, $4, 8;
        lop3.b32 e0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 e1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 o0, shifted, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 o1, shifted, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 e0, e0, $8;
        sub.f16x2 o0, o0, $8;
        fma.rn.f16x2 e1, e1, sixteenth, offset;
        fma.rn.f16x2 o1, o1, sixteenth, offset;
        fma.rn.f16x2 e0, e0, $6, magic;
        fma.rn.f16x2 o0, o0, $6, magic;
        fma.rn.f16x2 e1, e1, $6, magic;
        fma.rn.f16x2 o1, o1, $6, magic;
        prmt.b32 first_low, e0, o0, 0x6240;
        prmt.b32 first_high, e1, o1, 0x6240;
        mov.b32 offset, 0x63806380;
        sub.f16x2 offset, offset, $9;
        shr.u32 shifted, $5, 8;
        lop3.b32 e0, $5, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 e1, $5, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 o0, shifted, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 o1, shifted, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 e0, e0, $9;
        sub.f16x2 o0, o0, $9;
        fma.rn.f16x2 e1, e1, sixteenth, offset;
        fma.rn.f16x2 o1, o1, sixteenth, offset;
        fma.rn.f16x2 e0, e0, $7, magic;
        fma.rn.f16x2 o0, o0, $7, magic;
        fma.rn.f16x2 e1, e1, $7, magic;
        fma.rn.f16x2 o1, o1, $7, magic;
        prmt.b32 $2, e0, o0, 0x6240;
        prmt.b32 $3, e1, o1, 0x6240;
        mov.b32 $0, first_low;
        mov.b32 $1, first_high;
        }""",
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [half_words, ratio, zero],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def invert(row_scales):
    """fp32 -> its inverse; of 0, a row of zeros, anything finite."""
    return 1.0 / gl.maximum(row_scales, 1e-30)


@gluon.jit
def make_operand(half_words, words, inverses, left16: gl.constexpr, left8: gl.constexpr):
    """int16 [ROWS, 16] and the rows' scale_zeros and inverse row scales [ROWS] -> int8 [ROWS, 64], a left operand."""
    ROWS: gl.constexpr = half_words.shape[0]
    scale = (words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    ratio = (scale.to(gl.float32) * inverses).to(gl.float16)
    zero = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True)  # 1024 + zero
    a, b, c, d = requantize(half_words, gl.expand_dims(ratio, 1), gl.expand_dims(zero, 1))
    # Names for what lies where; nothing moves. A register's four bytes bear the names of the half-words it came from:
    # [row / 16, its upper half, row % 8, second word, c, its half-word], word's upper half, s
    w = gl.join(gl.join(a, c), gl.join(b, d)).reshape([ROWS // 16, 2, 8, 2, 4, 2, 2, 2])
    w = w.permute([0, 6, 2, 7, 3, 4, 1, 5]).reshape([ROWS, 64])
    return gl.convert_layout(w, left8, assert_trivial=True)


@gluon.jit
def as_left(w, mma: gl.constexpr):
    """[W, R, 4, 4], four neighbours a thread -> [W, R, 16], the left operand. Only names change, no register moves."""
    W: gl.constexpr = w.shape[0]
    R: gl.constexpr = w.shape[1]
    w = w.reshape([W, R, 4, 2, 2]).permute([0, 1, 3, 2, 4]).reshape([W, R, 16])
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def as_right(x, mma: gl.constexpr):
    """[W, TOKENS, 4, 4] of x -> [W, 16, TOKENS], the right operand."""
    W: gl.constexpr = x.shape[0]
    TOKENS: gl.constexpr = x.shape[1]
    x = x.reshape([W, TOKENS, 4, 2, 2]).permute([0, 3, 2, 4, 1]).reshape([W, 16, TOKENS])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def places_of_codes(num_warps: gl.constexpr):
    """What a thread loads of a block's codes, as above: its warp, [W]; rows of a tile, [ROWS]; half-words, [4, 4]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [num_warps, 1, 1, 1], [3, 2, 1, 0])
    of_row: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))  # [W, ROWS]
    of_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))  # [4, 4]
    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, of_row))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, of_row))
    thread = gl.arange(0, 4, layout=gl.SliceLayout(1, of_column))
    neighbour = gl.arange(0, 4, layout=gl.SliceLayout(0, of_column))
    return warp, row, (thread * 4)[:, None] + neighbour[None, :]


@gluon.jit
def load_weight(
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    first_row,  # a multiple of 16
    N,
    blocks,
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Blocks w, w + num_warps, w + 2 num_warps, ... for warp w: STEP codes [W, ROWS, 4, 4], STEP scale_zeros [W, ROWS].

    Blocks past the end are copies of the last one, with scales of 0. Rows past the end of N are not stored: they may
    hold anything finite.
    """
    warp, row, half_word = places_of_codes(num_warps)
    n = gl.minimum(first_row + row, N - 1)
    tile = gl.minimum((first_row + row) // 16, (N - 1) // 16)
    row_ptrs = codes_ptr + tile.to(gl.int64) * (blocks * 256) + row % 16 * 16
    ptrs = row_ptrs[None, :, None, None] + half_word[None, None, :, :]
    codes = ()
    words = ()
    for i in gl.static_range(STEP):
        block = i * num_warps + warp
        last = gl.minimum(block, blocks - 1)
        codes += (gl.load(ptrs + (last * 256)[:, None, None, None]),)
        group_ptrs = scale_zeros_ptr + (last * 64 // GROUP_SIZE * N)[:, None] + n[None, :]
        words += (gl.load(group_ptrs, mask=(block < blocks)[:, None], other=0),)
    return codes, words


@gluon.jit
def copy_blocks(
    x,  # shared memory [at least USED * BLOCK_M, 64]
    x_ptr,  # fp16 or bf16 [M, K]
    M,
    K,
    blocks,
    BLOCK_M: gl.constexpr,
    USED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Asks for the first USED blocks of x: all tokens of one, then of the next."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])  # 16 bytes a thread
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    block = gl.minimum(row // BLOCK_M, blocks - 1)
    token = row % BLOCK_M
    mask = ((token < M) & (row < USED * BLOCK_M))[:, None]
    copy(x, x_ptr + (token * K + block * 64)[:, None] + column[None, :], mask)


@gluon.jit
def share_tokens(
    x_ptr,  # fp16 or bf16 [M, K]
    M,
    K,
    blocks,
    BLOCK_M: gl.constexpr,
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    """All of x into shared memory, each number once: [blocks * BLOCK_M, 64], all tokens of block 0, of block 1, ...

    K is a multiple of 64. Blocks past the end are copies of the last. Tokens past the end hold anything: no other
    token's result sees them.
    """
    BLOCKS: gl.constexpr = power_of_two_above(STEP * num_warps)
    # Swizzled: the same columns of eight tokens lie in different banks.
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8 if BLOCK_M >= 8 else 1, [1, 0])
    x = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [BLOCKS * BLOCK_M, 64], shared)
    copy_blocks(x, x_ptr, M, K, blocks, BLOCK_M, STEP * num_warps, num_warps)
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()
    return x


@gluon.jit
def share_parts(
    outs_ptr,  # fp16 [heads, SPLITS, 64]
    logs_ptr,  # fp32 [heads, SPLITS]
    splits,
    heads,
    SPLITS: gl.constexpr,
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One token's attention, joined from the first `splits` parts of each head, into shared memory like `share_tokens`.

    A head has 64 numbers, a block of columns. Heads past the end are copies of the last.
    """
    BLOCKS: gl.constexpr = power_of_two_above(STEP * num_warps)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    head = gl.minimum(gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, layout)), heads - 1)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    outs = ()
    logs = ()
    for i in gl.static_range(SPLITS):
        there = i < splits
        logs += (gl.load(logs_ptr + head * SPLITS + i, mask=there, other=float("-inf")),)
        ptrs = outs_ptr + ((head * SPLITS + i) * 64)[:, None] + column[None, :]
        outs += (gl.load(ptrs, mask=there, other=0.0),)
    top = gl.full([BLOCKS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    for i in gl.static_range(SPLITS):
        top = gl.maximum(top, logs[i])
    x = gl.zeros([BLOCKS, 64], gl.float32, layout)
    total = gl.zeros([BLOCKS], gl.float32, gl.SliceLayout(1, layout))
    for i in gl.static_range(SPLITS):
        weight = gl.exp2(logs[i] - top)
        total += weight
        x += outs[i].to(gl.float32) * weight[:, None]
    x = (x / total[:, None]).to(gl.float16)
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    memory = gl.allocate_shared_memory(gl.float16, [BLOCKS, 64], shared, x)
    barrier()
    return memory


@gluon.jit
def four_slices(x, W: gl.constexpr, TOKENS: gl.constexpr):
    """A step's blocks of x from shared memory, [W * TOKENS, 64] -> its slices, four tensors [W, TOKENS, 4, 4].

    A single token, [W, 64], stands for all eight: only the first of the eight results will be used.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 8, 1, 4, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    probe = gl.zeros([W, TOKENS, 4, 4, 4], x.dtype, layout)
    if x.shape[0] == W:
        token: gl.constexpr = gl.SliceLayout(1, probe.reshape([W, TOKENS, 64]).type.layout)
        numbers = gl.expand_dims(x.load(token), 1).broadcast_to([W, TOKENS, 64])
    else:
        tokens: gl.constexpr = probe.reshape([W * TOKENS, 64]).type.layout
        numbers = x.load(tokens)
    # The slice's number, of two bits, goes to the end and is split off bit by bit.
    even, odd = gl.split(numbers.reshape([W, TOKENS, 2, 2, 4, 4]).permute([0, 1, 4, 5, 2, 3]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def left_operands(codes, words, DTYPE: gl.constexpr, mma: gl.constexpr):
    """A block's codes less their zeros, for each slice [W, ROWS, 16], and its scales, fp32 [W, ROWS, 1]."""
    zero = gl.expand_dims(gl.expand_dims((words >> 16).to(gl.int16).to(gl.float16, bitcast=True), 2), 3)  # 1024 + zero
    scale = (words & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    scale = gl.convert_layout(scale, gl.SliceLayout(2, mma), assert_trivial=True)
    c0, c1, c2, c3 = unpack(codes)
    # The odd ones are 1024 + 16 code: a sixteenth of that is 64 + code, and zero - 960 is 64 + zero.
    w0 = as_left((c0 - zero).to(DTYPE), mma)
    w1 = as_left((c1 * 0.0625 - (zero - 960.0)).to(DTYPE), mma)
    w2 = as_left((c2 - zero).to(DTYPE), mma)
    w3 = as_left((c3 * 0.0625 - (zero - 960.0)).to(DTYPE), mma)
    return w0, w1, w2, w3, gl.expand_dims(scale, 2)


@gluon.jit
def multiply(
    x,  # what `share_tokens` returned
    ready,  # what `make_ready` returned; () for nothing
    codes,  # what `load_weight` returned
    words,
    BLOCK_M: gl.constexpr,
    STEP: gl.constexpr,
    mma: gl.constexpr,
    num_warps: gl.constexpr,
):
    """ROWS rows of w x^T, summed over K and over the warps: fp32 [ROWS, TOKENS], TOKENS = 8 for a single one."""
    acc = gl.zeros([num_warps, ROWS, 8 if BLOCK_M == 1 else BLOCK_M], gl.float32, mma)
    for i in gl.static_range(len(ready)):
        acc = multiply_block(acc, ready[i], x.slice(i * num_warps * BLOCK_M, num_warps * BLOCK_M), mma)
    return gl.sum(accumulate(acc, x, codes, words, BLOCK_M, len(ready), STEP, mma, num_warps), 0)


@gluon.jit
def accumulate(
    acc,  # fp32 [W, ROWS, TOKENS]
    x,
    codes,
    words,
    BLOCK_M: gl.constexpr,
    FIRST: gl.constexpr,
    STEP: gl.constexpr,
    mma: gl.constexpr,
    num_warps: gl.constexpr,
):
    """acc and a warp's blocks FIRST to STEP - 1 of w x^T, not yet summed over the warps."""
    for i in gl.static_range(FIRST, STEP):
        left = left_operands(codes[i], words[i], x.dtype, mma)
        acc = multiply_block(acc, left, x.slice(i * num_warps * BLOCK_M, num_warps * BLOCK_M), mma)
    return acc


@gluon.jit
def multiply_block(acc, left, x, mma: gl.constexpr):
    """acc and the product of what `left_operands` returned with the same columns of x, [W * BLOCK_M, 64]."""
    w0, w1, w2, w3, scale = left
    x0, x1, x2, x3 = four_slices(x, acc.shape[0], acc.shape[2])
    part = gl.zeros(acc.shape, gl.float32, mma)
    part = mma_v2(w0, as_right(x0, mma), part)
    part = mma_v2(w1, as_right(x1, mma), part)
    part = mma_v2(w2, as_right(x2, mma), part)
    part = mma_v2(w3, as_right(x3, mma), part)
    return acc + part * scale


@gluon.jit
def make_ready(codes, words, N, DTYPE: gl.constexpr, mma: gl.constexpr, READY: gl.constexpr):
    """The operands of a warp's first READY blocks, and they are there when this returns.

    The assembler would make them where they are used, behind `gdc_wait`. So something must depend on them that it may
    not move: a trap, should they have bits in common with a number that is 0, which it does not know.
    """
    ready = ()
    bits, _, _, _, _ = left_operands(codes[0], words[0], DTYPE, mma)
    for i in gl.static_range(READY):
        w0, w1, w2, w3, scale = left_operands(codes[i], words[i], DTYPE, mma)
        bits = bits_of(bits_of(bits, w0, w1), w2, w3)
        ready += ((w0, w1, w2, w3, scale),)
    if READY > 0:
        nothing = (N >> 31).to(gl.int16).to(gl.float16, bitcast=True)
        gl.inline_asm_elementwise(
            """{
            .reg .pred broken;
            .reg .b32 common;
            and.b32 common, $1, $2;
            setp.ne.u32 broken, common, 0;
            @broken trap;
            mov.b32 $0, common;
            }""",
            "=r,r,r",
            [bits, nothing],
            dtype=gl.float16,
            is_pure=False,
            pack=2,
        )
    return ready


@gluon.jit
def bits_of(a, b, c):
    """The bits that any of three has, fp16 [W, ROWS, 16]."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xfe;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def load_sums(
    sums_ptr,  # fp32 [K/16, M, 2]
    M,
    K,
    TILES: gl.constexpr,  # at least K/16, a power of two
    BLOCK_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The sums of x, and of its squares, over each 16 columns: two fp32 [TILES, BLOCK_M].

    A warp has the sums of its tokens all to itself, 32 threads along the tiles; of a single token, each warp has all.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1])
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    ptrs = sums_ptr + (tile * M * 2)[:, None] + (token * 2)[None, :]
    mask = (tile * 16 < K)[:, None] & (token < M)[None, :]
    return gl.load(ptrs, mask=mask, other=0.0), gl.load(ptrs + 1, mask=mask, other=0.0)


@gluon.jit
def total_of(sums, layout: gl.constexpr):
    """fp32 [TILES, BLOCK_M] -> for each token the sum, [1, BLOCK_M], or a number where there is a single token."""
    if sums.shape[1] == 1:
        return gl.sum(gl.sum(sums, 0), 0)  # within a warp: no barrier
    else:
        return gl.convert_layout(gl.sum(sums, 0), gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def normalise(product, sums, squares, folded, K, eps, layout: gl.constexpr):
    """w (gamma x)^T, fp32 [ROWS, TOKENS] -> w (gamma (x - mean) / deviation)^T; folded: w gamma^T, fp32 [ROWS]."""
    mean = total_of(sums, layout) / K
    variance = gl.maximum(total_of(squares, layout) / K - mean * mean, 0.0)
    return (product - folded[:, None] * mean) * gl.rsqrt(variance + eps)


@gluon.jit
def gelu(x):
    """GPT-2's, in the tanh form: 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u))."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return x / (1 + gl.exp(-2 * u))


def launch_options(k: int) -> dict[str, int]:
    """Blocks of 64 columns a warp, and warps: as many warps as it takes to hold K = k columns in registers."""
    blocks = common.cdiv(k, BLOCK)
    warps = 4 if blocks <= 4 * 13 else 8
    return {"STEP": common.cdiv(blocks, warps), "num_warps": warps}


def ready_blocks(m: int, n: int, k: int) -> int:
    """How many of a warp's blocks `make_ready` should make: of a weight [N, K] = [n, k], for M = m tokens.

    Measured on an H200 in steps of GPT-2 (results/attempts.json), at two or three positions: four, as a rule, but for
    eight tokens with n_embd 1600 two. More take registers that other programs need. Where programs come in many rounds
    only the first round waits.
    """
    if n > MANY_ROWS or m > 8:
        return 0
    n_embd = k if k < 3072 else k // 4  # the MLP's second layer has K = 4 n_embd
    four = m == 1 or n_embd <= 1280
    return min(4 if four else 2, launch_options(k)["STEP"])
