"""Walks a GPT and replaces the linear layers of its blocks by packed int4 ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import QuantizedWeight, dequantize, group_sizes
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.calibration import LayerInputs, ResidualStream, watch
from minigpt.quantization.linear import Int4Linear

WHOLE_ROW = -1  # a group size, as GPTQ's files write it: one scale a row, however long the row is


@dataclass(frozen=True)
class LayerReport:
    """What quantizing did to one layer.

    Attributes:
        name: as in the model, e.g. h.0.attn.c_attn.
        weights: how many weights it has.
        stored_bytes: what they take in a file.
        relative_error: |w - w'| / |w| (Frobenius norms), w' being the dequantized weight.
        mean_absolute_error: of its weights.
        notes: what was out of the ordinary, and what was done about it.
    """

    name: str
    weights: int
    stored_bytes: int
    relative_error: float
    mean_absolute_error: float
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The layer's name without its block's number: attn.c_attn, attn.c_proj, mlp.c_fc or mlp.c_proj."""
        return self.name.split(".", 2)[2]


def block_linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, with their names, in the order in which tokens pass through them."""
    for name, module in model.h.named_modules(prefix="h"):
        if isinstance(module, nn.Linear):
            yield name, module


def bits_per_weight(model: GPT) -> float:
    """Bits stored for a weight of the blocks' linear layers: codes, scales and zeros of int4 ones, 16 for others."""
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    fp16_weights = sum(layer.weight.numel() for _, layer in block_linears(model))
    weights = fp16_weights + sum(layer.in_features * layer.out_features for layer in layers)
    return (16 * fp16_weights + 8 * sum(layer.stored_bytes for layer in layers)) / weights


def read_group_size(text: str) -> int:
    """A group size as users give it: a number, or 'row'."""
    return WHOLE_ROW if text == "row" else int(text)


def layer_group_size(in_features: int, group_size: int) -> int:
    """The group size that a layer gets: `group_size`, or in_features where WHOLE_ROW is asked for."""
    return in_features if group_size == WHOLE_ROW else group_size


def check_fits(model: GPT, group_size: int) -> None:
    """Raises UserError if groups of `group_size` do not fit every linear layer, listing the sizes that do."""
    widths = {layer.in_features for _, layer in block_linears(model)}
    if not widths:
        raise UserError("this model is int4 already; quantize the fp checkpoint it was made from")
    allowed = sorted(set.intersection(*(set(group_sizes(width)) for width in widths)))
    if group_size not in (*allowed, WHOLE_ROW):
        raise UserError(
            f"--group-size {group_size} does not fit this model, whose layers have in_features "
            f"{' and '.join(map(str, sorted(widths)))}; possible: {', '.join(map(str, allowed))}, row"
        )


def quantize_model(
    model: GPT, method: Callable[..., QuantizedWeight], group_size: int, calibration: Tensor | None = None
) -> Iterator[LayerReport]:
    """Replaces the linear layers of the blocks one by one, in place; yields a report after each.

    Args:
        model: in evaluation mode. Its weights are read on the device they are on; biases become fp16.
        method: one of `minigpt.quantization.methods`: called with a weight and a group size, and, if there is
            calibration text, with the Hessian of the layer's inputs.
        group_size: weights that share a scale; WHOLE_ROW for one scale a row.
        calibration: int64 [n, T], for a calibrated method: windows of text to watch the layers on.

    Raises:
        UserError: at once and before any change: a layer's weights are not finite, or the group size does not fit.
            On the way, with calibration: a layer's inputs are not finite, or its Hessian is beyond repair.
    """
    check_fits(model, group_size)
    for name, layer in block_linears(model):
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"layer {name} has weights that are NaN or infinite; this model cannot be quantized")
    if calibration is not None:
        return _walk(model, method, group_size, calibration)
    return (_convert(model, name, method, group_size) for name, _ in list(block_linears(model)))


def _walk(
    model: GPT, method: Callable[..., QuantizedWeight], group_size: int, windows: Tensor
) -> Iterator[LayerReport]:
    """`quantize_model` with calibration: each layer is watched with all the layers before it quantized already.

    The residual stream before a block is kept for all windows, in float32 on the CPU; a chunk of it at a time goes to
    the model's device. (The one that GPTQ's authors call `inps`.)
    """
    stream = ResidualStream(model, windows)
    names = [name for name, _ in block_linears(model)]
    for i, block in enumerate(model.h):
        for name in names:
            if name.startswith(f"h.{i}."):
                layer = model.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                yield _convert(model, name, method, group_size, watch(name, layer, block, stream))
        stream.advance(block)


def _convert(
    model: GPT,
    name: str,
    method: Callable[..., QuantizedWeight],
    group_size: int,
    inputs: LayerInputs | None = None,
) -> LayerReport:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    size = layer_group_size(layer.in_features, group_size)
    packed = method(weight, size) if inputs is None else method(weight, size, inputs.hessian)
    error = dequantize(packed, torch.float32) - weight.float()  # [N, K]
    if inputs is not None:
        bias = bias - error @ inputs.mean.float()  # so that the mean of the outputs stays as it was
    int4 = Int4Linear(packed, bias.to(torch.float16))
    model.set_submodule(name, int4)
    return LayerReport(
        name=name,
        weights=weight.numel(),
        stored_bytes=int4.stored_bytes,
        relative_error=(error.norm() / weight.float().norm().clamp(min=1e-30)).item(),
        mean_absolute_error=error.abs().mean().item(),
        notes=inputs.notes if inputs is not None else (),
    )
