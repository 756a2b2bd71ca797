"""How tiles lie in shared memory, and how the copy engine (TMA) brings them there: for lessons 12, 15, 22 and 23.

A ring is a row of places in shared memory that are filled in turn. A producer warp orders a tile for the next place,
telling a barrier how many bytes to expect; whoever computes waits for that barrier, and later says that it is done.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.prepared import TILE_ROWS

# An order for a tile, which ends at a barrier.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # until Triton 3.8


@gluon.constexpr_function
def plain_plane(bits):
    """Rows of numbers of so many bits, in order."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)


@gluon.constexpr_function
def spread(tokens):
    """How two warpgroups hand over sums [rows, tokens] of 4 bytes: what a warp writes at once lies in all banks.

    That is 8 rows by 8 tokens, as wgmma leaves them in registers.
    """
    rows = max(1, 32 // tokens)  # that fill the banks once
    return gl.SwizzledSharedLayout(4, rows, 8 // rows, [1, 0])


@gluon.jit
def fetch_weight(codes_desc, words_desc, weight_ring, tile, step, block, GROUP_SIZE: gl.constexpr):
    """Orders what a step reads of a program's rows, from `block` on: codes and their groups' scale words.

    The ring: codes int16 [SLOTS, blocks, rows / 16, 256], words int32 [SLOTS, groups, rows], a barrier for each slot.
    """
    codes, words, full = weight_ring
    ROWS: gl.constexpr = words.shape[2]
    slot = step % codes.shape[0]
    mbarrier.expect(full.index(slot), codes_desc.block_type.nbytes + words_desc.block_type.nbytes)
    load_tile(codes_desc, [block, tile * (ROWS // 16), 0], full.index(slot), codes.index(slot))
    load_tile(words_desc, [block * 64 // GROUP_SIZE, tile * ROWS], full.index(slot), words.index(slot))


def describe_swizzled(x: Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
    """What the copy engine needs to know to read tiles of x, int8, float16 or bfloat16, as wgmma wants them."""
    return TensorDescriptor.from_tensor(x, list(tile), _swizzled_layout(tile, x.dtype))


def describe_plain(tensor: Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
    """What the copy engine needs to know to read tiles and leave their bytes in order."""
    return TensorDescriptor.from_tensor(tensor, list(tile), _plain_layout(8 * tensor.element_size(), len(tile)))


def describe_weight(codes: Tensor, words: Tensor, blocks: int, groups: int, rows: int) -> list[TensorDescriptor]:
    """The same for what `fetch_weight` orders: the boxes of a step.

    Args:
        codes: int16 [N/16, K/64, 16, 16].
        words: int32 [groups, N], a scale and a zero each. Where N is not a multiple of 4 they are copied to longer
            rows, which must begin at multiples of 16 bytes: then the next launch may not read ahead (lesson 9).
        blocks, groups, rows: of a box.

    Returns:
        Of the codes, as int16 [K/64, N/16, 256], and of the words.
    """
    if words.shape[1] % 4:
        words = torch.nn.functional.pad(words, (0, -words.shape[1] % 4))
    boxes = codes.flatten(2).permute(1, 0, 2)
    return [describe_plain(boxes, (blocks, rows // TILE_ROWS, 256)), describe_plain(words, (groups, rows))]


@functools.cache  # to find it takes 11 microseconds
def _swizzled_layout(tile: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    elements = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
    return gl.NVMMASharedLayout.get_default_for(list(tile), elements[dtype])


@functools.cache
def _plain_layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=rank)
