"""Activations as 8-bit integers, for lessons 13 and 15: one scale a token, and one for each row of the weight.

    x8[m, k] = round(x[m, k] / token_scale[m])          token_scale = max |x[m, :]| / 127
    w8[n, k] = round(w[n, k] / row_scale[n])            row_scale: the largest |w| that row n's codes allow, / 127

    out[m, n] = (sum over k of x8 * w8, exact in int32) * token_scale[m] * row_scale[n]

x8 is kept in the order in which an int4 weight comes apart into bytes. A byte of prepared codes (prepared.py) holds
two nibbles; masking out the low ones of a whole tile gives one operand, the high ones another. So of each 64 columns,

    position 32 s + 2 j + p      holds column 16 (2 p + s) + j      s = low or high nibble, j = half-word, p = its byte
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.prepared import BLOCK, PreparedWeight

ROWS = 32  # rows of the weight whose scales one program works out


@triton.jit
def quantize_token(x_ptr, x8_ptr, token_scales_ptr, m, K, WIDTH, BLOCK_K: tl.constexpr):
    """x[m, :] -> x8[m, :], its scale: all of a row at once."""
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + m.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x)) * (1 / 127)
    # Adding and subtracting 1.5 * 2^23 rounds to a whole number, halves to even. A row of zeros stays zeros.
    x8 = (x * (1.0 / tl.maximum(scale, 1e-30)) + 12582912.0 - 12582912.0).to(tl.int8)
    # k = 64 b + 32 p + 16 s + j   ->   64 b + 32 s + 2 j + p
    x8 = tl.permute(tl.reshape(x8, (BLOCK_K // 64, 2, 2, 16)), (0, 2, 3, 1))
    tl.store(x8_ptr + m.to(tl.int64) * WIDTH + k, tl.reshape(x8, (BLOCK_K,)), mask=k < WIDTH)
    tl.store(token_scales_ptr + m, scale)


@triton.jit
def scale_rows(
    scale_zeros_ptr, ratio_zeros_ptr, row_scales_ptr, first, groups, N, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """The scales of ROWS rows, and their groups' scales as multiples of them: all groups at once."""
    n = first + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    offs = group[:, None] * N + n[None, :]  # [GROUPS, ROWS]
    mask = (group < groups)[:, None] & (n < N)[None, :]
    word = tl.load(scale_zeros_ptr + offs, mask=mask, other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) - 1024.0
    # A code lies at most max(zero, 15 - zero) steps from its zero. Where there is no group the scale is 0.
    row_scale = tl.max(tl.abs(scale) * tl.maximum(zero, 15.0 - zero), 0) * (1 / 127)  # [ROWS]
    ratio = scale * (1.0 / tl.maximum(row_scale, 1e-30))[None, :]
    ratio = ratio.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    tl.store(ratio_zeros_ptr + offs, (word & -65536) | ratio, mask=mask)
    tl.store(row_scales_ptr + n, row_scale, mask=n < N)


@triton.jit
def quantize_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    scale_zeros_ptr,  # int32 [groups, N]
    x8_ptr,  # int8 [M, WIDTH]
    token_scales_ptr,  # fp32 [M]
    ratio_zeros_ptr,  # int32 [groups, N]
    row_scales_ptr,  # fp32 [N]
    M,
    N,
    K,
    WIDTH,
    groups,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first M programs quantize a token each, the others scale ROWS rows each: one launch for both."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < M:
        quantize_token(x_ptr, x8_ptr, token_scales_ptr, pid, K, WIDTH, BLOCK_K)
    else:
        scale_rows(scale_zeros_ptr, ratio_zeros_ptr, row_scales_ptr, (pid - M) * ROWS, groups, N, ROWS, GROUPS)


def quantize_activations(x: Tensor, weight: PreparedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes tokens to int8, and finds the row scales of the weight that they will meet.

    Args:
        x: float16 or bfloat16 [M, K], contiguous.
        weight: of [N, K].

    Returns:
        x8: int8 [M, K rounded up to 64], in the order above, zeros past the end of K.
        token_scales: float32 [M].
        ratio_zeros: int32 [groups, N], the weight's scale_zeros with scale / row_scale for the scales.
        row_scales: float32 [N].
    """
    m, k = x.shape
    n, width = weight.out_features, weight.blocks * BLOCK
    x8 = torch.empty((m, width), dtype=torch.int8, device=x.device)
    token_scales = torch.empty(m, dtype=torch.float32, device=x.device)
    ratio_zeros = torch.empty(weight.scale_zeros.shape, dtype=torch.int32, device=x.device)
    row_scales = torch.empty(n, dtype=torch.float32, device=x.device)
    block_k = max(BLOCK, triton.next_power_of_2(width))
    quantize_kernel[(m + triton.cdiv(n, ROWS),)](
        x,
        weight.scale_zeros,
        x8,
        token_scales,
        ratio_zeros,
        row_scales,
        m,
        n,
        k,
        width,
        weight.scale_zeros.shape[0],
        BLOCK_K=block_k,
        ROWS=ROWS,
        GROUPS=triton.next_power_of_2(weight.scale_zeros.shape[0]),
        num_warps=min(16, max(4, block_k // 1024)),
        **common.early_launch(),
    )
    return x8, token_scales, ratio_zeros, row_scales
