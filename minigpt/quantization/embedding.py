"""The token embedding and the output layer, which share one weight [vocab_size, n_embd], in 8 or 4 bits.

They are 31% of GPT-2 124M. `int8`, one scale a row (`kernels.int8`), loses next to nothing; `int4`, in the format of
the linear layers and with `mse` scales, is half as large and loses about as much as those do. The weight is stored
once: `wte` looks up rows of it, and `lm_head` multiplies by it.

In a file: `wte.codes8` int8 [vocab_size, n_embd] and `wte.scales` fp16 [vocab_size]; or `wte.qweight`, `wte.scales` and
`wte.qzeros` as GPTQ's names would be. `meta.embedding` in config.json's `quantization_config` says which. GPTQ's tools
know no packed embedding: they would leave `wte` random and go on with a warning. So that they fail instead, there is
a `wte.weight` as well, without any rows: its shape is wrong for everybody else. For other tools: `--embedding fp16`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels import Int8Weight, PreparedWeight, QuantizedWeight
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.convert import WHOLE_ROW, LayerReport, layer_group_size
from minigpt.quantization.gptq_format import empty_weight
from minigpt.quantization.linear import Int4Weight, prepared
from minigpt.quantization.rtn import mse

CHOICES = ("int8", "int4", "fp16")
STOP_SIGN = "wte.weight"  # in a file whose embedding is packed: without rows, so that nobody takes it for one


class Int8Embedding(nn.Module):
    """An embedding in int8: as nn.Embedding, and `logits`, the product with the same weight.

    Attributes:
        codes8, scales: the weight, see `kernels.Int8Weight`.
        dtype: of the rows that it gives; follows the model's casts, as a parameter's would.
    """

    def __init__(self, weight: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes8: Tensor
        self.scales: Tensor
        self.dtype = dtype
        self.register_buffer("codes8", weight.codes)
        self.register_buffer("scales", weight.scales)

    @property
    def weight(self) -> Int8Weight:
        """The weight [vocab_size, n_embd]."""
        return Int8Weight(self.codes8, self.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of the weight: int64 [...] -> `dtype` [..., n_embd]."""
        return kernels.lookup(self.weight, tokens, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x @ w^T: floating [..., n_embd] -> [..., vocab_size], in x's dtype."""
        return kernels.matmul_int8(x, self.weight)

    def written_out(self) -> Tensor:
        """The weight in floating point: `dtype` [vocab_size, n_embd]."""
        return kernels.dequantize(self.weight, self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int8Embedding":
        """Moves; a cast changes what comes out, not what is stored."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.codes8.device)
        self.dtype = _dtype_after(fn, self.dtype)
        return self


class Int4Embedding(Int4Weight):
    """The same in int4.

    Attributes (beside the weight's, see `Int4Weight`):
        dtype: of the rows that it gives; follows the model's casts, as a parameter's would.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of the weight: int64 [...] -> `dtype` [..., n_embd]."""
        return kernels.lookup(self.held, tokens, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x @ w^T: floating [..., n_embd] -> [..., vocab_size], in x's dtype."""
        return kernels.matmul(x, self.held)

    def written_out(self) -> Tensor:
        """The weight in floating point: `dtype` [vocab_size, n_embd]."""
        return kernels.dequantize(self.held, self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Embedding":
        super()._apply(fn, recurse)
        self.dtype = _dtype_after(fn, self.dtype)
        return self


class TiedOutput(nn.Module):
    """The output layer over an embedding's weight. It owns nothing: the weight is saved as the embedding's."""

    def __init__(self, embedding: Int8Embedding | Int4Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, where torch does not count it as a part of this module

    def forward(self, x: Tensor) -> Tensor:
        """floating [..., n_embd] -> logits [..., vocab_size], in x's dtype."""
        return self._embedding[0].logits(x)

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, [vocab_size, n_embd], made anew each time."""
        return self._embedding[0].written_out()


def _dtype_after(fn: Callable[..., Any], dtype: torch.dtype) -> torch.dtype:
    """What a cast or move of a module's tensors makes of those of `dtype`."""
    return fn(torch.empty(0, dtype=dtype)).dtype


def install(model: GPT, embedding: Int8Embedding | Int4Embedding) -> None:
    """Puts a packed embedding in the place of the model's embedding and output layer."""
    model.set_submodule("wte", embedding)
    model.set_submodule("lm_head", TiedOutput(embedding))


def quantize_embedding(model: GPT, choice: str, group_size: int) -> LayerReport | None:
    """Packs the embedding and output layer, in place.

    Args:
        model: with a floating embedding, which is read on the device it is on.
        choice: one of CHOICES; fp16 leaves the model as it is.
        group_size: int4's; WHOLE_ROW for one scale a row. It fits wherever it fits the blocks' linear layers.

    Returns:
        What that did to the weight; None for fp16.

    Raises:
        UserError: before any change: the weight is not finite.
    """
    if choice == "fp16":
        return None
    weight = model.wte.weight.detach()
    if not torch.isfinite(weight).all():
        raise UserError("the embedding wte has weights that are NaN or infinite; this model cannot be quantized")
    if choice == "int8":
        int8 = kernels.quantize_int8(weight)
        install(model, Int8Embedding(int8, weight.dtype))
        return LayerReport.of("wte", weight, kernels.dequantize(int8, torch.float32), _bytes(int8))
    int4 = mse(weight, layer_group_size(weight.shape[1], group_size))
    install(model, Int4Embedding(int4, weight.dtype))
    return LayerReport.of("wte", weight, kernels.dequantize(int4, torch.float32), _bytes(int4))


def _bytes(weight: Int8Weight | QuantizedWeight) -> int:
    return sum(tensor.nbytes for tensor in weight)


def install_empty_embedding(model: GPT, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Makes `model` ready for a file's packed embedding, if it has one.

    Args:
        model: on the meta device; changed in place.
        tensors: the file's, by our names. The stop sign is taken out.
        settings: the file's `quantization_config`, found good.

    Raises:
        UserError: the embedding is of a kind that cannot be loaded.
    """
    meta = settings.get("meta")
    choice = meta.get("embedding", "fp16") if isinstance(meta, dict) else "fp16"
    if choice not in CHOICES:
        raise UserError(f"quantization_config: meta.embedding is {choice!r}; only {', '.join(CHOICES)} can be loaded")
    if choice == "fp16":
        return
    tensors.pop(STOP_SIGN, None)
    rows, columns = model.wte.weight.shape
    dtype = model.wte.weight.dtype
    with torch.device("meta"):
        if choice == "int8":
            codes, scales = torch.empty((rows, columns), dtype=torch.int8), torch.empty(rows, dtype=torch.float16)
            install(model, Int8Embedding(Int8Weight(codes, scales), dtype))
        else:
            weight = empty_weight(rows, columns, settings.get("group_size", WHOLE_ROW))
            install(model, Int4Embedding(weight, dtype))


def embedding_weight(model: GPT) -> Tensor | Int8Weight | PreparedWeight:
    """The token embedding [vocab_size, n_embd], as it is stored, int4 prepared for the kernels."""
    wte: nn.Module = model.wte
    if isinstance(wte, Int4Embedding):
        return prepared(wte)
    return wte.weight if isinstance(wte, Int8Embedding) else model.wte.weight
