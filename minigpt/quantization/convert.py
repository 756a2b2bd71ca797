"""Walks a GPT and replaces the linear layers of its blocks by packed int4 ones."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import QuantizedWeight, dequantize, group_sizes
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.calibration import ResidualStream, watch
from minigpt.quantization.fisher import fisher
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.methods import Calibrated, DataFree, Method

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

    @classmethod
    def of(
        cls, name: str, before: Tensor, after: Tensor, stored_bytes: int, notes: tuple[str, ...] = ()
    ) -> "LayerReport":
        """Compares a weight with what it has become: floating [N, K], float32 [N, K]."""
        error = after - before.float()
        return cls(
            name=name,
            weights=before.numel(),
            stored_bytes=stored_bytes,
            relative_error=(error.norm() / before.float().norm().clamp(min=1e-30)).item(),
            mean_absolute_error=error.abs().mean().item(),
            notes=notes,
        )

    @property
    def kind(self) -> str:
        """The name without its block's number: attn.c_attn, attn.c_proj, mlp.c_fc or mlp.c_proj; wte."""
        return self.name.split(".", 2)[-1]


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
    if text != "row" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of weights nor 'row'")
    return WHOLE_ROW if text == "row" else int(text)


def layer_group_size(in_features: int, group_size: int) -> int:
    """The group size that a layer gets: `group_size`, or in_features where WHOLE_ROW is asked for."""
    return in_features if group_size == WHOLE_ROW else group_size


def fitting_group_sizes(model: GPT) -> list[int]:
    """The group sizes that fit every linear layer of the blocks, beside whole rows: ascending, at least one.

    Raises:
        UserError: there is none, or the model is int4 already.
    """
    widths = _widths(model)
    if not widths:
        raise UserError("this model is int4 already; quantize the fp checkpoint it was made from")
    fitting = set.intersection(*(set(group_sizes(width)) for width in widths))
    if not fitting:
        raise UserError(
            f"this model cannot be int4: its layers' in_features, {_listed(widths)}, are no multiples of 16"
        )
    return sorted(fitting)


def check_fits(model: GPT, group_size: int) -> None:
    """Raises UserError if groups of `group_size` do not fit every linear layer, listing the sizes that do."""
    fitting = fitting_group_sizes(model)
    if group_size not in (*fitting, WHOLE_ROW):
        raise UserError(
            f"--group-size {group_size} does not fit this model, whose layers have in_features "
            f"{_listed(_widths(model))}; possible: {', '.join(map(str, fitting))}, row"
        )


def _widths(model: GPT) -> list[int]:
    return sorted({layer.in_features for _, layer in block_linears(model)})


def _listed(widths: list[int]) -> str:
    return " and ".join(map(str, widths))


def quantize_model(
    model: GPT, method: Method, group_size: int, calibration: Tensor | None = None
) -> Iterator[LayerReport]:
    """Replaces the linear layers of the blocks one by one, in place; yields a report after each.

    Args:
        model: in evaluation mode. Its weights are read on the device they are on; biases become fp16.
        method: `minigpt.quantization.methods.METHODS` has them by name.
        group_size: weights that share a scale; WHOLE_ROW for one scale a row.
        calibration: int64 [n, T], windows of text to watch the layers on: for a Calibrated method, and for no other.

    Raises:
        UserError: at once and before any change: a layer's weights are not finite, or the group size does not fit.
            On the way, with calibration: a layer's inputs or outputs, the predictions or their derivatives are not
            finite, or a Hessian is beyond repair.
    """
    check_fits(model, group_size)
    for name, layer in block_linears(model):
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"layer {name} has weights that are NaN or infinite; this model cannot be quantized")
    if isinstance(method, Calibrated):
        if calibration is None:
            raise ValueError("a calibrated method needs calibration text")
        return _calibrated(model, method, group_size, calibration)
    return _data_free(model, method, group_size)


def _data_free(model: GPT, method: DataFree, group_size: int) -> Iterator[LayerReport]:
    for name, layer in list(block_linears(model)):
        packed = method(layer.weight.detach(), layer_group_size(layer.in_features, group_size))
        yield _replace(model, name, layer, packed, layer.bias)


def _calibrated(model: GPT, method: Calibrated, group_size: int, windows: Tensor) -> Iterator[LayerReport]:
    """Each layer is watched with all the layers before it quantized already.

    The text flows through the model block by block, and, if the method aims at the original model's outputs, through
    the blocks as they were, too. Before that, if the method asks for it, all of the text goes through the whole model
    and back.
    """
    fishers = fisher(model, dict(block_linears(model)), windows) if method.fisher else None
    stream, original_stream = ResidualStream(model, windows), ResidualStream(model, windows) if method.aim else None
    for i, block in enumerate(model.h):
        original = copy.deepcopy(block) if method.aim else block
        for name, layer in [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
            original_inputs = (
                original_stream.inputs_of(original.get_submodule(name), original) if original_stream else None
            )
            inputs = watch(f"h.{i}.{name}", stream.inputs_of(layer, block), original_inputs)
            weight = layer.weight.detach()
            size = layer_group_size(layer.in_features, group_size)
            more = () if fishers is None else (fishers.pop(f"h.{i}.{name}"),)
            packed = method.choose(inputs.goal(weight, method.aim), size, inputs.hessian, *more)
            bias = inputs.bias(layer.bias.detach(), weight, dequantize(packed, torch.float32))
            yield _replace(model, f"h.{i}.{name}", layer, packed, bias, inputs.notes)
        stream.advance(block)
        if original_stream:
            original_stream.advance(original)


def _replace(
    model: GPT, name: str, layer: nn.Linear, packed: QuantizedWeight, bias: Tensor, notes: tuple[str, ...] = ()
) -> LayerReport:
    """Puts an int4 layer in the place of `layer`, and says how far its weight is from the original one."""
    int4 = Int4Linear(packed, bias.detach().to(torch.float16))
    model.set_submodule(name, int4)
    weight = layer.weight.detach()
    return LayerReport.of(name, weight, dequantize(packed, torch.float32), int4.stored_bytes, notes)
