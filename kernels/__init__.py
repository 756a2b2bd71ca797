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

from kernels.cpu import CPUWeight, exact_on_cpu, prepare_for_cpu  # noqa: E402
from kernels.front_door import dequantize, matmul, matmul_int8, quantize  # noqa: E402
from kernels.fused import (  # noqa: E402
    add_matmul,
    all_blocks,
    attend,
    attend_and_add,
    best_tokens,
    can_fuse,
    embed,
    mail_for,
    normed_matmul,
    score,
)
from kernels.int8 import Int8Weight, dequantize_int8, quantize_int8  # noqa: E402
from kernels.k00_reference import (  # noqa: E402
    MAX_CODE,
    MAX_SCALE,
    QuantizedWeight,
    choose_scales,
    encode,
    group_sizes,
    pack,
    pack_weight,
    unpack,
    unpack_weight,
)
from kernels.lookup import lookup  # noqa: E402
from kernels.prepared import PreparedWeight, prepare, restore  # noqa: E402
from kernels.stream import FoldedNorm, Layers, Linears, Mail, Parts, Stream, fold_norm  # noqa: E402

__all__ = [
    "MAX_CODE",
    "MAX_SCALE",
    "CPUWeight",
    "FoldedNorm",
    "Int8Weight",
    "Layers",
    "Linears",
    "Mail",
    "Parts",
    "PreparedWeight",
    "QuantizedWeight",
    "Stream",
    "add_matmul",
    "all_blocks",
    "attend",
    "attend_and_add",
    "best_tokens",
    "can_fuse",
    "choose_scales",
    "dequantize",
    "dequantize_int8",
    "embed",
    "encode",
    "exact_on_cpu",
    "fold_norm",
    "group_sizes",
    "lookup",
    "mail_for",
    "matmul",
    "matmul_int8",
    "normed_matmul",
    "pack",
    "pack_weight",
    "prepare",
    "prepare_for_cpu",
    "quantize",
    "quantize_int8",
    "restore",
    "score",
    "unpack",
    "unpack_weight",
]
