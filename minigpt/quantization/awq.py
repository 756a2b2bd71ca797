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
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kernels import QuantizedWeight, dequantize
from minigpt.errors import UserError
from minigpt.model import GPT, Block
from minigpt.quantization.convert import check_fits, layer_group_size

ALPHAS = tuple(step / 20 for step in range(21))
BATCH = 8  # windows that go through a block at once


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


@dataclass
class InputStatistics:
    """What is kept of all inputs x of a layer: float64 sums over tokens.

    Attributes:
        magnitude: sum of |x|, [in_features].
        gram: sum of x x^T, [in_features, in_features]. The squared error that a change D of the weight makes in the
            outputs, summed over tokens, is tr(D gram D^T): no input need be kept.
        tokens: how many.
    """

    magnitude: Tensor
    gram: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """x: floating [..., in_features]."""
        x = x.flatten(0, -2)  # [tokens, in_features]
        self.magnitude += x.abs().sum(0)
        self.gram += x.t() @ x
        self.tokens += len(x)


@torch.no_grad()
def scale(
    model: GPT, windows: Tensor, method: Callable[[Tensor, int], QuantizedWeight], group_size: int
) -> list[ScalingReport]:
    """Scales the weights of a floating model in place. The function it computes stays the same.

    Args:
        model: float32 or float64, in evaluation mode. Quantize it afterwards, with any method.
        windows: int64 [n, T], calibration text, on the model's device.
        method: the quantizer that decides which alpha is best.
        group_size: weights that share a scale, as for `minigpt.quantization.convert.quantize_model`.

    Raises:
        UserError: the group size does not fit, the model is int4 already, or a layer's inputs or weights are not
            finite; the model may be scaled in part by then, which changes nothing that it computes.
    """
    check_fits(model, group_size)
    positions = torch.arange(windows.shape[1], device=windows.device)  # [T]
    stream = [model.wte(batch) + model.wpe(positions) for batch in windows.split(BATCH)]  # each [B, T, C]
    reports = []
    for index, block in enumerate(tqdm(model.h, desc="activation-aware scaling", unit="block")):
        assert isinstance(block, Block)
        statistics, stream = run_block(block, stream, positions)
        attention, mlp = block.attn, block.mlp
        value_rows = slice(2 * attention.c_proj.in_features, None)  # of c_attn, whose outputs are Q, K and V
        scalable = (
            ("attn.c_attn", attention.c_attn, [block.ln_1.weight, block.ln_1.bias]),
            ("attn.c_proj", attention.c_proj, [attention.c_attn.weight[value_rows], attention.c_attn.bias[value_rows]]),
            ("mlp.c_fc", mlp.c_fc, [block.ln_2.weight, block.ln_2.bias]),
        )
        for kind, layer, sources in scalable:
            name = f"h.{index}.{kind}"
            s, report = search(name, layer, statistics[kind], method, layer_group_size(layer.in_features, group_size))
            layer.weight *= s
            for source in sources:
                source /= s.view(-1, *[1] * (source.ndim - 1))  # a view of the parameter: changes it in place
            reports.append(report)
    return reports


def run_block(block: Block, stream: list[Tensor], positions: Tensor) -> tuple[dict[str, InputStatistics], list[Tensor]]:
    """Sends the residual stream through a block, watching the inputs of its linear layers.

    Args:
        block: of GPT.
        stream: batches, each [B, T, C].
        positions: int64 [T].

    Returns:
        Statistics by the layer's name in the block, and the stream behind the block.
    """
    statistics, hooks = {}, []
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc"):
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        zeros = layer.weight.new_zeros(layer.in_features, dtype=torch.float64)
        watched = statistics[name] = InputStatistics(zeros, torch.diag(zeros))
        hooks.append(layer.register_forward_pre_hook(lambda _, x, watched=watched: watched.add(x[0])))
    try:
        stream = [block(x, 0, positions, None) for x in stream]
    finally:
        for hook in hooks:
            hook.remove()
    return statistics, stream


def search(
    name: str,
    layer: nn.Linear,
    statistics: InputStatistics,
    method: Callable[[Tensor, int], QuantizedWeight],
    group_size: int,
) -> tuple[Tensor, ScalingReport]:
    """The factors s of a layer's columns with the least error of its outputs.

    Args:
        name: for the report and errors.
        layer: its weight is [out_features, in_features].
        statistics: of its inputs.
        method, group_size: how it will be quantized.

    Returns:
        s, [in_features] in the weight's dtype, and the report. Of equally good alphas the smallest.

    Raises:
        UserError: the layer's weights or inputs are not finite.
    """
    weight = layer.weight
    if not torch.isfinite(weight).all() or not torch.isfinite(statistics.gram).all():
        raise UserError(f"layer {name} has weights or inputs that are NaN or infinite; this model cannot be quantized")
    magnitude = statistics.magnitude / statistics.tokens  # [in_features]
    magnitude = magnitude.clamp(
        min=1e-4 * magnitude.max().item() + 1e-30
    )  # an input that is always 0 is no reason to divide by 0

    def error(change: Tensor) -> float:
        return ((change.double() @ statistics.gram) * change).sum().item()

    best, chosen, errors = torch.ones_like(weight[0]), 0.0, []
    for alpha in ALPHAS:
        s = (magnitude**alpha).to(weight.dtype)  # [in_features]
        s /= (s.max() * s.min()).sqrt()  # only ratios matter; these stay near 1
        restored = dequantize(method((weight * s).float(), group_size), torch.float32) / s
        errors.append(error(restored - weight))
        if errors[-1] < min(errors[:-1], default=float("inf")):
            best, chosen = s, alpha
    power = error(weight) or 1.0
    return best, ScalingReport(name, chosen, errors[0] / power, min(errors) / power)
