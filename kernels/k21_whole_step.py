"""Lesson 21: all blocks of a decode step in one kernel. NEW: programs that stay, and hand their numbers to each other.

Run it:  python -m kernels.k21_whole_step --check     (against float64; needs an NVIDIA GPU of sm_80 or newer)
         python -m kernels.k21_whole_step --bench

THE IDEA. A step of GPT-2 124M is 63 kernels, of which lessons 17 to 19 make each as short as they can; what is left is
that there are 63. So launch one, of as many programs as are at work at once (two a multiprocessor; a *cooperative*
launch refuses if they are not), and let them walk through all blocks together. A block is six phases; each phase's
jobs, tiles of 16 rows or parts of the context, are dealt out like cards, and the next phase goes on where it stopped:

    programs   0 .. 143   144 .. 191   192 .. 203   204 .. 251   252 .. 263, 0 .. 179   180 .. 227   228 .. 263, 0 ..
    job        q, k, v    attention    its joining  projection   MLP's first matrix     its second   next block: q, k, v

(124M at position 500). So most have a rest before their next job. In that they load its weight into registers, as
lesson 17 does ahead of `gdc_wait`, and then wait for x. How does one wait for numbers of other programs, without a
launch between? A counter takes three trips to the L2 cache, one after another: the numbers, the counter, and the
numbers again by who waited. So no counter: the numbers themselves say that they are there. Their place is cleared to a
NaN that no arithmetic makes, all bits 1, and `receive` loads it again and again until there is none left. Who clears?
There are two sets of places, taken in turn: a launch that writes to one clears the other for the next launch. Nothing
is ever counted, and a program never waits for those behind it. Every wait is for an earlier phase, so there is always
somebody who can go on.

THE PRICE. A trip to the L2 cache and back a wait, 0.7 microseconds, where a chain of empty kernels takes 0.7 to 0.8 a
kernel (lesson 17). What is to be gained is all else that a kernel does at its two ends. Predicted for a step at
position 500: 147 for 124M, 1.7 microseconds a phase with its work, and 790 for XL, where five kernels a block take 152
and 887.

WHO READS WHAT. As lessons 17 to 19. The numbers that are handed on are few: of one block, in fp16, all of

    query, key, value  3C | attention  C | gamma x  C | inside the MLP  4C | gamma x  C       and of x, in fp32, twice C

and each is read by all programs that multiply by it. All jobs share one kernel's registers: 255 a thread.

MEASURED on an H200 (results/attempts.json: versions, date; group size 64, output layer in int8), microseconds of a
step at positions 100, 500 and 1000:

                           124M                     medium                   XL
    five kernels a block   136.6   151.8   161.2    286.5   321.9   334.4     809.8    887.0    932.2
    one kernel             149.7   159.6   160.6    317.2   333.3   355.3    1044.6   1080.1   1134.9

(Five kernels have since become faster, as the projection joins the parts of attention, lesson 19, and each lets the
next one in at once, lesson 18: 124, 134 and 150 for 124M, 697, 739 and 787 for XL, in contexts of 128, 512 and 1024.
results/decode.json has both ways.)

Not faster: up to 11% slower at 124M and medium, level at 124M's position 1000, and 22 to 29% slower at XL. So
`FusedStep` remains what programs get. Why? Waits alone, with nothing between (`--bench`), take 0.94 microseconds for
768 numbers and 132 programs, 1.24 for 264, 1.46 for 396; by a counter, without the numbers, 0.91, 1.15 and 1.41. An
early launch, at 0.7 to 0.8, is no dearer than that. With waits that do not wait, and so with wrong numbers, 124M takes
98: six waits a block cost 61 of 160 microseconds, 0.85 each. So most of what a small kernel takes beside its work is
probably no launch, but the trip through the L2 cache that its numbers make, and a wait in its place makes it too.
  And the work is no faster. XL takes 628 even without waiting: a program that can do any phase is as large as the
largest (K = 6400 in four warps), 264 are all there is room for, and the 400 tiles of an MLP take them two rounds.
  Of the rest, 124M at position 500: without weights ahead of the wait 180; a program a multiprocessor 173; one of eight
warps 222; three programs, in 168 registers, 165; parts of 64 or 256 positions 157 and 167; resting 40 nanoseconds
between polls 163; launched early, 160: no different.

NEXT. For a step this is the end of the road as it is drawn here; lesson 22 returns to the matmul, to the gap between
lesson 17's few tokens and lesson 12's many. EXERCISE. The parts of attention are joined in a phase of their own;
lesson 19 leaves that to the next kernel. Let each program of the next phase do it here: a wait less, and how many bytes
more?
"""

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels import common
from kernels.k00_reference import quantize_reference
from kernels.prepared import BLOCK, TILE_ROWS, prepare
from kernels.row_tiles import ROWS, gelu, load_weight, multiply, normalise, power_of_two_above
from kernels.stream import BLOCK_L, Layers, Linears, Mail, Stream, attend_reference, gelu_reference, values

HEAD = gl.constexpr(64)  # numbers of a head
ABSENT = gl.constexpr(-1)  # a word or half-word that nobody has sent: as a number a NaN, and one no arithmetic makes
PATIENCE = gl.constexpr(1 << 20)  # polls, some 0.4 seconds: a bug ends in wrong numbers and does not hang

WARPS = 4
PROGRAMS = 2  # a multiprocessor: 256 threads, which may each have all the registers that a thread can have


@gluon.constexpr_function
def poll(loads, halves):
    """PTX that loads `loads` times 16 bytes until there is no absent word among them (or half-word, if `halves`)."""
    words = 4 * loads
    lines = ["{", ".reg .pred absent;", ".reg .b32 word, any, polls;", "mov.b32 polls, 0;", "again:"]
    for i in range(loads):
        registers = ", ".join(f"${4 * i + j}" for j in range(4))
        lines += [f"ld.relaxed.gpu.global.v4.b32 {{{registers}}}, [${words + i}];"]
    if halves:  # a half of ~w is 0 if (~w - 0x00010001) & w & 0x80008000 is not
        lines += ["mov.b32 any, 0;"]
        for i in range(words):
            lines += [f"sub.u32 word, 0xfffefffe, ${i};", f"lop3.b32 any, word, ${i}, any, 0xea;"]
        lines += ["and.b32 any, any, 0x80008000;", "setp.ne.u32 absent, any, 0;"]
    else:
        lines += ["setp.eq.u32 absent, $0, 0xffffffff;"]
        lines += [f"setp.eq.or.u32 absent, ${i}, 0xffffffff, absent;" for i in range(1, words)]
    lines += ["add.u32 polls, polls, 1;", f"setp.lt.and.u32 absent, polls, {PATIENCE.value}, absent;"]
    lines += ["@absent bra again;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def constraints(loads):
    """Of `poll`: the words that it loads, and where from."""
    return ",".join(["=&r"] * 4 * loads + ["l"] * loads)


@gluon.constexpr_function
def int32s(n):
    """n times int32."""
    return (gl.int32,) * n


@gluon.jit
def receive(pointers, HALVES: gl.constexpr, num_warps: gl.constexpr):
    """16 bytes a thread from each of a tuple of int16 or int32 pointers [T], T threads, as soon as they are there.

    -> int32 [n * T, 4] in shared memory, n the pointers, rounded up to a power of two.
    """
    LOADS: gl.constexpr = len(pointers)
    T: gl.constexpr = 32 * num_warps
    words = gl.inline_asm_elementwise(
        poll(LOADS, HALVES), constraints(LOADS), pointers, dtype=int32s(4 * LOADS), is_pure=False, pack=1
    )
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    inbox = gl.allocate_shared_memory(gl.int32, [power_of_two_above(LOADS) * T, 4], shared)
    for i in gl.static_range(LOADS):
        even = gl.join(words[4 * i], words[4 * i + 2])
        odd = gl.join(words[4 * i + 1], words[4 * i + 3])
        inbox.slice(i * T, T).store(gl.join(even, odd).reshape([T, 4]))
    return inbox


@gluon.jit
def receive_tokens(x_ptr, K, STEP: gl.constexpr, num_warps: gl.constexpr):
    """K numbers of fp16 -> shared memory, [blocks, 64]; behind the last are copies of its end."""
    T: gl.constexpr = 32 * num_warps
    LOADS: gl.constexpr = (STEP + 3) // 4
    chunk = gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    pointers = ()
    for i in gl.static_range(LOADS):
        pointers += (x_ptr + gl.minimum(i * T + chunk, K // 8 - 1) * 8,)
    inbox = receive(pointers, True, num_warps)
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    return inbox._reinterpret(gl.float16, [power_of_two_above(LOADS) * T // 8, 64], shared)


@gluon.constexpr_function
def poll_one():
    """PTX for one word, which has been loaded before."""
    return f"""{{
        .reg .pred absent;
        .reg .b32 polls;
        mov.b32 polls, 0;
        mov.b32 $0, $1;
        again:
        setp.eq.u32 absent, $0, 0xffffffff;
        setp.lt.and.u32 absent, polls, {PATIENCE.value}, absent;
        @!absent bra settled;
        ld.relaxed.gpu.global.b32 $0, [$2];
        add.u32 polls, polls, 1;
        bra again;
        settled:
        }}"""


@gluon.jit
def settle(early, ptrs):
    """int32 words that were loaded early -> as fp32; those that were absent then, as soon as they are there."""
    return gl.inline_asm_elementwise(poll_one(), "=&r,r,l", [early, ptrs], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def anew(number):
    """The same int32, but the compiler cannot know: what is computed from it is not kept in registers for later."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_halves(ptrs, numbers, mask):
    """Stores numbers as fp16. The rest of the kernel cannot tell when, and need not: they are there or absent."""
    gl.store(ptrs, numbers.to(gl.float16).to(gl.int16, bitcast=True), mask=mask)


@gluon.jit
def send(ptrs, numbers, mask):
    """Stores fp32 numbers."""
    gl.store(ptrs, numbers.to(gl.int32, bitcast=True), mask=mask)


@gluon.jit
def deal(start, jobs):
    """A phase's jobs are dealt out like cards: -> the first that this program gets, and who gets the next phase's."""
    programs = gl.num_programs(0)
    return (gl.program_id(0) + programs - start) % programs, (start + jobs) % programs


@gluon.jit
def linear_of(linears, addend_ptr, layer, N, K, GROUP_SIZE: gl.constexpr):
    """Pointers to a block's linear layer: codes, scale_zeros, bias, and `folded` or `gamma`, whichever it wants."""
    codes_ptr, scale_zeros_ptr, bias_ptr = linears
    codes_ptr += layer * (N * K // 4)
    return codes_ptr, scale_zeros_ptr + layer * (K // GROUP_SIZE * N), bias_ptr + layer * N, addend_ptr


@gluon.jit
def load_now(
    codes_ptr, scale_zeros_ptr, tile, N, K, GROUP_SIZE: gl.constexpr, STEP: gl.constexpr, num_warps: gl.constexpr
):
    """Lesson 17's load of 16 rows of a weight; addresses are computed anew, as there is no room to keep them."""
    return load_weight(codes_ptr, scale_zeros_ptr, tile * 16, anew(N), anew(K // 64), GROUP_SIZE, STEP, num_warps)


@gluon.jit
def normed_phase(
    first,
    stream,  # pointers to what a Stream has: x times gamma, and its sums (and x, which is not used)
    linear,  # of [N, K], see `linear_of`
    out_ptr,  # int16 [N], written
    other_ptr,  # int16 [N], cleared
    N,
    K,
    eps,
    GELU: gl.constexpr,
    TILES: gl.constexpr,  # at least K/16, a power of two
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
):
    """LayerNorm, linear layer, GELU: lesson 18's normed_matmul for the tiles that this program got."""
    num_warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))  # all eight the same: the first is stored
    mask = (token == 0)[None, :] & (row < ROWS)[:, None]
    of_tile: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1])  # as in row_tiles.load_sums
    sum_tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, of_tile))[:, None]
    codes_ptr, scale_zeros_ptr, bias_ptr, folded_ptr = linear
    _, x_ptr, sums_ptr = stream
    sum_ptrs = sums_ptr + sum_tile * 2
    for tile in range(first, N // ROWS, gl.num_programs(0)):
        n = tile * ROWS + row
        codes, words = load_now(codes_ptr, scale_zeros_ptr, tile, N, K, GROUP_SIZE, STEP, num_warps)
        bias = gl.load(bias_ptr + n)
        folded = gl.load(folded_ptr + n)
        gl.store(other_ptr + n, ABSENT)
        x = receive_tokens(x_ptr, K, STEP, num_warps)
        # The sums are sent behind x: under way while we multiply.
        sums = gl.load(sum_ptrs, mask=sum_tile * 16 < K, other=0, volatile=True)
        squares = gl.load(sum_ptrs + 1, mask=sum_tile * 16 < K, other=0, volatile=True)
        out = multiply(x, (), codes, words, 1, STEP, mma, num_warps)
        sums, squares = settle(sums, sum_ptrs), settle(squares, sum_ptrs + 1)
        out = normalise(out, sums, squares, folded, K, eps, layout) + bias[:, None]
        if GELU:
            out = gelu(out)
        send_halves(out_ptr + n[:, None] + token[None, :], out, mask)


@gluon.jit
def added_phase(
    first,
    x_ptr,  # int16 [K]
    residual_ptr,  # int32 [N], x before
    linear,  # of [N, K], see `linear_of`
    out,  # pointers to what a Stream has, written
    other,  # the same, cleared
    N,
    K,
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
):
    """Linear layer, added to x: lesson 18's add_matmul for the tiles that this program got."""
    num_warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    mask = (token == 0)[None, :] & (row < ROWS)[:, None]
    codes_ptr, scale_zeros_ptr, bias_ptr, gamma_ptr = linear
    out_residual_ptr, out_scaled_ptr, out_sums_ptr = out
    other_residual_ptr, other_scaled_ptr, other_sums_ptr = other
    for tile in range(first, N // ROWS, gl.num_programs(0)):
        n = tile * ROWS + row
        codes, words = load_now(codes_ptr, scale_zeros_ptr, tile, N, K, GROUP_SIZE, STEP, num_warps)
        bias = gl.load(bias_ptr + n)
        gamma = gl.load(gamma_ptr + n)
        residual = gl.load(residual_ptr + n, volatile=True)
        gl.store(other_scaled_ptr + n, ABSENT)
        gl.store(other_residual_ptr + n, ABSENT)
        gl.store(other_sums_ptr + tile * 2 + row, ABSENT, mask=row < 2)
        x = receive_tokens(x_ptr, K, STEP, num_warps)
        product = multiply(x, (), codes, words, 1, STEP, mma, num_warps)
        product += (bias + settle(residual, residual_ptr + n))[:, None]
        ptrs = n[:, None] + token[None, :]
        send_halves(out_scaled_ptr + ptrs, product * gamma[:, None], mask)
        sum_ptrs = out_sums_ptr + tile * 2 + token
        send(sum_ptrs, gl.sum(product, 0), token == 0)
        send(sum_ptrs + 1, gl.sum(product * product, 0), token == 0)
        send(out_residual_ptr + ptrs, product, mask)


@gluon.jit
def attention_phase(
    first,
    qkv_ptr,  # int16 [3C]
    k_ptr,  # fp16 [H, L, 64]
    v_ptr,  # fp16 [H, L, 64]
    position,
    splits,  # parts that there are of the context
    outs,  # two int16 [C]: written if there is one part, and cleared
    parts,  # two int32 [H, SPLITS, 128]: written if there are several, and cleared
    H,
    L,
    BLOCK_L: gl.constexpr,
    SPLITS: gl.constexpr,  # parts that there may be, a power of two
):
    """Lesson 19's attention, for the parts that this program got of heads' contexts."""
    num_warps: gl.constexpr = gl.num_warps()
    out_ptr, other_ptr = outs
    parts_ptr, other_parts_ptr = parts
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])  # 16 bytes a thread
    THREADS: gl.constexpr = 32 * num_warps
    place = gl.arange(0, BLOCK_L, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD, layout=gl.SliceLayout(0, layout))
    chunk = gl.arange(0, THREADS, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    for job in range(first, H * splits, gl.num_programs(0)):
        head = job // splits
        split = job % splits
        row = split * BLOCK_L + place
        seen = row < position
        offs = (head * L + row)[:, None] * HEAD + d[None, :]
        k = gl.load(k_ptr + offs, mask=seen[:, None], other=0.0)
        v = gl.load(v_ptr + offs, mask=seen[:, None], other=0.0)
        if split == 0:
            gl.store(other_ptr + head * HEAD + d, ABSENT)
        if SPLITS > 1:
            for part in range(split, SPLITS, splits):  # the next launch may find more parts than there are now
                other = other_parts_ptr + (head * SPLITS + part) * 2 * HEAD + d
                gl.store(other, ABSENT)
                gl.store(other + HEAD, ABSENT)
        # The head's query, key and value: three times 64 numbers, of 8 threads each.
        token_ptr = qkv_ptr + gl.minimum(chunk // 8, 2) * (H * HEAD) + head * HEAD + chunk % 8 * 8
        inbox = receive((token_ptr,), True, num_warps)
        inbox = inbox._reinterpret(gl.float16, [THREADS * 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        # 1 / sqrt(64), and log2(e) as what follows is powers of 2
        q = inbox.slice(0, HEAD).load(gl.SliceLayout(0, layout)).to(gl.float32) * 0.18033688011112042
        scores = gl.where(seen, gl.sum(k.to(gl.float32) * q[None, :], 1), float("-inf"))  # [BLOCK_L]
        top = gl.max(scores, 0)
        new_k = inbox.slice(64, HEAD).load(gl.SliceLayout(0, layout))
        new_v = inbox.slice(128, HEAD).load(gl.SliceLayout(0, layout))
        new_score = gl.sum(new_k.to(gl.float32) * q, 0)
        if split == 0:  # the new token sees itself
            new = (head * L + position) * HEAD + d
            gl.store(k_ptr + new, new_k)
            gl.store(v_ptr + new, new_v)
        else:
            new_score = float("-inf")
        top = gl.maximum(top, new_score)
        new_weight = gl.exp2(new_score - top)
        weights = gl.exp2(scores - top)  # [BLOCK_L]
        total = gl.sum(weights, 0) + new_weight
        out = (gl.sum(weights[:, None] * v.to(gl.float32), 0) + new_weight * new_v.to(gl.float32)) / total
        if splits > 1:
            ptrs = parts_ptr + (head * SPLITS + split) * 2 * HEAD + d
            send(ptrs, out, d < HEAD)
            send(ptrs + HEAD, gl.zeros_like(out) + (top + gl.log2(total)), d < HEAD)  # each number with its weight
        else:
            send_halves(out_ptr + head * HEAD + d, out, d < HEAD)


@gluon.jit
def join_phase(
    first,
    parts_ptr,  # int32 [H, SPLITS, 128]
    out_ptr,  # int16 [C], written
    heads,
    splits,
    SPLITS: gl.constexpr,
):
    """Joins the parts of heads. A phase of its own: whoever waits for others' parts may have none of its own to do."""
    num_warps: gl.constexpr = gl.num_warps()
    THREADS: gl.constexpr = 32 * num_warps
    LOADS: gl.constexpr = (32 * SPLITS + THREADS - 1) // THREADS
    PARTS: gl.constexpr = power_of_two_above(LOADS) * THREADS // 32
    layout: gl.constexpr = gl.BlockedLayout([PARTS, 1], [1, 32], [1, num_warps], [1, 0])
    chunk = gl.arange(0, THREADS, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    d = gl.arange(0, HEAD, layout=gl.SliceLayout(0, layout))
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, layout))
    for head in range(first, heads, gl.num_programs(0)):
        pointers = ()
        for i in gl.static_range(LOADS):
            c = i * THREADS + chunk
            c = gl.where(c // 32 < splits, c, c % 32)  # in place of a part that there is not, the first
            pointers += (parts_ptr + head * SPLITS * 2 * HEAD + c * 4,)
        inbox = receive(pointers, False, num_warps)
        inbox = inbox._reinterpret(gl.float32, [PARTS, 2 * HEAD], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        outs = inbox.slice(0, HEAD, dim=1).load(layout)
        logs = inbox.slice(HEAD, HEAD, dim=1).load(layout)
        logs = gl.where((part < splits)[:, None], logs, float("-inf"))
        weights = gl.exp2(logs - gl.max(logs, 0)[None, :])
        send_halves(out_ptr + head * HEAD + d, gl.sum(outs * weights, 0) / gl.sum(weights, 0), d < HEAD)


@gluon.jit
def whole_step_kernel(
    residual_ptr,  # int32 [C], the stream, see `Stream`: read first, and written last
    scaled_ptr,  # int16 [C]
    sums_ptr,  # int32 [C/16, 2]
    qkv_codes_ptr,  # int16 [layers, 3C/16, C/64, 16, 16], and so on: see `Linears`
    qkv_scale_zeros_ptr,  # int32 [layers, groups, 3C]
    qkv_bias_ptr,  # fp32 [layers, 3C]
    qkv_folded_ptr,  # fp32 [layers, 3C]
    proj_codes_ptr,
    proj_scale_zeros_ptr,
    proj_bias_ptr,
    fc_codes_ptr,
    fc_scale_zeros_ptr,
    fc_bias_ptr,
    fc_folded_ptr,
    out_codes_ptr,
    out_scale_zeros_ptr,
    out_bias_ptr,
    gammas_ptr,  # fp32 [2 layers + 1, C]
    cache_ptr,  # fp16 [1, H, L, 64], the first layer's keys
    positions_ptr,  # int64 [1]
    halves_ptr,  # int16 [2, layers, 10C], see `Mail`
    words_ptr,  # int32 [2, layers, 2C + C/4]
    parts_ptr,  # int32 [2, layers, H, SPLITS, 128]
    turns_ptr,  # int32 [programs]
    distances_ptr,  # int64 [layers, 2]
    layers,
    C,
    L,
    eps,
    BLOCK_L: gl.constexpr,
    SPLITS: gl.constexpr,
    TILES: gl.constexpr,  # at least C/16, a power of two
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,  # blocks a warp of a row of C
    STEP_4: gl.constexpr,  # and of 4C
    num_warps: gl.constexpr,
):
    """All blocks of a GPT-2, for one token. All programs must be at work at once."""
    turn_ptr = turns_ptr + gl.program_id(0)
    turn = gl.load(turn_ptr)
    now = turn % 2
    H = C // HEAD
    position = gl.load(positions_ptr).to(gl.int32)
    splits = gl.maximum(gl.cdiv(position, BLOCK_L), 1)
    joins = gl.where(splits > 1, H, 0)
    PARTS = H * SPLITS * 2 * HEAD
    qkv_linears = qkv_codes_ptr, qkv_scale_zeros_ptr, qkv_bias_ptr
    proj_linears = proj_codes_ptr, proj_scale_zeros_ptr, proj_bias_ptr
    fc_linears = fc_codes_ptr, fc_scale_zeros_ptr, fc_bias_ptr
    out_linears = out_codes_ptr, out_scale_zeros_ptr, out_bias_ptr
    stream = residual_ptr, scaled_ptr, sums_ptr
    start = 0
    for layer in range(layers):
        here = now * layers + layer
        there = (1 - now) * layers + layer  # what the launch before used, and the next one will
        qkv, other_qkv = halves_ptr + here * 10 * C, halves_ptr + there * 10 * C
        attended, other_attended = qkv + 3 * C, other_qkv + 3 * C
        hidden, other_hidden = qkv + 5 * C, other_qkv + 5 * C
        words, other_words = words_ptr + here * (2 * C + C // 4), words_ptr + there * (2 * C + C // 4)
        middle, other_middle = (words, qkv + 4 * C, words + C), (other_words, other_qkv + 4 * C, other_words + C)
        words, other_words = words + C + C // 8, other_words + C + C // 8
        end, other_end = (words, qkv + 9 * C, words + C), (other_words, other_qkv + 9 * C, other_words + C)
        if layer + 1 == layers:
            end = residual_ptr, scaled_ptr, sums_ptr

        first, start = deal(start, 3 * C // ROWS)
        folded_ptr = qkv_folded_ptr + layer * 3 * C
        linear = linear_of(qkv_linears, folded_ptr, layer, 3 * C, C, GROUP_SIZE)
        normed_phase(first, stream, linear, qkv, other_qkv, 3 * C, C, eps, False, TILES, GROUP_SIZE, STEP)

        first, start = deal(start, H * splits)
        k_ptr = cache_ptr + gl.load(distances_ptr + 2 * layer) * 8
        v_ptr = cache_ptr + gl.load(distances_ptr + 2 * layer + 1) * 8
        parts_ptrs = parts_ptr + here * PARTS, parts_ptr + there * PARTS
        attended_ptrs = attended, other_attended
        attention_phase(first, qkv, k_ptr, v_ptr, position, splits, attended_ptrs, parts_ptrs, H, L, BLOCK_L, SPLITS)
        if SPLITS > 1:
            first, start = deal(start, joins)
            join_phase(first, parts_ptrs[0], attended, joins, splits, SPLITS)

        first, start = deal(start, C // ROWS)
        gamma_ptr = gammas_ptr + (2 * layer + 1) * C
        linear = linear_of(proj_linears, gamma_ptr, layer, C, C, GROUP_SIZE)
        added_phase(first, attended, stream[0], linear, middle, other_middle, C, C, GROUP_SIZE, STEP)

        first, start = deal(start, 4 * C // ROWS)
        folded_ptr = fc_folded_ptr + layer * 4 * C
        linear = linear_of(fc_linears, folded_ptr, layer, 4 * C, C, GROUP_SIZE)
        normed_phase(first, middle, linear, hidden, other_hidden, 4 * C, C, eps, True, TILES, GROUP_SIZE, STEP)

        first, start = deal(start, C // ROWS)
        gamma_ptr = gammas_ptr + (2 * layer + 2) * C
        linear = linear_of(out_linears, gamma_ptr, layer, C, 4 * C, GROUP_SIZE)
        added_phase(first, hidden, middle[0], linear, end, other_end, C, 4 * C, GROUP_SIZE, STEP_4)
        stream = end
    gl.store(turn_ptr, turn + 1)


@gluon.jit
def waits_kernel(mail_ptr, waits, chunks, LOADS: gl.constexpr, num_warps: gl.constexpr):
    """Nothing but waits. Each time, a program writes two of the chunks of 8 numbers, and all receive all of them."""
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    fours: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    chunk = gl.arange(0, 32 * num_warps, layout=threads)
    last = 0
    for wait in range(waits):
        base = mail_ptr + wait * chunks * 8
        if gl.program_id(0) * 2 < chunks:
            gl.store(base + gl.program_id(0) * 16 + chunk, (chunk + last).to(gl.int16), mask=chunk < 16)
        pointers = ()
        for i in gl.static_range(LOADS):
            pointers += (base + gl.minimum(i * 32 * num_warps + chunk, chunks - 1) * 8,)
        inbox = receive(pointers, True, num_warps)
        last = gl.max(gl.max(inbox.slice(0, 32 * num_warps).load(fours), 1), 0) & 7


def launch_options(c: int) -> dict[str, int]:
    """Of the kernel, for C = c columns."""
    return {
        "TILES": triton.next_power_of_2(c // TILE_ROWS),
        "STEP": common.cdiv(c // BLOCK, WARPS),
        "STEP_4": common.cdiv(4 * c // BLOCK, WARPS),
        "num_warps": WARPS,
    }


def programs(device: torch.device) -> int:
    """How many programs are at work at once on a GPU."""
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def all_blocks(
    stream: Stream,
    layers: Layers,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    positions: Tensor,
    mail: Mail,
    eps: float,
) -> None:
    """Takes the residual stream of one token through all blocks, in place, and adds to the cache.

    Args:
        stream: of one token and C columns, a multiple of 64; `scaled` must have been multiplied by the first norm's
            weight, and will have been by the last norm's.
        layers: the blocks' weights; all of the same group size, a multiple of 64.
        k, v: float16 [1, H, L, 64] of each block, C = H * 64; changed at `positions`.
        positions: int64 [1, 1], where the token stands, below L.
        mail: made for this cache, and for `programs` programs.
        eps: the LayerNorms'.
    """
    whole_step_kernel[(len(mail.turns),)](
        *(stream.residual.view(torch.int32), stream.scaled.view(torch.int16), stream.sums.view(torch.int32)),
        *layers.c_attn[:4],
        *layers.attn_proj[:3],
        *layers.c_fc[:4],
        *layers.mlp_proj[:3],
        layers.gammas,
        k[0],
        positions,
        *mail,
        len(k),
        stream.residual.shape[1],
        k[0].shape[2],
        eps,
        BLOCK_L=BLOCK_L,
        SPLITS=mail.parts.shape[3],
        GROUP_SIZE=layers.c_attn.group_size,
        launch_cooperative_grid=True,
        **launch_options(stream.residual.shape[1]),
    )


def random_layers(n_layer: int, c: int) -> Layers:
    """Blocks with random weights, of group size 64."""
    gammas = 1 + 0.1 * common.random_tensor(2 * n_layer + 1, c, dtype=torch.float32, seed=1)

    def linears(n: int, k: int, seed: int, norm: int | None = None) -> Linears:
        """Random layers [n, k], one a block, behind LayerNorm number `norm` of the block if there is one."""
        weights = [
            prepare(quantize_reference(common.random_tensor(n, k, seed=seed + 4 * i) / math.sqrt(k), 64))
            for i in range(n_layer)
        ]
        bias = common.random_tensor(n_layer, n, dtype=torch.float32, seed=seed)
        codes, scale_zeros = (torch.stack(tensors) for tensors in list(zip(*weights, strict=True))[:2])
        folded = [] if norm is None else [values(w) @ gammas[2 * i + norm] for i, w in enumerate(weights)]
        return Linears(codes, scale_zeros, bias, torch.stack(folded) if folded else bias.new_empty(0), 64)

    return Layers(linears(3 * c, c, 10, 0), linears(c, c, 11), linears(4 * c, c, 12, 1), linears(c, 4 * c, 13), gammas)


def all_blocks_reference(
    x: Tensor, layers: Layers, k: Sequence[Tensor], v: Sequence[Tensor], positions: Tensor, eps: float
) -> Tensor:
    """The same in plain torch and float64: x [1, C] -> [1, C]; k and v, float64 too, are changed."""

    def linear(x: Tensor, linears: Linears, layer: int) -> Tensor:
        """Layer number `layer` of a kind, in float64: [M, K] -> [M, N]."""
        return x @ values(linears.weight(layer)).double().t() + linears.bias[layer].double()

    for i in range(len(k)):
        gammas = layers.gammas[2 * i : 2 * i + 2].double()
        x_normed = torch.nn.functional.layer_norm(x, x.shape[1:], gammas[0], eps=eps)
        y = attend_reference(linear(x_normed, layers.c_attn, i), k[i], v[i], positions)
        x = x + linear(y, layers.attn_proj, i)
        x_normed = torch.nn.functional.layer_norm(x, x.shape[1:], gammas[1], eps=eps)
        x = x + linear(gelu_reference(linear(x_normed, layers.c_fc, i)), layers.mlp_proj, i)
    return x


def check() -> Iterator[common.Check]:
    """Two blocks against float64, at several positions, and what they added to the cache."""
    if not common.has_mma(common.DEVICE):
        yield "mma.sync needs an NVIDIA GPU of sm_80 or newer, and this machine has none", None
        return
    for c, length, at in ((192, 128, (0, 127)), (768, 1024, (5, 500, 1023, 130)), (1600, 300, (299, 3))):
        yield from _check_blocks(c, length, at)


def _check_blocks(c: int, length: int, at: Sequence[int]) -> Iterator[common.Check]:
    layers = random_layers(2, c)
    k, v = ([common.random_tensor(1, c // 64, length, 64, seed=seed + i) for i in range(2)] for seed in (3, 5))
    mail = Mail.empty(k, v, programs(common.DEVICE))
    stream = Stream.zeros(1, c, common.DEVICE)
    for turn, position in enumerate(at):
        positions = torch.tensor([[position]], device=common.DEVICE)
        stream.write(common.random_tensor(1, c, dtype=torch.float32, seed=turn), layers.gammas[0])
        k64, v64 = ([tensor.double() for tensor in tensors] for tensors in (k, v))
        expected = all_blocks_reference(stream.residual.double(), layers, k64, v64, positions, 1e-5)
        all_blocks(stream, layers, k, v, positions, mail, 1e-5)
        error = common.relative_error(stream.residual, expected)
        added = max(common.relative_error(a, b) for a, b in zip((*k, *v), (*k64, *v64), strict=True))
        what = (
            f"2 blocks of {c} columns at {position} of {length}, relative errors {error:.1e}, {added:.1e} of the cache"
        )
        yield what, max(error, added) < 2 * common.tolerance(torch.float16)


def bench() -> list[common.Row]:
    """Times waits alone, and all blocks of GPT-2 124M and XL."""
    waits = [_bench_waits(count * programs(common.DEVICE) // PROGRAMS, 768) for count in (1, 2, 3)]
    sizes = [(n_layer, c, length) for n_layer, c in ((12, 768), (48, 1600)) for length in (128, 512, 1024)]
    return waits + [_bench_blocks(*size) for size in sizes]


def _bench_waits(programs: int, numbers: int) -> common.Row:
    few, many = 100, 500
    mail = common.random_tensor(many * numbers).view(torch.int16)

    def time(waits: int) -> float:
        """Microseconds of a launch with so many waits."""
        mail.fill_(-1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        waits_kernel[(programs,)](mail, waits, numbers // 8, LOADS=1, num_warps=WARPS, launch_cooperative_grid=True)
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    times = [min([time(waits) for _ in range(4)][1:]) for waits in (few, many)]  # the first compiles
    return {"programs": programs, "numbers": numbers, "microseconds_a_wait": (times[1] - times[0]) / (many - few)}


def _bench_blocks(n_layer: int, c: int, length: int) -> common.Row:
    layers = random_layers(n_layer, c)
    k, v = ([common.random_tensor(1, c // 64, length, 64, seed=i) for i in range(n_layer)] for _ in range(2))
    stream = Stream.zeros(1, c, common.DEVICE)
    stream.write(common.random_tensor(1, c), layers.gammas[0])
    positions = torch.tensor([[length - 1]], device=common.DEVICE)
    mail = Mail.empty(k, v, programs(common.DEVICE))
    time = common.microseconds(all_blocks, [(stream, layers, k, v, positions, mail, 1e-5)])
    return {"n_layer": n_layer, "n_embd": c, "length": length, "microseconds": time}


if __name__ == "__main__":
    common.run_lesson(check, bench)
