"""Lesson 21 draft."""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from kernels import common
from kernels.row_tiles import gelu, load_sums, load_weight, multiply, normalise, power_of_two_above
from kernels.stream import BLOCK_L, Layers, Mail, Stream

ABSENT = gl.constexpr(-1)  # a word or half-word that nobody sent: as a number a NaN, and one that no arithmetic gives
PATIENCE = gl.constexpr(1 << 16)  # polls, some 20 ms; a wait that long is a bug, which ends in wrong numbers
HEAD = gl.constexpr(64)  # numbers of a head


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


@gluon.jit
def settle(early, ptrs):
    """fp32 numbers that were loaded early; those that had not been sent by then, again, until they have been."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred absent;
        .reg .b32 polls;
        mov.b32 polls, 0;
        mov.b32 $0, $1;
        again:
        setp.eq.u32 absent, $0, 0xffffffff;
        setp.lt.and.u32 absent, polls, 65536, absent;
        @!absent bra settled;
        ld.relaxed.gpu.global.b32 $0, [$2];
        add.u32 polls, polls, 1;
        bra again;
        settled:
        }""",
        "=&r,r,l",
        [early, ptrs],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def anew(number):
    """The same int32, but the compiler cannot know: what is computed from it is not kept in registers for later."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_halves(ptrs, numbers, mask):
    """Stores numbers as fp16."""
    gl.store(ptrs, numbers.to(gl.float16).to(gl.int16, bitcast=True), mask=mask)


@gluon.jit
def send(ptrs, numbers, mask):
    """Stores fp32 numbers."""
    gl.store(ptrs, numbers.to(gl.int32, bitcast=True), mask=mask)


@gluon.jit
def deal(start, jobs, programs):
    """The first of a program's jobs, which are dealt out like cards, and who is the next to get one."""
    return (gl.program_id(0) + programs - start) % programs, (start + jobs) % programs


@gluon.jit
def normed_phase(
    first,
    programs,
    x_ptr,
    sums_ptr,
    codes_ptr,
    scale_zeros_ptr,
    bias_ptr,
    folded_ptr,
    out_ptr,
    unsent_ptr,
    N,
    K,
    eps,
    GELU: gl.constexpr,
    TILES: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    mask = (token == 0)[None, :] & (row < 16)[:, None]
    for tile in range(first, N // 16, programs):
        n = tile * 16 + row
        codes, words = load_weight(codes_ptr, scale_zeros_ptr, tile * 16, anew(N), anew(K // 64), GROUP_SIZE, STEP, num_warps)
        bias = gl.load(bias_ptr + n)
        folded = gl.load(folded_ptr + n)
        gl.store(unsent_ptr + n, ABSENT)
        x = receive_tokens(x_ptr, K, STEP, num_warps)
        sums, squares, ptrs = load_early_sums(sums_ptr, K, TILES, num_warps)
        out = multiply(x, codes, words, 1, STEP, mma, num_warps)
        out = normalise(out, settle(sums, ptrs), settle(squares, ptrs + 1), folded, K, eps, layout) + bias[:, None]
        if GELU:
            out = gelu(out)
        send_halves(out_ptr + n[:, None] + token[None, :], out, mask)


@gluon.jit
def load_early_sums(sums_ptr, K, TILES: gl.constexpr, num_warps: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1])
    tile = gl.arange(0, TILES, layout=gl.SliceLayout(1, layout))[:, None]
    ptrs = sums_ptr + tile * 2
    mask = tile * 16 < K
    sums = gl.load(ptrs, mask=mask, other=0, volatile=True)
    squares = gl.load(ptrs + 1, mask=mask, other=0, volatile=True)
    return sums, squares, ptrs


@gluon.jit
def added_phase(
    first,
    programs,
    x_ptr,
    residual_ptr,
    codes_ptr,
    scale_zeros_ptr,
    bias_ptr,
    gamma_ptr,
    out_residual_ptr,
    out_scaled_ptr,
    out_sums_ptr,
    unsent_scaled_ptr,
    unsent_words_ptr,
    N,
    K,
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
    num_warps: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    mask = (token == 0)[None, :] & (row < 16)[:, None]
    for tile in range(first, N // 16, programs):
        n = tile * 16 + row
        codes, words = load_weight(codes_ptr, scale_zeros_ptr, tile * 16, anew(N), anew(K // 64), GROUP_SIZE, STEP, num_warps)
        bias = gl.load(bias_ptr + n)
        gamma = gl.load(gamma_ptr + n)
        residual = gl.load(residual_ptr + n, volatile=True)
        gl.store(unsent_scaled_ptr + n, ABSENT)
        gl.store(unsent_words_ptr + n, ABSENT)
        gl.store(unsent_words_ptr + N + tile * 2 + row, ABSENT, mask=row < 2)
        x = receive_tokens(x_ptr, K, STEP, num_warps)
        out = multiply(x, codes, words, 1, STEP, mma, num_warps)
        out += (bias + settle(residual, residual_ptr + n))[:, None]
        ptrs = n[:, None] + token[None, :]
        send_halves(out_scaled_ptr + ptrs, out * gamma[:, None], mask)
        sum_ptrs = out_sums_ptr + tile * 2 + token
        send(sum_ptrs, gl.sum(out, 0), token == 0)
        send(sum_ptrs + 1, gl.sum(out * out, 0), token == 0)
        send(out_residual_ptr + ptrs, out, mask)


@gluon.jit
def attention_phase(
    first,
    programs,
    qkv_ptr,
    k_ptr,
    v_ptr,
    position,
    splits,
    out_ptr,
    unsent_ptr,
    parts_ptr,
    unsent_parts_ptr,
    H,
    L,
    scale,
    BLOCK_L: gl.constexpr,
    SPLITS: gl.constexpr,
    num_warps: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])  # 16 bytes a thread
    T: gl.constexpr = 32 * num_warps
    place = gl.arange(0, BLOCK_L, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD, layout=gl.SliceLayout(0, layout))
    chunk = gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    for job in range(first, H * splits, programs):
        head = job // splits
        split = job % splits
        row = split * BLOCK_L + place
        seen = row < position
        offs = (head * L + row)[:, None] * HEAD + d[None, :]
        k = gl.load(k_ptr + offs, mask=seen[:, None], other=0.0)
        v = gl.load(v_ptr + offs, mask=seen[:, None], other=0.0)
        if split == 0:
            gl.store(unsent_ptr + head * HEAD + d, ABSENT)
        if SPLITS > 1:
            for part in range(split, SPLITS, splits):
                unsent = unsent_parts_ptr + (head * SPLITS + part) * 2 * HEAD + d
                gl.store(unsent, ABSENT)
                gl.store(unsent + HEAD, ABSENT)
        # Query, key and value: three times 64 numbers, 8 threads each.
        token_ptr = qkv_ptr + gl.minimum(chunk // 8, 2) * (H * HEAD) + head * HEAD + chunk % 8 * 8
        inbox = receive((token_ptr,), True, num_warps)
        inbox = inbox._reinterpret(gl.float16, [T * 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        q = inbox.slice(0, HEAD).load(gl.SliceLayout(0, layout)).to(gl.float32) * scale
        scores = gl.where(seen, gl.sum(k.to(gl.float32) * q[None, :], 1), float("-inf"))
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
            send(ptrs + HEAD, gl.zeros_like(out) + (top + gl.log2(total)), d < HEAD)
        else:
            send_halves(out_ptr + head * HEAD + d, out, d < HEAD)


@gluon.jit
def join_phase(first, programs, heads, splits, parts_ptr, out_ptr, SPLITS: gl.constexpr, num_warps: gl.constexpr):
    T: gl.constexpr = 32 * num_warps
    LOADS: gl.constexpr = (32 * SPLITS + T - 1) // T
    PARTS: gl.constexpr = power_of_two_above(LOADS) * T // 32
    layout: gl.constexpr = gl.BlockedLayout([PARTS, 1], [1, 32], [1, num_warps], [1, 0])
    chunk = gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
    d = gl.arange(0, HEAD, layout=gl.SliceLayout(0, layout))
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, layout))
    for head in range(first, heads, programs):
        pointers = ()
        for i in gl.static_range(LOADS):
            c = i * T + chunk
            c = gl.where(c // 32 < splits, c, c % 32)
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
    residual_ptr,  # int32 [C]
    scaled_ptr,  # int16 [C]
    sums_ptr,  # int32 [C/16, 2]
    qkv_codes_ptr,
    qkv_scale_zeros_ptr,
    qkv_bias_ptr,
    qkv_folded_ptr,
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
    cache_ptr,  # fp16, the first layer's keys
    distances_ptr,  # int64 [layers, 2], of each layer's keys and values from there, in 16 bytes
    positions_ptr,  # int64 [1]
    halves_ptr,  # int16 [2, layers, 10C]
    words_ptr,  # int32 [2, layers, 2C + C/4]
    parts_ptr,  # int32 [2, layers, H, SPLITS, 128]
    turns_ptr,  # int32 [programs]
    layers,
    C,
    L,
    programs,
    eps,
    scale,
    BLOCK_L: gl.constexpr,
    SPLITS: gl.constexpr,
    TILES: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    STEP: gl.constexpr,
    STEP_4: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    if PDL:
        gdc_wait()
    turn_ptr = turns_ptr + gl.program_id(0)
    turn = gl.load(turn_ptr)
    now = turn % 2
    H = C // HEAD
    position = gl.load(positions_ptr).to(gl.int32)
    splits = gl.maximum(gl.cdiv(position, BLOCK_L), 1)
    joins = gl.where(splits > 1, H, 0)
    WORDS = 2 * C + C // 4
    PARTS = H * SPLITS * 2 * HEAD
    x_residual, x_scaled, x_sums = residual_ptr, scaled_ptr, sums_ptr
    start = 0
    for layer in range(layers):
        qkv = halves_ptr + (now * layers + layer) * 10 * C
        other_qkv = halves_ptr + ((1 - now) * layers + layer) * 10 * C
        middle = words_ptr + (now * layers + layer) * WORDS
        other_middle = words_ptr + ((1 - now) * layers + layer) * WORDS
        parts = parts_ptr + (now * layers + layer) * PARTS
        other_parts = parts_ptr + ((1 - now) * layers + layer) * PARTS

        first, start = deal(start, 3 * C // 16, programs)
        normed_phase(
            first,
            programs,
            x_scaled,
            x_sums,
            qkv_codes_ptr + layer * (3 * C * C // 4),
            qkv_scale_zeros_ptr + layer * (C // GROUP_SIZE * 3 * C),
            qkv_bias_ptr + layer * 3 * C,
            qkv_folded_ptr + layer * 3 * C,
            qkv,
            other_qkv,
            3 * C,
            C,
            eps,
            False,
            TILES,
            GROUP_SIZE,
            STEP,
            num_warps,
        )
        attended = qkv + 3 * C
        k_ptr = cache_ptr + gl.load(distances_ptr + 2 * layer) * 8
        v_ptr = cache_ptr + gl.load(distances_ptr + 2 * layer + 1) * 8
        first, start = deal(start, H * splits, programs)
        attention_phase(
            first,
            programs,
            qkv,
            k_ptr,
            v_ptr,
            position,
            splits,
            attended,
            other_qkv + 3 * C,
            parts,
            other_parts,
            H,
            L,
            scale,
            BLOCK_L,
            SPLITS,
            num_warps,
        )
        if SPLITS > 1:
            first, start = deal(start, joins, programs)
            join_phase(first, programs, joins, splits, parts, attended, SPLITS, num_warps)
        first, start = deal(start, C // 16, programs)
        added_phase(
            first,
            programs,
            attended,
            x_residual,
            proj_codes_ptr + layer * (C * C // 4),
            proj_scale_zeros_ptr + layer * (C // GROUP_SIZE * C),
            proj_bias_ptr + layer * C,
            gammas_ptr + (2 * layer + 1) * C,
            middle,
            qkv + 4 * C,
            middle + C,
            other_qkv + 4 * C,
            other_middle,
            C,
            C,
            GROUP_SIZE,
            STEP,
            num_warps,
        )
        first, start = deal(start, 4 * C // 16, programs)
        normed_phase(
            first,
            programs,
            qkv + 4 * C,
            middle + C,
            fc_codes_ptr + layer * (C * C),
            fc_scale_zeros_ptr + layer * (C // GROUP_SIZE * 4 * C),
            fc_bias_ptr + layer * 4 * C,
            fc_folded_ptr + layer * 4 * C,
            qkv + 5 * C,
            other_qkv + 5 * C,
            4 * C,
            C,
            eps,
            True,
            TILES,
            GROUP_SIZE,
            STEP,
            num_warps,
        )
        end = middle + C + C // 8
        if layer + 1 == layers:
            x_residual, x_scaled, x_sums = residual_ptr, scaled_ptr, sums_ptr
        else:
            x_residual, x_scaled, x_sums = end, qkv + 9 * C, end + C
        first, start = deal(start, C // 16, programs)
        added_phase(
            first,
            programs,
            qkv + 5 * C,
            middle,
            out_codes_ptr + layer * (C * C),
            out_scale_zeros_ptr + layer * (4 * C // GROUP_SIZE * C),
            out_bias_ptr + layer * C,
            gammas_ptr + (2 * layer + 2) * C,
            x_residual,
            x_scaled,
            x_sums,
            other_qkv + 9 * C,
            other_middle + C + C // 8,
            C,
            4 * C,
            GROUP_SIZE,
            STEP_4,
            num_warps,
        )
    gl.store(turn_ptr, turn + 1)


PROGRAMS_A_MULTIPROCESSOR = 2  # of 128 threads, which may then have all the registers there are


def programs(device: torch.device) -> int:
    """How many programs are at work at once on a GPU."""
    return PROGRAMS_A_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def all_blocks(stream: Stream, layers: Layers, cache: Tensor, distances: Tensor, positions: Tensor, mail: Mail, length: int, eps: float, **options) -> None:
    c = stream.residual.shape[1]
    warps = options.pop("num_warps", 4)
    blocks = c // 64
    n_layer = len(layers.c_attn.codes)
    whole_step_kernel[(len(mail.turns),)](
        stream.residual.view(torch.int32),
        stream.scaled.view(torch.int16),
        stream.sums.view(torch.int32),
        *layers.c_attn[:4],
        *layers.attn_proj[:3],
        *layers.c_fc[:4],
        *layers.mlp_proj[:3],
        layers.gammas,
        cache,
        distances,
        positions,
        *mail,
        n_layer,
        c,
        length,
        len(mail.turns),
        eps,
        math.log2(math.e) / 8,
        BLOCK_L=BLOCK_L,
        SPLITS=mail.parts.shape[3],
        TILES=triton.next_power_of_2(c // 16),
        GROUP_SIZE=layers.c_attn.group_size,
        STEP=triton.cdiv(blocks, warps),
        STEP_4=triton.cdiv(4 * blocks, warps),
        num_warps=warps,
        **{"PDL": False, "launch_cooperative_grid": True, **options},
    )
