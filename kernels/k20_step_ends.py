"""Lesson 20: the two ends of a decode step. NEW: the output layer in int8 brings the best token along.

Run it:  python -m kernels.k20_step_ends --check     (against float64; the output layer needs a GPU of sm_80 or newer)
         python -m kernels.k20_step_ends --bench

THE IDEA. A step begins with a token and a position and ends with the next token. Both ends look small and are not.
torch takes three kernels to embed; and to find the best of 50,257 scores, which are no more than 100 KB, it takes some
15 microseconds, as long as seven layers. So:

    embed_kernel      a row of the embedding (fp16, int8 or int4), a row of wpe, and what lesson 18 wants to know of x
    output_kernel     lesson 18's LayerNorm and the product with 50,257 rows of int8 (lesson 16's format), and
                      of the 16 scores that a program makes anyway, the best, and whose it is
    pick_kernel       the best of the 3,142 best

THE PRICE. 50,257 x 768 int8 is 38.6 MB: 9.2 microseconds at an H200's 4.2 TB/s; x 1600: 19. Instructions: a byte
becomes fp16 by being put under the bits of 1024, two at a time; 1.3 a weight, and tensor cores. `pick_kernel` is empty
but for 25 KB: a microsecond.

WHO READS WHAT. As in lesson 17, but with int8 sixteen neighbours a thread, one load of 16 bytes:

    64 columns of a row     |t0: 16 bytes|t1: 16 bytes|t2|t3|     and of x the same sixteen: four products of 16 columns
    each load               w0 w1 w2 w3  (4 neighbours each)      any four neighbours will do (row_tiles.py)

MEASURED on an H200 (results/k20_step_ends.json: command, versions, date), LayerNorm to token, microseconds:

    K, M                   768, 1     768, 8     1600, 1    1600, 8
    with the best token    14.0       22.5       25.6       39.0
    logits only            11.9       18.4       22.9       34.5
    torch's fp16           47.2       72.8       78.4       128

Predicted: 11 and 20. Logits alone reach 77 and 83% of the memory's pace for one token; lesson 16, without tensor cores,
LayerNorm and token, takes 13.6 and 37.7. The first version, a loop over two blocks a warp that fetched two past the
end, took 19.4, 24.4, 36.1 and 45.9: now half of K is asked for before the wait and half behind it, all at once.
  In a whole step of GPT-2 124M the best token brought along saved 15 microseconds of 179.

NEXT. All of a step is there: minigpt/quantization/fused_decode.py puts it together, 63 kernels for GPT-2 124M, captured
in a CUDA graph. Would one for all blocks be faster (lesson 21)? EXERCISE. Sampling with a temperature needs a draw from
softmax(logits). Which sums would output_kernel have to bring along so that no kernel needs to read all logits again?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import common
from kernels.int8 import Int8Weight, dequantize_int8, quantize_int8
from kernels.k00_reference import dequantize_reference, quantize_reference
from kernels.prepared import BLOCK, TILE_ROWS, PreparedWeight, prepare
from kernels.row_tiles import as_left, as_right, load_sums, normalise
from kernels.stream import FoldedNorm, Stream, fold_norm

FP16, INT8, INT4 = 16, 8, 4  # how the embedding is stored


@triton.jit
def embed_kernel(
    tokens_ptr,  # int64 [M]
    positions_ptr,  # int64 [M]
    wte_ptr,  # fp16 [V, C]; int8 [V, C]; or int16 [V/16, C/64, 16, 16]
    wte_scales_ptr,  # BITS 8: fp16 [V]; BITS 4: int32 [groups, V]
    wpe_ptr,  # fp16 [n_positions, C]
    gamma_ptr,  # floating [C], the first LayerNorm's weight
    residual_ptr,  # fp32 [M, C]
    scaled_ptr,  # fp16 [M, C]
    sums_ptr,  # fp32 [C/16, M, 2]
    V,
    C,
    M,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILES: tl.constexpr,  # at least C/16, a power of two
    PDL: tl.constexpr,
):
    """The stream of one token: its embedding and its position's."""
    m = tl.program_id(0)
    tile = tl.arange(0, TILES)
    c = tile[:, None] * 16 + tl.arange(0, 16)[None, :]  # [TILES, 16]
    mask = c < C
    gamma = tl.load(gamma_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: see lesson 18
    token = tl.load(tokens_ptr + m)
    position = tl.load(positions_ptr + m)
    if BITS == 4:
        row_ptr = wte_ptr + (token // 16 * (C // 64)) * 256 + token % 16 * 16
        half_word = tl.load(row_ptr + c // 64 * 256 + c % 16, mask=mask, other=0)
        word = tl.load(wte_scales_ptr + c // GROUP_SIZE * V + token, mask=mask, other=0)
        zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) - 1024.0
        scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x = (((half_word >> (c % 64 // 16 * 4)) & 0xF).to(tl.float32) - zero) * scale
    else:
        x = tl.load(wte_ptr + token * C + c, mask=mask, other=0).to(tl.float32)
        if BITS == 8:
            x *= tl.load(wte_scales_ptr + token).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + m * C + c, x, mask=mask)
    tl.store(scaled_ptr + m * C + c, (x * gamma).to(tl.float16), mask=mask)
    sum_ptrs = sums_ptr + (tile * M + m) * 2
    tl.store(sum_ptrs, tl.sum(x, 1), mask=tile * 16 < C)
    tl.store(sum_ptrs + 1, tl.sum(x * x, 1), mask=tile * 16 < C)


@gluon.jit
def to_half(code):
    """int8 -> fp16. 128 + code, a byte, under the bits of 1024 is the number 1152 + code (lesson 5's trick)."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 bytes, magic, offset;
        mov.b32 magic, 0x64646464;
        mov.b32 offset, 0x64806480;
        xor.b32 bytes, $2, 0x80808080;
        prmt.b32 $0, bytes, magic, 0x4140;
        prmt.b32 $1, bytes, magic, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        }""",
        "=&r,=&r,r",
        [code],
        dtype=gl.float16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def slices(x):
    """[W, R, 4, 16], sixteen neighbours a thread -> four tensors [W, R, 4, 4]: neighbours 0..3, 4..7, 8..11, 12..15."""
    W: gl.constexpr = x.shape[0]
    R: gl.constexpr = x.shape[1]
    even, odd = gl.split(x.reshape([W, R, 4, 2, 2, 4]).permute([0, 1, 2, 5, 3, 4]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def output_kernel(
    x_ptr,  # fp16 [M, K]
    codes_ptr,  # int8 [N, K]
    scales_ptr,  # fp16 [N]
    bias_ptr,  # fp32 [N]
    folded_ptr,  # fp32 [N]
    sums_ptr,  # fp32 [K/16, M, 2]
    out_ptr,  # fp16 [M, N]
    best_ptr,  # fp32 [programs, M], the best score among a program's rows
    index_ptr,  # int32 [programs, M], and whose it is
    M,
    N,
    K,
    blocks,
    eps,
    TILES: gl.constexpr,  # at least K/16, a power of two
    BLOCK_M: gl.constexpr,  # 1 or 8
    STEP: gl.constexpr,  # blocks of 64 columns a warp and pass
    PASSES: gl.constexpr,  # along K
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes the logits of 16 tokens of the vocabulary: out = norm(x) @ w^T + bias."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    wide: gl.constexpr = gl.BlockedLayout([1, 1, 1, 16], [1, 8, 4, 1], [num_warps, 1, 1, 1], [3, 2, 1, 0])
    of_row: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, wide))  # [W, 16] or [W, 8]
    of_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, wide))  # [4, 16]
    tile = gl.program_id(0)
    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, of_row))
    row = gl.minimum(tile * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, of_row)), N - 1)
    token = gl.minimum(gl.arange(0, 8, layout=gl.SliceLayout(0, of_row)), M - 1)
    thread = gl.arange(0, 4, layout=gl.SliceLayout(1, of_column))
    neighbour = gl.arange(0, 16, layout=gl.SliceLayout(0, of_column))
    column = ((thread * 16)[:, None] + neighbour[None, :])[None, None, :, :]
    code_ptrs = codes_ptr + (row.to(gl.int64) * K)[None, :, None, None] + column  # [1, 16, 4, 16]
    x_ptrs = x_ptr + (token * K)[None, :, None, None] + column  # [1, 8, 4, 16]
    offs_n = tile * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    n = gl.minimum(offs_n, N - 1)

    if PDL:
        gdc_launch_dependents()  # at once, as in lesson 18
    codes = ()
    for i in gl.static_range(STEP):
        block = gl.minimum(i * num_warps + warp, blocks - 1)
        codes += (gl.load(code_ptrs + (block * 64)[:, None, None, None]),)
    scale = gl.load(scales_ptr + n).to(gl.float32)
    bias = gl.load(bias_ptr + n)
    folded = gl.load(folded_ptr + n)
    if PDL:
        gdc_wait()
    sums, squares = load_sums(sums_ptr, M, K, TILES, BLOCK_M, num_warps)
    acc = gl.zeros([num_warps, 16, 8], gl.float32, mma)
    for done in gl.static_range(PASSES):
        xs = ()
        next_codes = ()
        for i in gl.static_range(STEP):
            block = (done * STEP + i) * num_warps + warp
            inside = (block < blocks)[:, None, None, None]  # the blocks past the end are copies; x is 0 there
            xs += (gl.load(x_ptrs + (gl.minimum(block, blocks - 1) * 64)[:, None, None, None], mask=inside, other=0.0),)
        if done + 1 < PASSES:
            for i in gl.static_range(STEP):
                block = gl.minimum(((done + 1) * STEP + i) * num_warps + warp, blocks - 1)
                next_codes += (gl.load(code_ptrs + (block * 64)[:, None, None, None]),)
        for i in gl.static_range(STEP):
            w0, w1, w2, w3 = slices(to_half(codes[i]))
            x0, x1, x2, x3 = slices(xs[i])
            acc = mma_v2(as_left(w0, mma), as_right(x0, mma), acc)
            acc = mma_v2(as_left(w1, mma), as_right(x1, mma), acc)
            acc = mma_v2(as_left(w2, mma), as_right(x2, mma), acc)
            acc = mma_v2(as_left(w3, mma), as_right(x3, mma), acc)
        codes = next_codes
    out = normalise(gl.sum(acc, 0) * scale[:, None], sums, squares, folded, K, eps, layout) + bias[:, None]
    out = out.to(gl.float16)
    gl.store(out_ptr + (offs_m * N)[None, :] + offs_n[:, None], out, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])
    # NEW: the best of these 16. Of equals the first, as torch.argmax on a CPU does.
    scores = gl.where((offs_n < N)[:, None], out.to(gl.float32), float("-inf"))
    best = gl.max(scores, 0)  # [8]
    index = gl.min(gl.where(scores == best[None, :], offs_n[:, None], 2147483647), 0)
    gl.store(best_ptr + tile * M + offs_m, best, mask=offs_m < M)
    gl.store(index_ptr + tile * M + offs_m, index, mask=offs_m < M)


@triton.jit
def pick_kernel(
    best_ptr,  # fp32 [programs, M]
    index_ptr,  # int32 [programs, M]
    tokens_ptr,  # int64 [M]
    programs,
    M,
    N,
    BLOCK: tl.constexpr,  # at least `programs`, a power of two
    PDL: tl.constexpr,
):
    """The best of the programs' best, for one token. Where none is best, all being NaN, it is still a token."""
    m = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    scores = tl.load(best_ptr + offs * M + m, mask=offs < programs, other=float("-inf"))
    index = tl.load(index_ptr + offs * M + m, mask=offs < programs, other=2147483647)
    best = tl.min(tl.where(scores == tl.max(scores, 0), index, 2147483647), 0)
    tl.store(tokens_ptr + m, tl.minimum(best, N - 1).to(tl.int64))


def embed(
    tokens: Tensor,
    positions: Tensor,
    wte: Tensor | Int8Weight | PreparedWeight,
    wpe: Tensor,
    gamma: Tensor,
    stream: Stream,
) -> None:
    """Begins the stream: the embeddings of M tokens and of their positions.

    Args:
        tokens, positions: int64, M numbers each.
        wte: the token embedding [V, C]: float16, int8 or int4.
        wpe: float16 [n_positions, C].
        gamma: floating [C], the first LayerNorm's weight.
        stream: of M tokens and C columns; written.
    """
    c = wpe.shape[1]
    bits = INT4 if isinstance(wte, PreparedWeight) else INT8 if isinstance(wte, Int8Weight) else FP16
    embed_kernel[(tokens.numel(),)](
        tokens,
        positions,
        wte if isinstance(wte, Tensor) else wte.codes,
        wte.scale_zeros if isinstance(wte, PreparedWeight) else wte.scales if isinstance(wte, Int8Weight) else None,
        wpe,
        gamma,
        *stream,
        wte.shape[0] if isinstance(wte, Tensor) else wte.out_features,
        c,
        tokens.numel(),
        BITS=bits,
        GROUP_SIZE=wte.group_size if isinstance(wte, PreparedWeight) else 1,
        TILES=triton.next_power_of_2(common.cdiv(c, TILE_ROWS)),
        num_warps=4,
        **common.early_launch(),
    )


def score(stream: Stream, wte: Int8Weight, norm: FoldedNorm, eps: float) -> Tensor:
    """The last LayerNorm and the output layer: -> logits, float16 [M, V].

    Args:
        stream: of M tokens, at most 8, and K columns.
        wte: of [V, K]; K a multiple of 64.
        norm: made for `wte` by `fold_norm`.
        eps: the LayerNorm's.

    Raises:
        ValueError: there are more tokens.
    """
    return _launch(stream, wte, norm, eps)[0]


def score_and_pick(stream: Stream, wte: Int8Weight, norm: FoldedNorm, eps: float) -> tuple[Tensor, Tensor]:
    """The same, and the tokens with the best logits: -> float16 [M, V], int64 [M, 1]."""
    out, best, index = _launch(stream, wte, norm, eps)
    programs, m = best.shape
    tokens = torch.empty((m, 1), dtype=torch.int64, device=out.device)
    block = triton.next_power_of_2(programs)
    pick_kernel[(m,)](best, index, tokens, programs, m, out.shape[1], BLOCK=block, num_warps=8, **common.early_launch())
    return out, tokens


def _launch(stream: Stream, wte: Int8Weight, norm: FoldedNorm, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    m, k = stream.residual.shape
    if m > 8:
        raise ValueError(f"the stream has {m} tokens, this kernel takes at most 8")
    n, device = wte.out_features, stream.residual.device
    programs = common.cdiv(n, TILE_ROWS)
    out = torch.empty((m, n), dtype=torch.float16, device=device)
    best = torch.empty((programs, m), device=device)
    index = torch.empty((programs, m), dtype=torch.int32, device=device)
    output_kernel[(programs,)](
        stream.scaled,
        wte.codes,
        wte.scales,
        norm.bias,
        norm.folded,
        stream.sums,
        out,
        best,
        index,
        m,
        n,
        k,
        k // BLOCK,
        eps,
        TILES=triton.next_power_of_2(common.cdiv(k, TILE_ROWS)),
        BLOCK_M=1 if m == 1 else 8,
        **launch_options(k),
        **common.early_launch(),
    )
    return out, best, index


def launch_options(k: int) -> dict[str, int]:
    """Two warps, and two passes along K = k columns; more where a pass would take more than 8 blocks of a warp.

    The first pass is on its way before the wait, the second while it is multiplied. On an H200, microseconds with the
    best token at (K, M) = (768, 1), (1600, 1), (1600, 8): 14.3, 25.6 and 39.8; with 2 blocks a pass 14.7, 29.9 and 47.5
    (results/attempts.json).
    """
    step = min(common.cdiv(k // BLOCK, 4), 8)
    return {"STEP": step, "PASSES": common.cdiv(k // BLOCK, 2 * step), "num_warps": 2}


def check() -> Iterator[common.Check]:
    """Embedding, and the output layer with its best tokens, against float64."""
    yield from _check_embed()
    if not common.has_mma(common.DEVICE):
        yield "mma.sync needs an NVIDIA GPU of sm_80 or newer, and this machine has none", None
        return
    for m, n, k in ((1, 50257, 768), (8, 1000, 1600), (3, 33, 64)):
        wte = quantize_int8(common.random_tensor(n, k, seed=1))
        gamma, beta = 1 + 0.1 * common.random_tensor(k, seed=2), common.random_tensor(k, seed=3)
        w = dequantize_int8(wte, torch.float32)
        stream = Stream.zeros(m, k, common.DEVICE)
        stream.write(common.random_tensor(m, k, seed=4), gamma)
        logits, tokens = score_and_pick(stream, wte, fold_norm(w, gamma, beta), 1e-5)
        normed = torch.nn.functional.layer_norm(stream.residual.double(), (k,), gamma.double(), beta.double(), 1e-5)
        error = common.relative_error(logits, normed @ w.double().t())
        yield f"{m} x {n} x {k}, relative error {error:.1e}", error < common.tolerance(torch.float16)
        yield "and the best tokens", torch.equal(tokens, logits.argmax(1, keepdim=True))


def _check_embed() -> Iterator[common.Check]:
    v, c, m = 50, 192, 3
    weight = common.random_tensor(v, c, seed=1)
    int4 = quantize_reference(weight, 64)
    int8 = quantize_int8(weight)
    wpe, gamma = common.random_tensor(20, c, seed=2), common.random_tensor(c, seed=3)
    tokens = torch.tensor([0, 49, 17], device=weight.device)
    positions = torch.tensor([19, 3, 0], device=weight.device)
    for wte, values in (
        (weight, weight.float()),
        (int8, dequantize_int8(int8, torch.float32)),
        (prepare(int4), dequantize_reference(int4, torch.float32)),
    ):
        stream, expected = Stream.zeros(m, c, weight.device), Stream.zeros(m, c, weight.device)
        embed(tokens, positions, wte, wpe, gamma, stream)
        expected.write(values[tokens] + wpe[positions].float(), gamma.float())
        errors = [common.relative_error(a, b) for a, b in zip(stream, expected, strict=True)]
        yield f"embedding, {type(wte).__name__}, relative errors {errors}", max(errors) < 1e-3


def bench() -> list[common.Row]:
    """Times GPT-2's output layer, LayerNorm to best token, beside torch's three fp16 kernels for it."""
    return [_bench_output(m, k) for k in (768, 1600) for m in (1, 8)]


def _bench_output(m: int, k: int) -> common.Row:
    n = 50257
    weights = [common.random_tensor(n, k, seed=seed) for seed in range(common.copies_to_fill_cache(n * k))]
    gamma, beta, x = (common.random_tensor(*shape, seed=7) for shape in ((k,), (k,), (m, k)))
    stream = Stream.zeros(m, k, common.DEVICE)
    stream.write(x, gamma)
    int8 = [quantize_int8(w) for w in weights]
    norms = [fold_norm(w, gamma, beta) for w in int8]

    def in_fp16(w: Tensor) -> Tensor:
        """LayerNorm, output layer and choice as torch has them, fp16: w [N, K] -> tokens, int64 [M]."""
        return torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (k,), gamma, beta), w).argmax(-1)

    fp16 = common.microseconds(in_fp16, [(w,) for w in weights])
    calls = [(stream, w, norm, 1e-5) for w, norm in zip(int8, norms, strict=True)]
    return {
        "m": m,
        "n": n,
        "k": k,
        "microseconds": common.microseconds(score_and_pick, calls),
        "logits_microseconds": common.microseconds(score, calls),
        "fp16_microseconds": fp16,
    }


if __name__ == "__main__":
    common.run_lesson(check, bench)
