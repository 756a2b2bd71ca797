"""Adding up what programs that shared an output each computed of it: for lessons 9, 12, 22 and 23.

A launch of its own, and a small one. It lets the next kernel in before its own turn has come: a product that follows
then asks for its weight while this one's programs still multiply, 1.3 microseconds earlier (results/attempts.json).
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import common

BLOCK = 1024  # outputs a program


@triton.jit
def add_up_kernel(
    parts_ptr,  # fp32 [PARTS, M, N]
    bias_ptr,  # fp16, bf16 or fp32 [N], or nothing
    out_ptr,  # fp16 or bf16 [M, N]
    numel,  # M * N
    N,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums BLOCK outputs over the parts, always in the same order, so that the result is always the same bits."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # at once: the next product's weight may come while this one is made
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * numel + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def parts_with_work(rounds: int, parts: int) -> int:
    """How many of `parts` have any of `rounds` of a loop to do, if each takes as many as the first: at least one."""
    return common.cdiv(rounds, common.cdiv(rounds, parts))


def add_up(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = the sum of the parts, + bias.

    Args:
        parts: float32 [PARTS, M, N].
        bias: floating [N].
        out: float16 or bfloat16 [M, N], written.
    """
    block = BLOCK if out.numel() >= 132 * BLOCK else BLOCK // 4  # few outputs: more programs, to have them sooner
    add_up_kernel[(common.cdiv(out.numel(), block),)](
        parts,
        bias,
        out,
        out.numel(),
        out.shape[1],
        HAS_BIAS=bias is not None,
        PARTS=parts.shape[0],
        BLOCK=block,
        num_warps=4,
        **common.early_launch(),
    )
