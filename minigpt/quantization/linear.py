"""Layers whose weight is packed int4: the weight and its layouts, and the linear layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import kernels
from kernels import CPUWeight, PreparedWeight, QuantizedWeight
from kernels import exact_on_cpu as exact_on_cpu  # for those who measure, and know layers but no kernels

FILE_BUFFERS = ("qweight", "scales", "qzeros")  # of a QuantizedWeight
PREPARED_BUFFERS = ("codes", "scale_zeros", "row_scales")  # of a PreparedWeight
CPU_BUFFERS = ("packed", "scale_shifts")  # of a CPUWeight, which has a QuantizedWeight's as well


class Int4Weight(nn.Module):
    """A weight [out_features, in_features] in int4 (`kernels.k00_reference`), held in the layout that suits the device.

    On a GPU that is the layout that the kernels read (`kernels.prepared`), and no other. On a CPU it is the file's, and
    beside it, where torch has an int4 kernel for this CPU and this weight, the one that this kernel reads
    (`kernels.cpu`). `state_dict` is the file's on every device; to load one, have the module on a CPU.

    Attributes:
        qweight, scales, qzeros: the weight in the file's layout, see `kernels.QuantizedWeight`; None on a GPU.
        codes, scale_zeros, row_scales: the weight prepared, see `kernels.PreparedWeight`; None elsewhere.
        packed, scale_shifts: the weight for torch's CPU kernel, see `kernels.CPUWeight`, or None.
        in_features, out_features, group_size: of the weight.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.qweight: Tensor
        self.scales: Tensor
        self.qzeros: Tensor
        self.codes: Tensor
        self.scale_zeros: Tensor
        self.row_scales: Tensor
        self.packed: Tensor
        self.scale_shifts: Tensor
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.group_size = weight.group_size
        for name in FILE_BUFFERS:
            self.register_buffer(name, None)
        for name in (*PREPARED_BUFFERS, *CPU_BUFFERS):
            self.register_buffer(name, None, persistent=False)
        self.hold(weight)
        self._suit_device()

    def hold(self, weight: QuantizedWeight | PreparedWeight | CPUWeight) -> None:
        """Keeps the weight as it is given, in the one layout or the other, and nothing else."""
        for name in (*FILE_BUFFERS, *PREPARED_BUFFERS, *CPU_BUFFERS):
            setattr(self, name, getattr(weight, name, None))

    @property
    def held(self) -> QuantizedWeight | PreparedWeight | CPUWeight:
        """The weight as it is held."""
        if self.codes is not None:
            return PreparedWeight(self.codes, self.scale_zeros, self.row_scales, self.in_features, self.group_size)
        if self.packed is not None:
            return CPUWeight(self.qweight, self.scales, self.qzeros, self.packed, self.scale_shifts)
        return QuantizedWeight(self.qweight, self.scales, self.qzeros)

    @property
    def idle_bytes(self) -> int:
        """Bytes that no decode step with 16-bit activations reads: row scales; beside a CPU's own layout the file's."""
        held = self.held
        if isinstance(held, PreparedWeight):
            return held.row_scales.nbytes
        return sum(tensor.nbytes for tensor in held.file) if isinstance(held, CPUWeight) else 0

    @property
    def weight(self) -> QuantizedWeight:
        """The weight in the file's layout; on a GPU made anew each time."""
        held = self.held
        if isinstance(held, PreparedWeight):
            return kernels.restore(held)
        return QuantizedWeight(*held[: len(FILE_BUFFERS)])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Weight":
        """Moves between devices, and so between layouts; a cast to another dtype is for the rest of the model only."""
        uncast = {name: getattr(self, name) for name in ("scales", "row_scales", "scale_shifts")}
        super()._apply(fn, recurse)
        for name, tensor in uncast.items():
            if tensor is not None:
                setattr(self, name, tensor.to(self.held[0].device))
        self._suit_device()
        return self

    def _suit_device(self) -> None:
        """Changes the layout if another is due where the weight is now."""
        held = self.held
        device = held[0].device.type
        if device == "cuda" and not isinstance(held, PreparedWeight):
            self.hold(kernels.prepare(self.weight))
        elif device == "cpu" and not isinstance(held, CPUWeight):
            self.hold(kernels.prepare_for_cpu(self.weight))
        elif device not in ("cuda", "cpu") and isinstance(held, PreparedWeight):
            self.hold(kernels.restore(held))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds what the file holds, whichever layout is held here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.weight._asdict().items()})

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 (torch's own, handed on)
        """Takes what the file holds; what was made from an earlier weight is made anew."""
        super()._load_from_state_dict(*args)
        if isinstance(self.held, CPUWeight):
            self.hold(self.weight)
            self._suit_device()

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


def prepared(layer: Int4Weight) -> PreparedWeight:
    """A layer's weight in the layout of the GPU's kernels: as it is held on a GPU, elsewhere made anew each time."""
    held = layer.held
    return held if isinstance(held, PreparedWeight) else kernels.prepare(layer.weight)


class Int4Linear(Int4Weight):
    """y = x @ w^T + bias, as torch.nn.Linear, with w in int4.

    Attributes (beside the weight's, see `Int4Weight`):
        bias: [out_features].
        stored_bytes: what the weight takes in a file: codes, scales, zeros, and the group of each input (g_idx).
        activation_bits: 16, or 8 to allow inputs to be rounded to 8 bits, see `kernels.matmul`.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__(weight)
        self.stored_bytes = sum(tensor.nbytes for tensor in weight) + 4 * weight.in_features
        self.activation_bits = 16
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: floating [..., in_features] -> [..., out_features], in x's dtype."""
        return kernels.matmul(x, self.held, self.bias, self.activation_bits)


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Has all int4 linear layers of a model take inputs as they are, 16, or allows them to round inputs to 8 bits."""
    for layer in model.modules():
        if isinstance(layer, Int4Linear):
            layer.activation_bits = bits


def describe_path(model: nn.Module) -> str:
    """What multiplies a model's int4 weights: its own kernels, torch's, or the reference. Empty if it has none."""
    paths = {
        PreparedWeight: "Triton kernels",
        CPUWeight: "torch's CPU kernel, in bfloat16",
        QuantizedWeight: "plain torch",
    }
    taken = {paths[type(module.held)] for module in model.modules() if isinstance(module, Int4Linear)}
    return " and ".join(sorted(taken))
