"""A linear layer whose weight is packed int4."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import kernels
from kernels import PreparedWeight, QuantizedWeight

FILE_BUFFERS = ("qweight", "scales", "qzeros")  # of a QuantizedWeight
PREPARED_BUFFERS = ("codes", "scale_zeros")  # of a PreparedWeight


class Int4Linear(nn.Module):
    """y = x @ w^T + bias, as torch.nn.Linear, with w in int4 (`kernels.k00_reference`).

    On a GPU the weight is held in the layout that the kernels read (`kernels.prepared`), elsewhere in the file's, and
    never in both. `state_dict` is the file's on every device; to load one, have the layer on a CPU.

    Attributes:
        qweight, scales, qzeros: the weight in the file's layout, see `kernels.QuantizedWeight`; None on a GPU.
        codes, scale_zeros: the weight prepared, see `kernels.PreparedWeight`; None elsewhere.
        bias: [out_features].
        in_features, out_features, group_size: of the weight.
        stored_bytes: what the weight takes in a file: codes, scales, zeros, and the group of each input (g_idx).
        activation_bits: 16, or 8 to multiply with inputs rounded to 8 bits, see `kernels.matmul`.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__()
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor
        self.codes: Tensor
        self.scale_zeros: Tensor
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.group_size = weight.group_size
        self.stored_bytes = sum(tensor.nbytes for tensor in weight) + 4 * weight.in_features
        self.activation_bits = 16
        for name in FILE_BUFFERS:
            self.register_buffer(name, None)
        for name in PREPARED_BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self.hold(weight)
        self._suit_device()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def hold(self, weight: QuantizedWeight | PreparedWeight) -> None:
        """Keeps the weight as it is given, in the one layout or the other, and nothing else."""
        for name in (*FILE_BUFFERS, *PREPARED_BUFFERS):
            setattr(self, name, getattr(weight, name, None))

    @property
    def held(self) -> QuantizedWeight | PreparedWeight:
        """The weight as it is held."""
        if self.codes is not None:
            return PreparedWeight(self.codes, self.scale_zeros, self.in_features, self.group_size)
        return QuantizedWeight(self.qweight, self.scales, self.qzeros)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight in the file's layout; on a GPU made anew each time."""
        held = self.held
        return held if isinstance(held, QuantizedWeight) else kernels.restore(held)

    def forward(self, x: Tensor) -> Tensor:
        """x: floating [..., in_features] -> [..., out_features], in x's dtype."""
        return kernels.matmul(x, self.held, self.bias, self.activation_bits)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Linear":
        """Moves between devices, and so between layouts; a cast to another dtype is for the rest of the model only."""
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None:
            self.scales = scales.to(self.qweight.device)  # as they were: fp16
        self._suit_device()
        return self

    def _suit_device(self) -> None:
        """Changes the layout if another is due where the weight is now."""
        held = self.held
        on_gpu = held[0].is_cuda
        if on_gpu and isinstance(held, QuantizedWeight):
            self.hold(kernels.prepare(held))
        elif not on_gpu and isinstance(held, PreparedWeight):
            self.hold(kernels.restore(held))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds what the file holds, whichever layout is held here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.weight._asdict().items()})

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
