"""A linear layer whose weight is packed int4."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import kernels
from kernels import QuantizedWeight


class Int4Linear(nn.Module):
    """y = x @ w^T + bias, as torch.nn.Linear, with w in the int4 format of `kernels.k00_reference`.

    Attributes:
        qweight, scales, qzeros: the weight; buffers, see `kernels.QuantizedWeight`.
        bias: [out_features].
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__()
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor
        for name, tensor in weight._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> QuantizedWeight:
        """The packed weight."""
        return QuantizedWeight(self.qweight, self.scales, self.qzeros)

    @property
    def stored_bytes(self) -> int:
        """What the weight takes in a file: codes, scales, zeros, and the group of each input, 4 bytes (g_idx)."""
        return sum(tensor.nbytes for tensor in self.weight) + 4 * self.weight.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: floating [..., in_features] -> [..., out_features], in x's dtype."""
        return kernels.matmul(x, self.weight) + self.bias

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Linear":
        """Moves between devices, but keeps the scales fp16 when the rest of the model is cast to another dtype."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.qweight.device)
        return self

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        w = self.weight
        return f"in_features={w.in_features}, out_features={w.out_features}, group_size={w.group_size}"
