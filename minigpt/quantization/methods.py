"""The methods by the names that `quantize.py --method` knows. A method chooses the codes of one layer's weight."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import QuantizedWeight
from minigpt.quantization import rtn
from minigpt.quantization.gptq import gptq
from minigpt.quantization.hqq import hqq
from minigpt.quantization.quantease import quantease
from minigpt.quantization.yaqa import yaqa

DataFree = Callable[[Tensor, int], QuantizedWeight]  # of a weight [out_features, in_features] and a group size


@dataclass(frozen=True)
class Calibrated:
    """A method that looks at what the layer is fed, on some text (`minigpt.quantization.calibration`).

    Attributes:
        choose: of a weight, a group size, and the Hessian of the layer's inputs, float64 [in_features, in_features].
            And then, where `fisher` is set, of the Fisher information of its outputs, float32 [out_features,
            out_features].
        aim: how far a layer goes to make up for the layers before it, from 0 to 1 (`LayerInputs.goal`). At 0 the
            original model need not be run beside the one that is being quantized, which halves the time.
        fisher: whether it looks at what the layer's outputs do to predictions (`minigpt.quantization.fisher`).
    """

    choose: Callable[..., QuantizedWeight]
    aim: float = 0.0
    fisher: bool = False


Method = DataFree | Calibrated

CALIBRATED = {
    "gptq": Calibrated(gptq),
    "quantease": Calibrated(quantease),
    "gptaq": Calibrated(quantease, aim=0.25),
    "yaqa": Calibrated(yaqa, aim=0.5, fisher=True),
}
DATA_FREE: dict[str, DataFree] = {**rtn.METHODS, "hqq": hqq}
METHODS: dict[str, Method] = {**DATA_FREE, **CALIBRATED}
SYMMETRIC = rtn.SYMMETRIC
