"""The methods by the names that `quantize.py --method` knows. A method chooses the codes of one layer's weight.

Data-free methods are functions of a weight and a group size; calibrated ones get the Hessian of the layer's inputs as
well (`minigpt.quantization.gptq`), gathered from text by the walk in `minigpt.quantization.convert`.
"""

from collections.abc import Callable

from kernels import QuantizedWeight
from minigpt.quantization import rtn
from minigpt.quantization.gptq import gptq
from minigpt.quantization.hqq import hqq

Method = Callable[..., QuantizedWeight]

DATA_FREE: dict[str, Method] = {**rtn.METHODS, "hqq": hqq}
CALIBRATED: dict[str, Method] = {"gptq": gptq}
METHODS = DATA_FREE | CALIBRATED
SYMMETRIC = rtn.SYMMETRIC
