"""GPTQ's way of writing int4 layers to a file, so that other tools read ours and we read theirs.

A layer NAME is stored as NAME.qweight, NAME.scales and NAME.qzeros, which are our format as it is
(`kernels.k00_reference`), NAME.g_idx, int32 [in_features], the group that each input belongs to, and NAME.bias.
`config.json` says so in `quantization_config`. The first version of the format ("gptq") stores each zero less one,
in four bits; the second ("gptq_v2"), which we write, stores it as it is.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import QuantizedWeight, group_sizes, pack, unpack
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.convert import WHOLE_ROW, block_linears, layer_group_size
from minigpt.quantization.linear import Int4Linear


def describe(
    method: str,
    group_size: int,
    symmetric: bool,
    embedding: str = "fp16",
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a model: what all its blocks' linear layers share, and what the embedding is.

    `calibration` says what text a calibrated method was shown (`minigpt.quantization.calibration`).
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["minigpt-int4"], "method": method, "embedding": embedding}
        | ({"calibration": calibration} if calibration else {}),
    }


def made_how(settings: dict[str, Any]) -> str:
    """What a `quantization_config` says of how its model was made, in a few words; other tools' say less than ours."""
    meta = settings.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    size = settings.get("group_size", WHOLE_ROW)
    groups = "a group a row" if size == WHOLE_ROW else f"groups of {size}"
    return f"{meta.get('method', 'method unknown')}, {groups}, embedding {meta.get('embedding', 'fp16')}"


def group_index(layer: Int4Linear) -> Tensor:
    """g_idx, the group of each input: int32 [in_features]. Ours are in order; GPTQ's act-order may shuffle them."""
    return torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size


def install_empty_layers(model: GPT, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Makes `model` ready for a file's int4 layers: empty Int4Linears where the file has packed weights.

    Args:
        model: on the meta device; changed in place.
        tensors: the file's, by our names. Their g_idx are checked and taken out; old-style zeros are brought to ours.
        settings: the file's `quantization_config`.

    Raises:
        UserError: the settings or a tensor are of a kind that cannot be loaded.
    """
    if not isinstance(settings, dict) or settings.get("quant_method") != "gptq" or settings.get("bits") != 4:
        raise UserError(f"quantization_config is {settings}; only 4-bit gptq can be loaded")
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UserError(f"checkpoint_format is {version!r}; only 'gptq' and 'gptq_v2' can be loaded")
    if not any(f"{name}.qweight" in tensors for name, _ in block_linears(model)):
        raise UserError("config.json has a quantization_config, but no layer has a .qweight tensor")
    for name, layer in list(block_linears(model)):
        if f"{name}.qweight" not in tensors:
            continue
        group_size = settings.get("group_size", WHOLE_ROW)
        if type(group_size) is not int or group_size not in (*group_sizes(layer.in_features), WHOLE_ROW):
            raise UserError(f"group_size {group_size!r} does not fit {name}, whose in_features is {layer.in_features}")
        with torch.device("meta"):
            weight = empty_weight(layer.out_features, layer.in_features, group_size)
            empty = Int4Linear(weight, torch.empty(layer.out_features, dtype=torch.float16))
        g_idx = tensors.pop(f"{name}.g_idx", None)
        if g_idx is not None and not torch.equal(g_idx, group_index(empty)):
            raise UserError(
                f"{name}.g_idx does not count up in groups of {empty.group_size}; desc_act is not supported"
            )
        qzeros = tensors.get(f"{name}.qzeros")
        if qzeros is not None and version == "gptq":
            tensors[f"{name}.qzeros"] = _add_one(qzeros)
        model.set_submodule(name, empty)


def empty_weight(out_features: int, in_features: int, group_size: int) -> QuantizedWeight:
    """A weight of these sizes, its numbers not set; a group size of WHOLE_ROW is one scale a row."""
    groups = in_features // layer_group_size(in_features, group_size)
    return QuantizedWeight(
        qweight=torch.empty((in_features // 8, out_features), dtype=torch.int32),
        scales=torch.empty((groups, out_features), dtype=torch.float16),
        qzeros=torch.empty((groups, -(-out_features // 8)), dtype=torch.int32),
    )


def _add_one(qzeros: Tensor) -> Tensor:
    """Adds 1 to each of the packed zeros, modulo 16: int32 [R, C] -> int32 [R, C]."""
    if qzeros.dtype != torch.int32 or qzeros.ndim != 2:
        return qzeros  # not what it should be: the loader says so
    return pack((unpack(qzeros.t(), 8 * qzeros.shape[1]) + 1) & 0xF).t().contiguous()
