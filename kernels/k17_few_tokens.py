"""Lesson 17: one to eight tokens. NEW: the whole weight is on its way before the kernel asks what x is.

TEXT
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import common
from kernels.prepared import BLOCK, TILE_ROWS, PreparedWeight, prepare
from kernels.row_tiles import MOST_TOKENS, load_weight, multiply, share_tokens


@gluon.jit
def few_tokens_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    codes_ptr,  # int16 [N/16, blocks, 16, 16]
    scale_zeros_ptr,  # int32 [groups, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    blocks,
    HAS_BIAS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,  # a multiple of 64
    ROWS: gl.constexpr,  # of the weight, a program; a multiple of 16
    BLOCK_M: gl.constexpr,  # 1, 8 or 16: at least M
    STEP: gl.constexpr,  # blocks of 64 columns a warp
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Makes ROWS numbers of x @ w^T + bias for each token."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    first_row = gl.program_id(0) * ROWS
    # NEW: all that can be known of the weight, asked for at once.
    codes, words = load_weight(codes_ptr, scale_zeros_ptr, first_row, N, blocks, GROUP_SIZE, ROWS, STEP, num_warps)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = share_tokens(x_ptr, M, K, blocks, BLOCK_M, STEP, num_warps)
    out = multiply(x, codes, words, ROWS, BLOCK_M, STEP, mma, num_warps)  # [ROWS, TOKENS]
    layout: gl.constexpr = gl.SliceLayout(0, mma)
    offs_n = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, layout))
    if HAS_BIAS:
        out += gl.load(bias_ptr + gl.minimum(offs_n, N - 1)).to(gl.float32)[:, None]
    out_ptrs = out_ptr + (offs_m * N)[None, :] + offs_n[:, None]
    gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def launch_options(n: int, k: int) -> dict[str, int]:
    """Rows a program, blocks of 64 columns a warp, warps: as many warps as it takes to hold all of K."""
    blocks = triton.cdiv(k, BLOCK)
    warps = 4 if blocks <= 4 * 13 else 8
    return {"ROWS": TILE_ROWS, "STEP": triton.cdiv(blocks, warps), "num_warps": warps}


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for 1 to 8 tokens with an int4 weight, accumulated in float32; the same bits every time.

    Args:
        x: float16 or bfloat16 [..., K], with 1 to 8 tokens, on an NVIDIA GPU of sm_80 or newer.
        weight: of [N, K]; group size a multiple of 64.
        bias: floating [N].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape, dtype, group size or device that does not fit.
    """
    n, k = weight.out_features, weight.in_features
    common.check_operands(x, weight, bias)
    if weight.group_size % BLOCK:
        raise ValueError(f"group_size is {weight.group_size}, this kernel takes multiples of {BLOCK}")
    if not common.has_mma(x.device):
        raise ValueError(f"x is on {x.device}, this kernel needs an NVIDIA GPU of sm_80 or newer")
    x_2d = x.reshape(-1, k).contiguous()
    m = x_2d.shape[0]
    if not 1 <= m <= MOST_TOKENS:
        raise ValueError(f"x has shape {list(x.shape)}, this kernel multiplies 1 to {MOST_TOKENS} tokens of {k}")
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    options = launch_options(n, k)
    few_tokens_kernel[(triton.cdiv(n, options["ROWS"]),)](
        x_2d,
        weight.codes,
        weight.scale_zeros,
        bias,
        out,
        m,
        n,
        k,
        weight.blocks,
        HAS_BIAS=bias is not None,
        GROUP_SIZE=weight.group_size,
        BLOCK_M=1 if m == 1 else 8 if m <= 8 else 16,
        **options,
        **common.early_launch(),
    )
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64, where there is a GPU that can run it."""
    if not common.has_mma(common.DEVICE):
        yield "mma.sync needs an NVIDIA GPU of sm_80 or newer, and this machine has none", None
        return
    shapes = [(1, 40, 2048, 64), (3, 33, 384, 128), (8, 1000, 1600, 320), (5, 70, 8192, 128), (2, 4100, 4096, 4096)]
    yield from common.check_matmul(matmul, prepare, shapes)


def bench() -> list[common.Row]:
    """Times one, four and eight tokens through a square 8192-wide layer beside torch's own fp16 matmul."""
    return common.bench_matmul(matmul, prepare, tokens=(1, 4, 8))


if __name__ == "__main__":
    common.run_lesson(check, bench)
