"""Lesson 18: a block's linear layers, in full. NEW: LayerNorm in front and GELU or the sum behind cost no kernel.

Run it:  python -m kernels.k18_fused_layers --check     (against float64; needs an NVIDIA GPU of sm_80 or newer)
         python -m kernels.k18_fused_layers --bench

THE IDEA. The second half of a GPT-2 block is x + w2 gelu(w1 norm(x)). In torch that is five kernels, and lesson 17
speeds up two. What the others do is next to nothing: 768 numbers. But each must wait for the one ahead. Behind a matmul
it is easy to do them: the program that makes 16 numbers applies GELU to them, or adds them to the residual stream,
before it stores them. In front it is hard: LayerNorm's mean and deviation need all of x, and every program would have
to compute them first. Unless it does so last (`stream.py`):

    norm(x) w^T + b  =  ((gamma x) w^T  -  mean (gamma w^T)) / deviation  +  (beta w^T + b)
                         ^ the product      ^ a number a row, made when the model is loaded

The kernel multiplies gamma x, as it is, and corrects its sums. gamma x is what the kernel ahead stored beside x; and
that kernel, which knew 16 numbers of x, left their sum and the sum of their squares:

    add_matmul  ->  residual x     fp32 [M, C]           normed_matmul  reads gamma x, as lesson 17 reads its x,
                    gamma x        fp16 [M, C]                          and C/16 pairs of sums, while it waits for x
                    sums           fp32 [C/16, M, 2]

THE PRICE. Two more loads behind the wait, both beside those of x, and a sum over at most 100 pairs: 0.2 microseconds.
In return two kernels of two microseconds go in the first half of a block, three in the second.

BEFORE THE WAIT there is time that costs nothing: the kernel ahead is still at work. Lesson 17 spends it on loading;
making operands of the codes would fit in, too. Left to itself the assembler makes them where they are used, behind the
wait, as that takes fewer registers. `make_ready` (row_tiles.py) has something depend on them that must not move. Of
XL's first MLP layer 424 instructions are then left behind the wait, with four blocks of a warp's seven; before, 586.

THE NEXT KERNEL may move in before this one's own turn has come, and ask for its weight: four kernels of a block then
stand in line, each with all it can know already in its registers. What one reads before its wait must be older than the
line is long. Attention reads positions and keys and values that way (lesson 19); so it, like the embedding, lets nobody
in before its own turn. A step's line begins anew at each of them, and what attention reads is older than that.

MEASURED on an H200 (results/k18_fused_layers.json: command, versions, date; group size 64), LayerNorm to sum, beside
torch's five fp16 kernels:

    n_embd, M              768, 1     768, 8     1600, 1    1600, 8
    microseconds           4.6        6.9        6.9        10.9
    torch's fp16           18.7       18.7       27.6       27.9
    times as fast          4.1        2.7        4.0        2.6

Predicted: twice lesson 17's times and 0.2 each, 4.2 and 4.5 at 768, 6.8 and 8.7 at 1600, for one token and eight. One
token keeps to it. At 1600 the two kernels that take turns share the multiprocessors' registers, and the second's
programs, which hold 13 blocks a warp, do not fit beside the first's; why 8 tokens at 768 take 6.9 is not understood.
  Operands made before the wait: one token at 1600 took 8.3 without, eight 12.7, eight at 768 7.2. A step of GPT-2 XL at
position 1020 takes 799 microseconds with four blocks ready, 826 with two, 877 with none (predicted: 820 with four, 882
with none); with seven 914, as their registers keep other programs out. At n_embd 768 and 1024 two blocks gain up to 7%,
and four lose up to 7%, but at 768 and position 1020, where they gain 4%. At 1280 four gain 5% at position 1020 and lose
1% at 508. For eight sequences it is the other way about: up to 1280 four gain up to 14%, and at 1600 two gain 2 to 8%,
where four lose 1 to gain 3 (results/attempts.json).
  The next kernel let in at once: a step of GPT-2 124M took 132 microseconds at 128 positions where it had taken 147,
and 154 at 1024 (164); 140 was predicted. With that, four blocks made ready are better than two at 768 and 1024, too:
123 and 145 microseconds of 124M, and 2 to 6% of medium. Eight sequences of XL still want two blocks ready. Side by side
with letting it in behind the wait, at 128, 512 and 1024 positions, times as fast (results/attempts.json):

                     124M                   medium                 large                  XL
    one sequence     1.22   1.16   1.12     1.13   1.07   1.03     1.02   0.93   0.93     1.04   1.06   1.02
    eight            1.00   1.00   1.05     0.93   0.97   1.00     0.95   1.00   1.02     1.01   1.03   1.01

Where it loses is not understood. That attention's programs come in too early and take room was suspected, and that all
would be well if the kernel ahead of attention alone kept to its wait. So it is for large (1.01, 1.00 and 0.99) and for
medium (1.14, 1.10 and 1.05), but 124M then gains half as much, and XL nothing at 1024 (0.99). So at once it is, for
all.
  How it stands against cancellation: gamma x is kept in fp16, so what the subtraction cancels is lost from its three
digits. Where |mean| is ten times the deviation that costs one of them; below the deviation it hardly shows, and
GPT-2's mean is a fraction of it.
  Tried and failed (results/attempts.json): lesson 10's loop with the same ends. A step of GPT-2 124M took 226
microseconds, with lesson 17's 165; of XL 1,595 and 863.

NEXT. Of a block's kernels one is left that is not a matmul: attention (lesson 19), whose parts this kernel joins as it
loads x (SPLITS). EXERCISE. RMSNorm has no mean and no beta. What of `normalise` is left, and what of `sums`?
"""

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import common
from kernels.k00_reference import dequantize_reference, quantize_reference
from kernels.prepared import TILE_ROWS, PreparedWeight, prepare
from kernels.row_tiles import (
    gelu,
    launch_options,
    load_sums,
    load_weight,
    make_ready,
    multiply,
    normalise,
    ready_blocks,
    share_parts,
    share_tokens,
)
from kernels.stream import BLOCK_L, FoldedNorm, Parts, Stream, fold_norm, gelu_reference


@gluon.jit
def fused_kernel(
    x_ptr,  # fp16 [M, K]; SPLITS > 0: [K/64, SPLITS, 64]
    logs_ptr,  # SPLITS > 0: fp32 [K/64, SPLITS]
    positions_ptr,  # SPLITS > 0: int64 [1]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16 or fp32 [N]
    folded_ptr,  # NORM: fp32 [N]
    gamma_ptr,  # ADD: fp16 or fp32 [N], the next LayerNorm's weight
    residual_ptr,  # ADD: fp32 [M, N], read and written
    sums_ptr,  # NORM: fp32 [K/16, M, 2], read; ADD: fp32 [N/16, M, 2], written
    out_ptr,  # fp16 [M, N]
    M,
    N,
    K,
    blocks,
    eps,
    NORM: gl.constexpr,
    GELU: gl.constexpr,
    ADD: gl.constexpr,
    SPLITS: gl.constexpr,  # parts in which x comes, see lesson 19; 0: whole
    BLOCK_L: gl.constexpr,  # positions of a part
    TILES: gl.constexpr,  # at least K/16, a power of two
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    BLOCK_M: gl.constexpr,
    READY: gl.constexpr,  # blocks whose operands are made before the wait
    STEP: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes 16 numbers for each token: out = gelu(norm(x) @ w^T + bias), or residual += x @ w^T + bias."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    layout: gl.constexpr = gl.SliceLayout(0, mma)  # of [16, 8]
    tile = gl.program_id(0)
    offs_n = tile * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    TOKENS: gl.constexpr = 8 if BLOCK_M == 1 else BLOCK_M
    offs_m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    n = gl.minimum(offs_n, N - 1)
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]

    if PDL:
        gdc_launch_dependents()  # NEW: the next kernel's programs may move in at once; see above
    # Parameters may be loaded before the kernel ahead has ended; what it writes, only behind the wait.
    codes, words = load_weight(codes_ptr, scale_zeros_ptr, tile * 16, N, blocks, GROUP_SIZE, STEP, num_warps)
    bias = gl.load(bias_ptr + n).to(gl.float32)
    if NORM:
        folded = gl.load(folded_ptr + n)
    if ADD:
        gamma = gl.load(gamma_ptr + n).to(gl.float32)
    if SPLITS > 0:
        position = gl.load(positions_ptr).to(gl.int32)
        splits = gl.maximum((position + BLOCK_L - 1) // BLOCK_L, 1)
    ready = make_ready(codes, words, N, gl.float16, mma, READY if PDL else 0)  # NEW; no wait, nothing to gain
    if PDL:
        gdc_wait()
    if NORM:  # NEW
        sums, squares = load_sums(sums_ptr, M, K, TILES, BLOCK_M, num_warps)
    if ADD:  # NEW
        residual_ptrs = residual_ptr + (offs_m * N)[None, :] + offs_n[:, None]
        residual = gl.load(residual_ptrs, mask=mask, other=0.0)
    if SPLITS > 0:
        x = share_parts(x_ptr, logs_ptr, splits, blocks, SPLITS, STEP, num_warps)
    else:
        x = share_tokens(x_ptr, M, K, blocks, BLOCK_M, STEP, num_warps)
    out = multiply(x, ready, codes, words, BLOCK_M, STEP, mma, num_warps)  # [16, TOKENS]
    if NORM:  # NEW
        out = normalise(out, sums, squares, folded, K, eps, layout)
    out += bias[:, None]
    if GELU:  # NEW
        out = gelu(out)
    if ADD:  # NEW: this program alone has these 16 columns of the stream
        out += residual
        gl.store(residual_ptrs, out, mask=mask)
        kept = gl.where(mask, out, 0.0)
        sum_ptrs = sums_ptr + tile * M * 2 + offs_m * 2
        gl.store(sum_ptrs, gl.sum(kept, 0), mask=offs_m < M)
        gl.store(sum_ptrs + 1, gl.sum(kept * kept, 0), mask=offs_m < M)
        out *= gamma[:, None]
    gl.store(out_ptr + (offs_m * N)[None, :] + offs_n[:, None], out.to(gl.float16), mask=mask)


def launch(
    x: Tensor | Parts,
    weight: PreparedWeight,
    bias: Tensor,
    out: Tensor,
    stream: Stream,
    norm: FoldedNorm | None = None,
    eps: float = 0.0,
    gelu: bool = False,
    gamma: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Launches the kernel for 1 to 8 tokens, x [M, K] -> out [M, N]; x may be one token's attention in parts.

    Raises:
        ValueError: there are more.
    """
    m = len(out)
    if m > 8:
        raise ValueError(f"there are {m} tokens, this kernel multiplies at most 8")
    fused_kernel[(common.cdiv(weight.out_features, TILE_ROWS),)](
        x.outs if isinstance(x, Parts) else x,
        x.logs if isinstance(x, Parts) else None,
        positions,
        weight.codes,
        weight.scale_zeros,
        bias,
        norm.folded if norm else None,
        gamma,
        stream.residual,
        stream.sums,
        out,
        m,
        weight.out_features,
        weight.in_features,
        weight.blocks,
        eps,
        NORM=norm is not None,
        GELU=gelu,
        ADD=gamma is not None,
        SPLITS=x.logs.shape[2] if isinstance(x, Parts) else 0,
        BLOCK_L=BLOCK_L,
        TILES=triton.next_power_of_2(common.cdiv(weight.in_features, TILE_ROWS)),
        GROUP_SIZE=weight.group_size,
        BLOCK_M=1 if m == 1 else 8,
        READY=ready_blocks(m, weight.out_features, weight.in_features),
        **launch_options(weight.in_features),
        **common.early_launch(),
    )


def normed_matmul(stream: Stream, weight: PreparedWeight, norm: FoldedNorm, eps: float, gelu: bool = False) -> Tensor:
    """LayerNorm, linear layer, and GELU if asked for, of the residual stream.

    Args:
        stream: of M tokens and K columns; `scaled` must have been multiplied by this norm's weight.
        weight: of [N, K]; group size a multiple of 64.
        norm: made for this weight by `fold_norm`.
        eps: the LayerNorm's.
        gelu: apply GELU, in the tanh form.

    Returns:
        float16 [M, N].
    """
    out = torch.empty((len(stream.residual), weight.out_features), dtype=torch.float16, device=stream.residual.device)
    launch(stream.scaled, weight, norm.bias, out, stream, norm, eps, gelu)
    return out


def add_matmul(x: Tensor, weight: PreparedWeight, bias: Tensor, stream: Stream, gamma: Tensor) -> None:
    """Adds a linear layer's output to the residual stream, in place, and makes it ready for the next norm.

    Args:
        x: float16 [M, K], M at most 8.
        weight: of [N, K], N the stream's columns; group size a multiple of 64.
        bias: floating [N].
        stream: changed.
        gamma: floating [N], the weight of the LayerNorm that reads the stream next.
    """
    launch(x, weight, bias, stream.scaled, stream, gamma=gamma)


def add_joined(
    parts: Parts, positions: Tensor, weight: PreparedWeight, bias: Tensor, stream: Stream, gamma: Tensor
) -> None:
    """`add_matmul` of one token's attention, whose parts each program joins as it loads x, see lesson 19.

    Args:
        parts: of one sequence, heads of 64 numbers, as `kernels.k19_attention.attend_in_parts` left them.
        positions: int64 [1] (or [1, 1]), where the token stands. Read before the wait: see lesson 19's `attend`.
        weight, bias, stream, gamma: as in `add_matmul`.
    """
    launch(parts, weight, bias, stream.scaled, stream, gamma=gamma, positions=positions)


def check() -> Iterator[common.Check]:
    """A block's way, norm, linear, GELU, linear, sum, norm, linear, against float64."""
    if not common.has_mma(common.DEVICE):
        yield "mma.sync needs an NVIDIA GPU of sm_80 or newer, and this machine has none", None
        return
    for m, c, inner in ((1, 768, 3072), (8, 1600, 6400), (3, 64, 192)):
        yield from _check_block(m, c, inner)


def _check_block(m: int, c: int, inner: int) -> Iterator[common.Check]:
    gamma, beta = 1 + 0.1 * common.random_tensor(c, seed=1), common.random_tensor(c, seed=2)
    next_gamma, next_beta = 1 + 0.1 * common.random_tensor(c, seed=3), common.random_tensor(c, seed=4)
    first, second, third = (
        quantize_reference(common.random_tensor(*shape, seed=5) / math.sqrt(shape[1]), 64)
        for shape in ((inner, c), (c, inner), (3 * c, c))
    )
    biases = [common.random_tensor(size, seed=6) for size in (inner, c, 3 * c)]
    stream = Stream.zeros(m, c, common.DEVICE)
    stream.write(2 * common.random_tensor(m, c, dtype=torch.float32, seed=7) + 0.5, gamma)
    x = stream.residual.double()

    def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """LayerNorm in float64."""
        return torch.nn.functional.layer_norm(x, (c,), gamma.double(), beta.double(), 1e-5)

    def linear(x: Tensor, layer: int) -> Tensor:
        """One of the three layers, in float64."""
        w = dequantize_reference((first, second, third)[layer], torch.float32).double()
        return x @ w.t() + biases[layer].double()

    p1, p2, p3 = (prepare(weight) for weight in (first, second, third))
    hidden = normed_matmul(stream, p1, fold_norm(p1, gamma, beta, biases[0]), 1e-5, gelu=True)
    expected = gelu_reference(linear(norm(x, gamma, beta), 0))
    yield _compare(f"norm, {m} x {inner} x {c}, GELU", hidden, expected)
    add_matmul(hidden, p2, biases[1], stream, next_gamma)
    x = x + linear(hidden.double(), 1)
    yield _compare(f"sum, {m} x {c} x {inner}", stream.residual, x)
    qkv = normed_matmul(stream, p3, fold_norm(p3, next_gamma, next_beta, biases[2]), 1e-5)
    yield _compare(f"norm, {m} x {3 * c} x {c}", qkv, linear(norm(x, next_gamma, next_beta), 2))


def _compare(what: str, out: Tensor, expected: Tensor) -> common.Check:
    error = common.relative_error(out, expected)
    return f"{what}, relative error {error:.1e}", error < common.tolerance(torch.float16)


def bench() -> list[common.Row]:
    """Times the second half of GPT-2's blocks, LayerNorm to sum, beside torch's five fp16 kernels for it."""
    return [_bench_mlp(m, c) for c in (768, 1600) for m in (1, 8)]


def _bench_mlp(m: int, c: int) -> common.Row:
    copies = common.copies_to_fill_cache(4 * c * c)
    gamma, beta, bias_4c, bias = (common.random_tensor(size, seed=size) for size in (c, c, 4 * c, c))
    x, stream = common.random_tensor(m, c, seed=1), Stream.zeros(m, c, common.DEVICE)
    stream.write(x, gamma)
    layers = [(common.random_tensor(4 * c, c, seed=i), common.random_tensor(c, 4 * c, seed=i)) for i in range(copies)]
    packed = [tuple(prepare(quantize_reference(w, 64)) for w in layer) for layer in layers]
    norms = [fold_norm(first, gamma, beta, bias_4c) for first, _ in packed]

    def in_fp16(first: Tensor, second: Tensor) -> Tensor:
        """LayerNorm and two layers as torch has them, fp16: [M, C] added to x."""
        hidden = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (c,), gamma, beta), first, bias_4c)
        return x + torch.nn.functional.linear(gelu_reference(hidden), second, bias)

    def fused(first: PreparedWeight, second: PreparedWeight, norm: FoldedNorm) -> None:
        """The same by this lesson's kernel, into the stream."""
        add_matmul(normed_matmul(stream, first, norm, 1e-5, gelu=True), second, bias, stream, gamma)

    fp16 = common.microseconds(in_fp16, layers)
    time = common.microseconds(fused, [(*weights, norm) for weights, norm in zip(packed, norms, strict=True)])
    return {"m": m, "n_embd": c, "microseconds": time, "fp16_microseconds": fp16, "times_fp16": fp16 / time}


if __name__ == "__main__":
    common.run_lesson(check, bench)
