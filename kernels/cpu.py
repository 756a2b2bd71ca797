"""torch's own kernels for CPUs, which multiply packed weights without unpacking them first.

Two of them, where torch has them for this CPU; elsewhere the references serve.

**int4**: `_weight_int4pack_mm_for_cpu` reads codes in an order of its own, made once by
`_convert_weight_to_int4pack_for_cpu`. It takes groups of 32, 64, 128 or 256, rows in sixteens, and adds up in float32;
but x, scales and result are bfloat16, so the result is off by some 0.3%, as a bfloat16 model's is: good enough to write
with, and not to measure with (`exact_on_cpu`). (It takes float32 and float16, too: fifty times slower.) It unpacks a
weight for every few tokens. For many, a CPU that multiplies bfloat16 has it written out once instead, for torch's own
matmul: a prompt is read twice as fast so.

**int8**: `_int_mm` multiplies int8 by int8 and adds up in int32, exactly. So that x loses nothing to speak of either,
it goes in as two digits of 7 bits:

    x ~ (128 * high + low) * unit        high -127..127, low -64..64, unit = the token's largest magnitude / (127 * 128)

    x w^T ~ (128 * (high codes^T) + (low codes^T)) * unit * scale          off by 6e-5, fp16's own rounding is 3e-4

That is two products for one. Of many tokens in bfloat16, a CPU that multiplies that makes one, with weights written out
a few rows at a time: for GPT-2's vocabulary and 1024 tokens in 290 milliseconds and not in 703 (results/attempts.json).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8 import CHUNK, Int8Weight
from kernels.k00_reference import QuantizedWeight, unpack, unpack_weight

GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # rows come in multiples of this; missing ones are added, and their results dropped
# Of more, torch's kernel would unpack each weight too often. They have it written out, if need be in their own dtype.
MOST_TOKENS = 1024
# From here on the weight is written out in bfloat16, where that is multiplied natively. Measured for a weight of 3072 x
# 768 on one core of an AMD EPYC (results/attempts.json): written out in 2.0 ms; the product takes 3.5 ms with 128
# tokens and 25 with 1024, by the int4 kernel 7.6 and 59.
WRITTEN_FROM = 96
# Whether this CPU has instructions for bfloat16 (those with AMX have them, too); others convert to float32 and back.
MULTIPLIES_BFLOAT16 = "AVX" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()
DIGIT = 128
LARGEST_DIGIT = 127


class CPUWeight(NamedTuple):
    """An int4 weight twice: as the file has it, and in the order of torch's CPU kernel.

    That order is torch's own affair and differs from CPU to CPU, so the way back is the file's copy: 4 bits more.

    Attributes:
        qweight, scales, qzeros: see `QuantizedWeight`.
        packed: uint8 [N', K/2], N' being N rounded up to a multiple of ROWS.
        scale_shifts: bf16 [K/group_size, N', 2], such that w = (code - 8) * scale + shift.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    packed: Tensor
    scale_shifts: Tensor

    @property
    def file(self) -> QuantizedWeight:
        """The weight in the file's format."""
        return QuantizedWeight(self.qweight, self.scales, self.qzeros)

    @property
    def in_features(self) -> int:
        """K."""
        return self.file.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.file.out_features

    @property
    def group_size(self) -> int:
        """How many weights along K share a scale and a zero."""
        return self.file.group_size


def prepare_for_cpu(weight: QuantizedWeight) -> QuantizedWeight | CPUWeight:
    """Makes a weight ready for torch's int4 kernel; what that does not take stays as it is.

    Args:
        weight: on a CPU.
    """
    return _pack(weight) if weight.group_size in GROUP_SIZES and has_int4_kernel() else weight


def _pack(weight: QuantizedWeight) -> CPUWeight:
    missing = -weight.out_features % ROWS
    codes, scales, zeros = unpack_weight(weight)
    scales = scales.float()
    scale_shifts = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return CPUWeight(
        *weight,
        packed=torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(codes, (0, 0, 0, missing)).contiguous(), 1),
        scale_shifts=F.pad(scale_shifts, (0, 0, 0, missing)),
    )


_exact = False


@contextlib.contextmanager
def exact_on_cpu() -> Iterator[None]:
    """Within it products with int4 weights on a CPU are made in x's own dtype, and not in bfloat16: to measure with.

    What a text scores must not depend on how many of its tokens go through a model at once.
    """
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def serves(x: Tensor) -> bool:
    """Whether `matmul_int4` is the way to multiply such an x, floating [..., K]; else the reference is."""
    tokens = x.numel() // x.shape[-1]
    if tokens == 0 or (_exact and x.dtype != torch.bfloat16):
        return False
    return tokens <= MOST_TOKENS or MULTIPLIES_BFLOAT16


def matmul_int4(x: Tensor, weight: CPUWeight) -> Tensor:
    """x @ w^T in bfloat16: floating [..., K] -> [..., N], in x's dtype."""
    tokens = x.reshape(-1, weight.in_features).to(torch.bfloat16)
    if len(tokens) >= WRITTEN_FROM and MULTIPLIES_BFLOAT16:
        out = F.linear(tokens, write_out(weight.file))
    else:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, weight.packed, weight.group_size, weight.scale_shifts)
    return out[:, : weight.out_features].to(x.dtype).view(*x.shape[:-1], -1)


def write_out(weight: QuantizedWeight) -> Tensor:
    """The weight that the codes stand for, its scales rounded to bfloat16 as for torch's kernel: -> bfloat16 [N, K].

    As in lesson 5 a code becomes a number by being put into the bits of one. bfloat16 has 7 bits behind the point, and
    128 + code is 0x4300 | code. Codes lie in the words in the order in which they are wanted, so that a byte, whose two
    codes go into the halves of 32 bits (little endian, as all CPUs with torch's kernel are), takes three operations,
    and zeros and scales one pass each.
    """
    n, k = weight.out_features, weight.in_features
    pairs = weight.qweight.t().contiguous().view(torch.uint8).int()  # [N, K/2], the lower code in the lower 4 bits
    pairs = pairs.mul_(1 + 2**12).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)  # a byte, and 12 bits up once more
    zeros = 128 + unpack(weight.qzeros.t(), n)  # [N, K/group_size]
    scales = weight.scales.t().to(torch.bfloat16)
    numbers = pairs.view(torch.bfloat16).view(n, -1, weight.group_size)
    return numbers.sub_(zeros[..., None].to(torch.bfloat16)).mul_(scales[..., None]).view(n, k)


def matmul_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T: floating [..., K] -> [..., N], in x's dtype."""
    tokens = x.reshape(-1, weight.in_features)
    many = len(tokens) >= WRITTEN_FROM and x.dtype == torch.bfloat16 and MULTIPLIES_BFLOAT16
    out = _written_out(tokens, weight) if many else _by_digits(tokens.float(), weight)
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _written_out(tokens: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T with the weight written out in bfloat16, as many rows at a time as fit a cache: [M, K] -> [M, N]."""
    rows = max(1, CHUNK // weight.in_features)
    parts = zip(weight.codes.split(rows), weight.scales.float()[:, None].split(rows), strict=True)
    return torch.cat([F.linear(tokens, (codes.float() * scales).to(tokens.dtype)) for codes, scales in parts], -1)


def _by_digits(tokens: Tensor, weight: Int8Weight) -> Tensor:
    """x @ w^T in whole numbers: float32 [M, K] -> float32 [M, N]."""
    units = tokens.abs().amax(1, keepdim=True) / (LARGEST_DIGIT * DIGIT)  # [M, 1]
    levels = tokens / units.clamp(min=torch.finfo(torch.float32).tiny)
    high = torch.round(levels / DIGIT)
    digits = torch.cat([high, torch.round(levels - DIGIT * high)]).to(torch.int8)  # [2 M, K]
    sums = torch._int_mm(digits, weight.codes.t()).float()  # [2 M, N]
    return torch.add(sums[len(tokens) :], sums[: len(tokens)], alpha=DIGIT).mul_(units).mul_(weight.scales.float())


@functools.cache
def has_int4_kernel() -> bool:
    """Whether this torch has a fast int4 kernel for this CPU, tried out on a small product.

    Without AVX2 it has one in plain C++, which is slower than the reference.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    weight = QuantizedWeight(
        torch.full((4, 16), 0x11111111, dtype=torch.int32),  # all codes 1
        torch.ones(1, 16, dtype=torch.float16),
        torch.zeros(1, 2, dtype=torch.int32),
    )
    try:
        out = matmul_int4(torch.ones(1, 32), _pack(weight))
    except (RuntimeError, AttributeError):
        return False
    return bool((out == 32).all())


@functools.cache
def has_int8_kernel() -> bool:
    """Whether this torch multiplies int8 matrices exactly here: without VNNI a CPU adds up in 16 bits, too few."""
    a, b = (torch.full((rows, 256), 127, dtype=torch.int8) for rows in (2, 16))
    b[::2] = -127
    try:
        return torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.long().t()).int())
    except (RuntimeError, AttributeError):
        return False
