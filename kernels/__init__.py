"""The course: int4 kernels for linear layers, step by step. It knows tensors and knows nothing of GPT.

The lessons are k00, k01, ... (`kernels/README.md` is their index). Programs use the three functions below, which run
the lessons' Triton kernels on a GPU and the plain-torch reference of lesson 0 everywhere else, with the same results.
"""

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

# Without a GPU the lessons run in Triton's interpreter, which must be asked for before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `python -m kernels.k00_reference` finds that module imported already, by the next line. That is as it should be.
warnings.filterwarnings("ignore", message="'kernels.k00_reference' found in sys.modules", category=RuntimeWarning)

from kernels.k00_reference import (  # noqa: E402
    QuantizedWeight,
    dequantize_reference,
    group_sizes,
    matmul_reference,
    pack,
    quantize_reference,
    unpack,
)

__all__ = ["QuantizedWeight", "dequantize", "group_sizes", "matmul", "pack", "quantize", "unpack"]

MANY_TOKENS = 32
HAS_TRITON = find_spec("triton") is not None


def quantize(weight: Tensor, group_size: int, symmetric: bool = False, search: bool = False) -> QuantizedWeight:
    """Quantizes a weight to int4: lesson 1's kernel on a GPU, the reference elsewhere; bit for bit the same codes.

    Arguments and errors are those of `kernels.k00_reference.quantize_reference`.
    """
    if HAS_TRITON and weight.is_cuda:
        from kernels.k01_quantize import quantize as quantize_triton

        return quantize_triton(weight, group_size, symmetric, search)
    return quantize_reference(weight, group_size, symmetric, search)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the codes stand for: -> `dtype` [N, K]. Lesson 2's kernel on a GPU, the reference elsewhere."""
    if HAS_TRITON and weight.qweight.is_cuda:
        from kernels.k02_dequantize import dequantize as dequantize_triton

        return dequantize_triton(weight, dtype)
    return dequantize_reference(weight, dtype)


def matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x @ w^T: float16 or bfloat16 [..., K] -> [..., N] in x's dtype, accumulated in float32.

    Elsewhere than on a GPU the reference, which takes float32 too. On a GPU lesson 4's kernel for few tokens; for
    more, lesson 2's and then torch's own fp16 matmul, which is faster from MANY_TOKENS on (kernels/README.md).
    """
    if HAS_TRITON and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        if x.numel() // x.shape[-1] < MANY_TOKENS:
            from kernels.k04_w4a16 import matmul as matmul_triton

            return matmul_triton(x, weight)
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype))
    return matmul_reference(x, weight)
