"""Rows of a packed weight, dequantized: what an embedding does. Only the rows asked for are touched.

Plain torch, on any device: a row is a few hundred bytes, and there are as many as tokens.
"""

import torch
from torch import Tensor

from kernels.cpu import CPUWeight
from kernels.int8 import Int8Weight
from kernels.k00_reference import QuantizedWeight
from kernels.prepared import ONE_KILO, TILE_ROWS, PreparedWeight


def lookup(
    weight: QuantizedWeight | PreparedWeight | CPUWeight | Int8Weight, rows: Tensor, dtype: torch.dtype = torch.float16
) -> Tensor:
    """The rows of a weight [N, K] that `rows` names, as `kernels.dequantize` would give them.

    Args:
        weight: in any layout.
        rows: int64 [...], 0..N-1, on the weight's device.
        dtype: of the result.

    Returns:
        `dtype` [..., K].
    """
    if isinstance(weight, Int8Weight):
        return (weight.codes[rows].float() * weight.scales[rows, None].float()).to(dtype)
    flat = rows.flatten()  # [T]
    if isinstance(weight, PreparedWeight):
        half_words = weight.codes[flat // TILE_ROWS, :, flat % TILE_ROWS].int()  # [T, blocks, 16]
        nibbles = 4 * torch.arange(4, dtype=torch.int32, device=flat.device)[:, None]  # [4, 1]
        codes = (half_words[:, :, None] >> nibbles) & 0xF  # [T, blocks, 4, 16]
        words = weight.scale_zeros[: weight.in_features // weight.group_size, flat].t()  # [T, groups]
        scales = (words & 0xFFFF).to(torch.int16).view(torch.float16)
        zeros = (words >> 16).to(torch.int16).view(torch.float16).int() - ONE_KILO
    else:
        shifts = 4 * torch.arange(8, dtype=torch.int32, device=flat.device)  # [8]
        codes = (weight.qweight[:, flat].t()[..., None] >> shifts) & 0xF  # [T, K/8, 8]
        scales = weight.scales[:, flat].t()  # [T, groups]
        zeros = (weight.qzeros[:, flat // 8] >> (4 * (flat % 8)).int()).t() & 0xF  # [T, groups]
    groups = codes.flatten(1)[:, : weight.in_features].unflatten(1, (-1, weight.group_size))
    levels = (groups - zeros[..., None]).float()  # [T, groups, group_size]
    return (levels * scales[..., None].float()).to(dtype).view(*rows.shape, weight.in_features)
