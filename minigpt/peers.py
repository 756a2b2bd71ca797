"""Other people's quantizers on the same weights: their int4 put into our model, so that the same code scores them.

None is needed for anything else here, so none is installed with the project: pip install hqq, optimum-quanto or
gptqmodel. Each is used as its own documentation does, with its default settings, at 4 bits:

- `hqq`: half-quadratic quantization (Badri & Shaji 2023); no text; scales and zeros are real numbers of 16 bits.
- `quanto`: optimum-quanto's qint4, the range from the least to the greatest weight; no text; scales and zeros as above.
- `gptqmodel`: GPTQModel's GPTQ (Frantar et al. 2022), symmetric; sees calibration text.
"""

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt import checkpoint
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.convert import WHOLE_ROW, bits_per_weight, block_linears

# Quantizes a model, given calibration windows, int64 [n, T], if it looks at text; returns the model that came out and
# its bits a weight.
Quantizer = Callable[[GPT, int, Tensor | None], tuple[GPT, float]]


@dataclass(frozen=True)
class Peer:
    """A quantizer from elsewhere.

    Attributes:
        package: as pip knows it.
        module: as Python imports it.
        calibrated: whether it looks at text.
        quantize: called with an FP model in float32, which it may change, a group size (WHOLE_ROW for one scale a row)
            and calibration windows.
    """

    package: str
    module: str
    calibrated: bool
    quantize: Quantizer

    @property
    def version(self) -> str:
        """The version that is installed."""
        return importlib.metadata.version(self.package)


def check_installed(name: str) -> None:
    """Raises UserError if a peer cannot be imported here."""
    peer = PEERS[name]
    try:
        found = importlib.util.find_spec(peer.module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        raise UserError(f"--peer {name} is not installed here; pip install {peer.package}")


def hqq(model: GPT, group_size: int, windows: Tensor | None) -> tuple[GPT, float]:
    """hqq, layer by layer."""
    from hqq.core.quantize import Quantizer as HQQ

    def dequantized(weight: Tensor) -> Tensor:
        """A weight as it comes back: floating [N, K] -> [N, K]."""
        size = None if group_size == WHOLE_ROW else group_size
        codes, meta = HQQ.quantize(
            weight, nbits=4, group_size=size, axis=1, device=str(weight.device), compute_dtype=torch.float16
        )
        # What it computes in is for speed; what it stores is these, in 16 bits.
        meta = meta | {name: meta[name].to(torch.float16).float() for name in ("scale", "zero")}
        return HQQ.dequantize(codes, meta | {"compute_dtype": torch.float32})

    return _replace_weights(model, group_size, dequantized)


def quanto(model: GPT, group_size: int, windows: Tensor | None) -> tuple[GPT, float]:
    """optimum-quanto, layer by layer."""
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    def dequantized(weight: Tensor) -> Tensor:
        """A weight as it comes back: floating [N, K] -> [N, K]."""
        size = None if group_size == WHOLE_ROW else group_size
        scale, shift = (x.to(torch.float16).float() for x in MaxOptimizer()(weight, qint4, axis=0, group_size=size))
        return quantize_weight(weight, qint4, 0, scale, shift, size, optimized=False).dequantize()

    return _replace_weights(model, group_size, dequantized)


def _replace_weights(model: GPT, group_size: int, dequantized: Callable[[Tensor], Tensor]) -> tuple[GPT, float]:
    """Puts a data-free peer's weights into the model; bits: 4, and a scale and a zero of 16 each for every group."""
    bits = weights = 0
    for _, layer in block_linears(model):
        layer.weight.data = dequantized(layer.weight.data).to(layer.weight.dtype)
        size = layer.in_features if group_size == WHOLE_ROW else group_size
        bits += layer.weight.numel() * 4 + layer.weight.numel() // size * 32
        weights += layer.weight.numel()
    return model, bits / weights


def gptqmodel(model: GPT, group_size: int, windows: Tensor | None) -> tuple[GPT, float]:
    """GPTQModel: reads a checkpoint in Hugging Face's layout and writes GPTQ's, which `checkpoint.load` reads."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on a machine of two cores it would start one and want two
    from gptqmodel import GPTQModel, QuantizeConfig

    device = model.wte.weight.device
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "fp16", Path(folder) / "int4"
        assert windows is not None
        checkpoint.save(model, before)
        texts = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
        config = QuantizeConfig(bits=4, group_size=group_size)
        theirs = GPTQModel.load(str(before), config, device=str(device), dtype=torch.float32)
        theirs.quantize(texts, batch_size=8)
        theirs.save(str(after))
        quantized = checkpoint.load(after, torch.float32, device)
    return quantized, bits_per_weight(quantized)


PEERS = {
    "hqq": Peer("hqq", "hqq", calibrated=False, quantize=hqq),
    "quanto": Peer("optimum-quanto", "optimum.quanto", calibrated=False, quantize=quanto),
    "gptqmodel": Peer("gptqmodel", "gptqmodel", calibrated=True, quantize=gptqmodel),
}
