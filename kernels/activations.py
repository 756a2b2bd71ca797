"""Activations as 8-bit integers, for lessons 13, 15 and 23: one scale a token, and one for each row of the weight.

    x8[m, k] = round(x[m, k] / token_scale[m])          token_scale = max |x[m, :]| / 127
    w8[n, k] = round(w[n, k] / row_scale[n])            row_scale: the largest |w| that row n's codes allow, / 127

    out[m, n] = (sum over k of x8 * w8, exact in int32) * token_scale[m] * row_scale[n]

x8 is kept in the order in which an int4 weight comes apart into bytes. A byte of prepared codes (prepared.py) holds
two nibbles; masking out the low ones of a whole tile gives one operand, the high ones another. So of each 64 columns,

    position 32 s + 2 j + p      holds column 16 (2 p + s) + j      s = low or high nibble, j = half-word, p = its byte

So columns 0 to 31 and 32 to 63 of a block alternate, and a thread that loads eight neighbours of each half, 16 bytes
twice, has 16 neighbours of x8: nothing changes threads.

Row scales do not depend on x: `prepare` makes them. A group's scale as a multiple of its row's, what w8 is made with,
the products' kernels work out for themselves, a few instructions a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common
from kernels.prepared import BLOCK

# With more, early programs cost more than they gain: 3% of 200 us at 2048 tokens of 8192 columns (attempts.json).
EARLY_NUMBERS = 2**22


@triton.jit
def quantize_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    x8_ptr,  # int8 [M, WIDTH]
    token_scales_ptr,  # fp32 [M]
    K,
    WIDTH,
    HALF: tl.constexpr,  # at least WIDTH / 2, a power of two
    EARLY: tl.constexpr,  # the product's programs may move in before this launch's turn has come
    PDL: tl.constexpr,
):
    """A program quantizes a token, all of it at once."""
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF)
    k = i // 32 * 64 + i % 32  # columns of the first half of each block; the other half's lie 32 further
    x_ptrs = x_ptr + token * K + k
    first = tl.load(x_ptrs, mask=k < K, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + 32, mask=k + 32 < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.maximum(tl.abs(first), tl.abs(second))) * (1 / 127)
    # Above 1.5 * 2^23 numbers are 1 apart: adding it rounds, halves to even, and leaves the whole number, two's
    # complement, in the low byte of the sum's bits. A row of zeros stays zeros.
    x8 = tl.join(first, second) * (1.0 / tl.maximum(scale, 1e-30)) + 12582912.0  # [HALF, 2]
    x8 = tl.reshape(x8.to(tl.int32, bitcast=True).to(tl.int8), (2 * HALF,))
    position = tl.arange(0, 2 * HALF)
    tl.store(x8_ptr + token * WIDTH + position, x8, mask=position < WIDTH)
    tl.store(token_scales_ptr + token, scale)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes tokens to int8.

    Args:
        x: float16 or bfloat16 [M, K], contiguous.

    Returns:
        x8: int8 [M, K rounded up to 64], in the order above, zeros past the end of K.
        token_scales: float32 [M].
    """
    m, k = x.shape
    width = common.cdiv(k, BLOCK) * BLOCK
    x8 = torch.empty((m, width), dtype=torch.int8, device=x.device)
    token_scales = torch.empty(m, dtype=torch.float32, device=x.device)
    half = triton.next_power_of_2(width // 2)
    quantize_kernel[(m,)](
        x,
        x8,
        token_scales,
        k,
        width,
        HALF=half,
        EARLY=x.numel() <= EARLY_NUMBERS,
        num_warps=min(16, max(1, half // 512)),  # 16 columns of each half a thread
        **common.early_launch(),
    )
    return x8, token_scales
