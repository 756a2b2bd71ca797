"""The front door: what programs call, without knowing which lesson serves them.

On a GPU the lessons' Triton kernels; everywhere else the plain torch of lesson 0 and, for a weight prepared for it,
torch's own kernels for CPUs. RULES below says which lesson multiplies. On a GPU whose architecture is not among
MEASURED, lesson 9's launch options are tuned when a shape is first seen (lesson 14 says how, and where they are
remembered); MINIGPT_AUTOTUNE=1 in the environment asks for that on every GPU.
"""

import functools
import importlib
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import cpu
from kernels.cpu import CPUWeight
from kernels.int8 import Int8Weight, dequantize_int8, matmul_int8_reference
from kernels.k00_reference import QuantizedWeight, dequantize_reference, quantize_reference
from kernels.prepared import PreparedWeight, prepare, restore

HAS_TRITON = find_spec("triton") is not None

# ---- which lesson ----------------------------------------------------------------------------------------------------

ANY_GPU = ""
ANY_NUMBER = 2**63
REFERENCE = "k00_reference"
VENDORS = "k11_dequantize_gemm"  # leaves the product to the vendor's matmul, which wants one dtype


class Rule(NamedTuple):
    """When to take a lesson.

    Attributes:
        gpu: what the architecture's name begins with: sm_90, or sm_7 for all of that generation.
        activation_bits: 16, or 8 for a lesson that rounds activations, which the caller must have allowed.
        most_tokens: M is at most this.
        least_work: M * N * K is at least this.
        group_unit: the group size is a multiple of this.
        lesson: the module whose `matmul` it is.
        most_rows: N is at most this.
        most_columns: K is at most this.
        least_fill: at least this share of the multiprocessors is at work, by `fill`, if lesson 12's tallest tiles are
            dealt out to them in rounds.
        most_outputs: M * N is at most this.
        most_work: M * N * K is at most this.
        least_weight: N * K is at least this.
        row_unit: N is a multiple of this.
    """

    gpu: str
    activation_bits: int
    most_tokens: int
    least_work: int
    group_unit: int
    lesson: str
    most_rows: int = ANY_NUMBER
    most_columns: int = ANY_NUMBER
    least_fill: float = 0.0
    most_outputs: int = ANY_NUMBER
    most_work: int = ANY_NUMBER
    least_weight: int = 0
    row_unit: int = 1


# The first rule that fits decides. Those for sm_90 were measured on an H200 (results/matmul.json, k17_few_tokens.json,
# k22_two_rings.json, attempts.json): lesson 17 serves one token, and a few where a program can hold a row's codes in
# its registers; lesson 22 the middle, as long as out has no more than two of its largest tiles for each multiprocessor
# (four, with up to 128 tokens), and rows are not too long for that. What it leaves, of up to 80 tokens lesson 9 takes,
# of more lesson 12, and lesson 9 the groups that only it knows. Where rows are no multiple of 4, lessons 12, 17 and 22
# have 0.5 to 0.9 of lesson 9's speed (measured with the 50,257 of GPT-2's output layer, up to 256 tokens). From some
# 400 on, lesson 11 leaves the product to the vendor, who has tiles of all sizes: lesson 12 is ahead only where its own
# happen to fill the machine. To round activations to 8 bits is a pass of its own, and pays from some 3 billion products
# on, if the weight is not a small one: for 1280 x 1280 and less, 16 bits are as fast or faster, whatever the number of
# tokens; for 3072 x 768 they are level. Lesson 23 was ahead of 13 and 15 at all shapes. Rules for any GPU take what
# asks least of it.
RULES = (
    Rule("sm_90", 8, ANY_NUMBER, 3 * 2**30, 64, "k23_w4a8_rings", least_weight=2**21),
    Rule("sm_7", 8, ANY_NUMBER, 2**32, 16, VENDORS, least_weight=2**21),  # too old for lesson 13
    Rule(ANY_GPU, 8, ANY_NUMBER, 2**32, 16, "k13_w4a8", least_weight=2**21),
    Rule("sm_90", 16, 1, 0, 64, "k17_few_tokens", most_columns=8192),
    Rule("sm_90", 16, 8, 0, 64, "k17_few_tokens", most_columns=4096, row_unit=4),
    Rule("sm_90", 16, 8, 0, 64, "k17_few_tokens", most_columns=8192, most_rows=4096, row_unit=4),
    Rule("sm_90", 16, 16, 0, 64, "k17_few_tokens", most_columns=2048, most_rows=2048, row_unit=4),
    Rule(ANY_GPU, 16, 1, 0, 16, "k10_gemv"),
    Rule("sm_90", 16, 128, 0, 64, "k22_two_rings", most_outputs=2**22, most_work=2**33, row_unit=4),
    Rule("sm_90", 16, ANY_NUMBER, 0, 64, "k22_two_rings", most_outputs=2**21, most_work=2**33, row_unit=4),
    Rule("sm_90", 16, 80, 0, 16, "k09_split_k"),
    Rule("sm_90", 16, 384, 0, 64, "k12_hopper", row_unit=4),
    Rule(ANY_GPU, 16, 256, 0, 16, "k09_split_k"),
    Rule("sm_90", 16, 1024, 0, 64, "k12_hopper", least_fill=0.75),
    Rule("sm_90", 16, 4095, 0, 64, "k12_hopper", least_fill=0.9),
    Rule(ANY_GPU, 16, ANY_NUMBER, 0, 16, VENDORS),
)
MEASURED = ("sm_90",)
INT8_LESSON_TOKENS = 16  # lesson 16 multiplies this many; more are better served by the vendor's matmul
DEQUANTIZERS = {
    QuantizedWeight: "k02_dequantize",
    PreparedWeight: "k11_dequantize_gemm",
    Int8Weight: "k16_int8_rows",
}


@functools.lru_cache(maxsize=4096)  # every matmul asks
def choose_lesson(gpu: str, activation_bits: int, m: int, n: int, k: int, group_size: int, multiprocessors: int) -> str:
    """The name of the lesson's module that RULES gives for x [m, k] and a weight [n, k]."""
    return next(
        rule.lesson
        for rule in RULES
        if gpu.startswith(rule.gpu)
        and activation_bits <= rule.activation_bits
        and m <= rule.most_tokens
        and m * n * k >= rule.least_work
        and group_size % rule.group_unit == 0
        and n <= rule.most_rows
        and k <= rule.most_columns
        and fill(m, n, multiprocessors) >= rule.least_fill
        and m * n <= rule.most_outputs
        and m * n * k <= rule.most_work
        and n * k >= rule.least_weight
        and n % rule.row_unit == 0
    )


def fill(m: int, n: int, multiprocessors: int) -> float:
    """The share of the multiprocessors that have a tile of 256 x 128 of out [m, n], over all rounds."""
    tiles = -(-m // 256) * -(-n // 128)
    return tiles / (-(-tiles // multiprocessors) * multiprocessors)


@functools.cache
def architecture(device: torch.device) -> str:
    """What a GPU's machine code is called: sm_90 on an H200, gfx942 on an MI300. Cached: every matmul asks."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# ---- what programs call ----------------------------------------------------------------------------------------------


def quantize(weight: Tensor, group_size: int, symmetric: bool = False, search: bool = False) -> QuantizedWeight:
    """Quantizes a weight to int4: lesson 1's kernel on a GPU, the reference elsewhere; bit for bit the same codes.

    Arguments and errors are those of `kernels.k00_reference.quantize_reference`.
    """
    if HAS_TRITON and weight.is_cuda:
        from kernels.k01_quantize import quantize as quantize_triton

        with torch.cuda.device_of(weight):  # Triton launches on the current GPU
            return quantize_triton(weight, group_size, symmetric, search)
    return quantize_reference(weight, group_size, symmetric, search)


def dequantize(
    weight: QuantizedWeight | PreparedWeight | CPUWeight | Int8Weight, dtype: torch.dtype = torch.float16
) -> Tensor:
    """The weight [N, K] that the codes stand for: lessons 2, 11 and 16 on a GPU, the references elsewhere.

    Args:
        weight: in any layout, on any device.
        dtype: float16, bfloat16 or float32.

    Returns:
        `dtype` [N, K].
    """
    if isinstance(weight, CPUWeight):
        weight = weight.file
    if HAS_TRITON and weight[0].is_cuda:
        with torch.cuda.device_of(weight[0]):  # Triton launches on the current GPU
            return importlib.import_module(f"kernels.{DEQUANTIZERS[type(weight)]}").dequantize(weight, dtype)
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, dtype)
    return dequantize_reference(restore(weight) if isinstance(weight, PreparedWeight) else weight, dtype)


def matmul(
    x: Tensor,
    weight: QuantizedWeight | PreparedWeight | CPUWeight,
    bias: Tensor | None = None,
    activation_bits: int = 16,
) -> Tensor:
    """x @ w^T + bias with an int4 weight, accumulated in float32; no gradients.

    On a GPU give it a prepared weight: `prepare` it once, when the model is loaded. A weight in the file's format works
    as well, but is prepared anew in each call, which takes many times as long as the product. On a CPU
    `prepare_for_cpu` does the like; products are then made in bfloat16, except within `exact_on_cpu`, and of more than
    `cpu.MOST_TOKENS` tokens where the CPU has no instructions for it (`kernels.cpu`).

    Args:
        x: float16, bfloat16 or float32 [..., K], on the weight's device; on a GPU float32 is served by the reference.
        weight: of [N, K].
        bias: floating [N].
        activation_bits: 16 multiplies x as it is; 8 allows rounding each token to 255 levels first (W4A8), which costs
            some accuracy, and which a GPU does where it is faster: with many tokens and large weights. (There the
            weight is rounded to 255 levels a row, too. Elsewhere tokens are rounded whatever their number, so that one
            can see what it costs.)

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape, dtype or number of bits that does not fit.
    """
    _check(x, weight, bias, activation_bits)
    if isinstance(weight, CPUWeight):
        if activation_bits == 16 and cpu.serves(x):
            out = cpu.matmul_int4(x, weight)
            return out if bias is None else out + bias.to(x.dtype)
        weight = weight.file
    if isinstance(weight, QuantizedWeight):
        if not (HAS_TRITON and x.is_cuda):
            return matmul_reference(x, weight, bias, activation_bits)
        weight = prepare(weight)
    return torch.ops.minigpt.int4_matmul(x, *weight, bias, activation_bits)


def matmul_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T with an int8 weight, accumulated in float32 or exactly; no gradients.

    On a GPU lesson 16's kernel for few tokens; for more the weight is written out for the vendor's matmul.
    On a CPU torch's int8 kernel where it is exact, else float32.

    Args:
        x: float16, bfloat16 or float32 [..., K], on the weight's device.
        weight: of [N, K].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    _check(x, weight, None, 16)
    return torch.ops.minigpt.int8_matmul(x, weight.codes, weight.scales)


def _check(
    x: Tensor,
    weight: QuantizedWeight | PreparedWeight | CPUWeight | Int8Weight,
    bias: Tensor | None,
    activation_bits: int,
) -> None:
    n, k = weight.out_features, weight.in_features
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, its last dimension must be the weight's in_features {k}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}, it must be float16, bfloat16 or float32")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != n):
        raise ValueError(f"bias has shape {list(bias.shape)}, it must be [{n}], the weight's out_features")
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits is {activation_bits}, it must be 16 or 8")


# ---- the references --------------------------------------------------------------------------------------------------


def matmul_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
    """`matmul` in plain torch, on any device; arguments and result are the same."""
    bias = None if bias is None else bias.to(x.dtype)
    if activation_bits == 16:
        return torch.nn.functional.linear(x, dequantize_reference(weight, x.dtype), bias)
    codes, scales = quantize_activations(x)
    out = torch.nn.functional.linear(codes.float(), dequantize_reference(weight, torch.float32)) * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each token, halves to even: floating [..., K] -> codes int8 [..., K], -127..127; scales float32 [..., 1].

    A token's scale is the largest magnitude in it / 127; a token of zeros has codes 0.
    """
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(x / scales.clamp(min=torch.finfo(torch.float32).tiny))
    return codes.to(torch.int8), scales


# ---- the operator ----------------------------------------------------------------------------------------------------


# torch.compile does not look inside of an operator, so Triton's launchers are no graph break for it. Defined without
# `torch.library.custom_op`, whose checks take 24 microseconds a call in torch 2.11 and 5 in 2.13; this way it is 3
# (results/attempts.json).
LIBRARY = torch.library.Library("minigpt", "DEF")
LIBRARY.define(
    "int4_matmul(Tensor x, Tensor codes, Tensor scale_zeros, Tensor row_scales, int in_features, int group_size, "
    "Tensor? bias, int activation_bits) -> Tensor"
)
LIBRARY.define("int8_matmul(Tensor x, Tensor codes, Tensor scales) -> Tensor")


@torch.library.impl(LIBRARY, "int4_matmul", "CompositeExplicitAutograd")
def int4_matmul(
    x: Tensor,
    codes: Tensor,
    scale_zeros: Tensor,
    row_scales: Tensor,
    in_features: int,
    group_size: int,
    bias: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """`matmul` with a prepared weight, as the operator torch.ops.minigpt.int4_matmul over plain tensors and numbers."""
    weight = PreparedWeight(codes, scale_zeros, row_scales, in_features, group_size)
    m, n = x.numel() // in_features, weight.out_features
    if m == 0:
        return x.new_empty((*x.shape[:-1], n))
    lesson = REFERENCE
    if _serves(x):
        gpu, count = architecture(x.device), _multiprocessors(x.device)
        lesson = choose_lesson(gpu, activation_bits, m, n, in_features, group_size, count)
    if lesson == REFERENCE:
        return matmul_reference(x.contiguous(), restore(weight), bias, activation_bits)
    # The other lessons take a bias as it is, and may read it before they wait for the kernel ahead: for one that casts.
    if bias is not None and lesson == VENDORS:
        bias = bias.to(x.dtype)
    with torch.cuda.device_of(x):
        return _run(lesson, x, weight, bias)


@torch.library.register_fake("minigpt::int4_matmul", lib=LIBRARY)
def _(x: Tensor, codes: Tensor, scale_zeros: Tensor, *_: object) -> Tensor:
    """What comes out, without its numbers: for torch.compile."""
    return x.new_empty((*x.shape[:-1], scale_zeros.shape[1]))


@torch.library.impl(LIBRARY, "int8_matmul", "CompositeExplicitAutograd")
def int8_matmul(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`matmul_int8` as the operator torch.ops.minigpt.int8_matmul over plain tensors."""
    weight = Int8Weight(codes, scales)
    m = x.numel() // weight.in_features
    if m == 0:
        return x.new_empty((*x.shape[:-1], weight.out_features))
    if m <= INT8_LESSON_TOKENS and _serves(x):
        with torch.cuda.device_of(x):
            return importlib.import_module("kernels.k16_int8_rows").matmul(x, weight)
    if x.is_cuda:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype))
    return cpu.matmul_int8(x, weight) if cpu.has_int8_kernel() else matmul_int8_reference(x, weight)


@torch.library.register_fake("minigpt::int8_matmul", lib=LIBRARY)
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    """What comes out, without its numbers: for torch.compile."""
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _no_gradient(*_: object) -> None:
    """Instead of a gradient. Without this, autograd would not see into a Triton kernel, and be wrong with a warning."""
    raise RuntimeError("products with int4 and int8 weights have no gradients")


torch.library.register_autograd("minigpt::int4_matmul", _no_gradient, lib=LIBRARY)
torch.library.register_autograd("minigpt::int8_matmul", _no_gradient, lib=LIBRARY)


def _serves(x: Tensor) -> bool:
    """Whether kernels can multiply x: there are Triton and a GPU, and its tensor cores know the dtype."""
    if not (HAS_TRITON and x.is_cuda):
        return False
    old = architecture(x.device).startswith("sm_7")
    return x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not old)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    from kernels import common  # with Triton, only here

    return common.multiprocessors(device)


def _run(lesson: str, x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    module = importlib.import_module(f"kernels.{lesson}")  # with Triton, only here
    if lesson == "k09_split_k" and _tunes(x.device):
        from kernels.k14_autotune import tuned_options

        return module.matmul(x, weight, bias, tuned_options(module.matmul, module.candidates, x, weight))
    return module.matmul(x, weight, bias)


def _tunes(device: torch.device) -> bool:
    return architecture(device) not in MEASURED or os.environ.get("MINIGPT_AUTOTUNE") == "1"
