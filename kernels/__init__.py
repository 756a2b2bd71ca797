"""The course: int4 kernels for linear layers, step by step. It knows tensors and knows nothing of GPT.

The lessons are k00, k01, ... (`kernels/README.md` is their index). Programs use the names below, which run the
lessons' Triton kernels on a GPU and the plain-torch reference of lesson 0 everywhere else (`kernels/front_door.py`).
"""

import os
import warnings

import torch

# Without a GPU the lessons run in Triton's interpreter, which must be asked for before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `python -m kernels.k00_reference` finds that module imported already, by the next line. That is as it should be.
warnings.filterwarnings("ignore", message="'kernels.k00_reference' found in sys.modules", category=RuntimeWarning)

from kernels.front_door import dequantize, matmul, quantize  # noqa: E402
from kernels.fused import add_matmul, attend, can_fuse, embed, normed_matmul, score  # noqa: E402
from kernels.k00_reference import QuantizedWeight, group_sizes, pack, unpack  # noqa: E402
from kernels.prepared import PreparedWeight, prepare, restore  # noqa: E402
from kernels.stream import FoldedNorm, Parts, Stream, fold_norm  # noqa: E402

__all__ = [
    "FoldedNorm",
    "Parts",
    "PreparedWeight",
    "QuantizedWeight",
    "Stream",
    "add_matmul",
    "attend",
    "can_fuse",
    "dequantize",
    "embed",
    "fold_norm",
    "group_sizes",
    "matmul",
    "normed_matmul",
    "pack",
    "prepare",
    "quantize",
    "restore",
    "score",
    "unpack",
]
