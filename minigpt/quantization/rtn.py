"""Round to nearest: each weight takes the nearest code, and only the scales are chosen. The data-free methods.

- `absmax`: symmetric; the scale is the finest that puts no weight more than half a step outside the range.
- `minmax`: asymmetric; the sixteen levels span the group's own range.
- `mse`: asymmetric; of 32 narrower and narrower ranges the one with the least squared error. A few clipped outliers
  are a small price for finer steps everywhere else.

The arithmetic is `kernels.k00_reference`'s: lesson 1's kernel on a GPU, plain torch elsewhere, the same codes.
"""

from collections.abc import Callable

from torch import Tensor

from kernels import QuantizedWeight, quantize


def absmax(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Symmetric, the whole range: floating [out_features, in_features] -> int4. Errors: see `kernels.quantize`."""
    return quantize(weight, group_size, symmetric=True)


def minmax(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Asymmetric, the whole range: floating [out_features, in_features] -> int4. Errors: see `kernels.quantize`."""
    return quantize(weight, group_size, symmetric=False)


def mse(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Asymmetric, least squared error: floating [out_features, in_features] -> int4. Errors: see `kernels.quantize`."""
    return quantize(weight, group_size, symmetric=False, search=True)


METHODS: dict[str, Callable[[Tensor, int], QuantizedWeight]] = {"absmax": absmax, "minmax": minmax, "mse": mse}
SYMMETRIC = frozenset({"absmax"})
