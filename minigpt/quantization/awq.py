"""Activation-aware scaling (AWQ): moves rounding error away from the inputs that matter, before any weight is rounded.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978), section 3.2. Inputs of a layer differ
in size, and an error of a weight counts as much as its input is large. So multiply the columns of large inputs by
s > 1 and divide the inputs themselves by s:

    W x = (W diag(s)) (diag(1/s) x)          s_j = (mean |x_j|)^alpha, alpha from 0 (nothing) to 1

which is the same function, but after rounding the error of a column is s times smaller where it hurts. Too much of it
stretches the groups' ranges, and rounds the other columns worse: hence the search over alpha, with the quantizer that
will be used, for the least error of the layer's output (equation 4).

The division by s costs nothing, because what computes x takes it over. In a block of GPT-2 that can be done exactly at

    ln_1 -> attn.c_attn, ln_2 -> mlp.c_fc    LayerNorm's weight and bias are divided by s
    V -> attn.c_proj                         attention mixes positions, not channels: the rows of c_attn that compute
                                             V, and their biases, are divided by s; a row has scales of its own, so
                                             rounding it loses nothing by that

and not at mlp.c_fc -> mlp.c_proj: GELU(x / s) is not GELU(x) / s.

Measured (results/quantizers.json) on the demo model, groups of 128, KL divergence from FP in nats a token on a quarter
of its test text: mse 0.0200 -> 0.0197, absmax 0.0222 -> 0.0221, GPTQ 0.0106 -> 0.0107. A model this small, trained
with dropout, has no inputs that stand out; where some do, the gain is larger (a test makes such a model).

Tried and not built: rotating the residual stream by a random orthogonal matrix, merged into the weights (QuaRot,
Ashkboos et al. 2024, arXiv 2404.00456), which spreads what stands out over all channels. With a matrix that keeps
(1, ..., 1), LayerNorm needs no change, and the rotation is exact. On the demo mse went from 0.0200 to 0.0193 and
0.0180 (two matrices) and absmax from 0.0222 to 0.0217, far less than GPTQ gains; and the output layer can be tied to
wte no longer.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kernels import QuantizedWeight, dequantize
from minigpt.errors import UserError
from minigpt.model import GPT, Block
from minigpt.quantization.calibration import ResidualStream
from minigpt.quantization.convert import check_fits, layer_group_size

ALPHAS = tuple(step / 20 for step in range(21))
SCALED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc")  # the layers of a block whose inputs can be divided


@dataclass(frozen=True)
class ScalingReport:
    """What scaling does for one layer.

    Attributes:
        name: as in the model, e.g. h.0.attn.c_attn.
        alpha: the exponent chosen; 0 leaves the layer as it is.
        error_before, error_after: mean squared error of the layer's outputs, over those outputs' mean square.
    """

    name: str
    alpha: float
    error_before: float
    error_after: float


def describe(reports: Sequence[ScalingReport]) -> str:
    """What scaling did, in a line."""
    scaled = sum(report.alpha > 0 for report in reports)
    before, after = (
        statistics.mean(getattr(report, name) for report in reports) for name in ("error_before", "error_after")
    )
    return (
        f"activation-aware scaling: {scaled} of {len(reports)} layers; rounded, their outputs would be off by "
        f"{100 * after:.3f}% of their square, not by {100 * before:.3f}%"
    )


@torch.no_grad()
def scale(
    model: GPT, windows: Tensor, method: Callable[[Tensor, int], QuantizedWeight], group_size: int
) -> list[ScalingReport]:
    """Scales the weights of a floating model in place. The function it computes stays the same.

    Args:
        model: float32, in evaluation mode. Quantize it afterwards, with any method.
        windows: int64 [n, T], calibration text.
        method: a data-free quantizer, which decides what alpha is best.
        group_size: weights that share a scale, as for `minigpt.quantization.convert.quantize_model`.

    Returns:
        A report for each layer whose inputs can be scaled.

    Raises:
        UserError: the group size does not fit, the model is int4 already, or a layer's inputs or weights are not
            finite. Blocks before that layer are scaled by then, which changes nothing that they compute.
    """
    check_fits(model, group_size)
    stream = ResidualStream(model, windows)
    reports = []
    for index, block in enumerate(tqdm(model.h, desc="activation-aware scaling", unit="block")):
        assert isinstance(block, Block)
        for kind in SCALED:
            layer = block.get_submodule(kind)
            assert isinstance(layer, nn.Linear)
            magnitude, gram = sums(stream.inputs_of(layer, block), layer)
            size = layer_group_size(layer.in_features, group_size)
            s, report = search(f"h.{index}.{kind}", layer.weight, magnitude, gram, method, size)
            fold(block, kind, s)
            reports.append(report)
        stream.advance(block)
    return reports


@torch.no_grad()
def fold(block: Block, kind: str, s: Tensor) -> None:
    """Multiplies the columns of a layer by s, [in_features], and divides what computes its inputs by s, in place."""
    attention = block.attn
    values = slice(2 * attention.c_proj.in_features, None)  # of c_attn's rows: its outputs are Q, K and V
    layer, weight, bias = {
        "attn.c_attn": (attention.c_attn, block.ln_1.weight, block.ln_1.bias),
        "attn.c_proj": (attention.c_proj, attention.c_attn.weight[values], attention.c_attn.bias[values]),
        "mlp.c_fc": (block.mlp.c_fc, block.ln_2.weight, block.ln_2.bias),
    }[kind]
    layer.weight *= s
    weight /= s.view(-1, *[1] * (weight.ndim - 1))  # rows of a matrix, or elements of a vector
    bias /= s


def sums(inputs: Iterator[Tensor], layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """What the search needs of a layer's inputs x, given in chunks: each floating [tokens, in_features].

    Returns:
        The mean of |x|, float64 [in_features], and the sum of x x^T, float64 [in_features, in_features]. The squared
        error that a change D of the weight makes in the outputs, summed over tokens, is tr(D (sum of x x^T) D^T), so
        that no input need be kept.
    """
    magnitude = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)
    gram = torch.diag(magnitude)
    tokens = 0
    for x in inputs:
        magnitude += x.abs().sum(0)
        gram += x.t() @ x
        tokens += len(x)
    return magnitude / tokens, gram


def search(
    name: str,
    weight: Tensor,
    magnitude: Tensor,
    gram: Tensor,
    method: Callable[[Tensor, int], QuantizedWeight],
    group_size: int,
) -> tuple[Tensor, ScalingReport]:
    """The factors s of a layer's columns with the least error of its outputs.

    Args:
        name: for the report and errors.
        weight: float32 [out_features, in_features].
        magnitude, gram: of its inputs, see `sums`.
        method, group_size: how it will be quantized.

    Returns:
        s, float32 [in_features], and the report. Of equally good alphas the smallest is chosen.

    Raises:
        UserError: the layer's weights or inputs are not finite.
    """
    if not torch.isfinite(weight).all() or not torch.isfinite(gram).all():
        raise UserError(f"layer {name} has weights or inputs that are NaN or infinite; this model cannot be quantized")

    def error(change: Tensor) -> float:
        """Squared error of the layer's outputs when its weight changes by so much, [N, K]."""
        return ((change.double() @ gram) * change).sum().item()

    # Some inputs may be 0 in all of the text.
    magnitude = magnitude.clamp(min=1e-4 * magnitude.max().item() + 1e-30)
    best, chosen, errors = torch.ones_like(weight[0]), 0.0, []
    for alpha in ALPHAS:
        s = magnitude**alpha  # [in_features]
        s = (s / (s.max() * s.min()).sqrt()).to(weight.dtype)  # only ratios matter; these stay near 1
        restored = dequantize(method(weight * s, group_size), torch.float32) / s
        errors.append(error(restored - weight))
        if errors[-1] < min(errors[:-1], default=math.inf):
            best, chosen = s, alpha
    power = error(weight) or 1.0
    return best, ScalingReport(name, chosen, errors[0] / power, min(errors) / power)
