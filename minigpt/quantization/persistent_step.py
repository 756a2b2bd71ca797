"""A decode step of an int4 GPT whose blocks are all one kernel (lesson 21), for one sequence.

Measured, it is no faster than `fused_decode`, which is what programs get; `minigpt.bench` has both.
"""

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import kernels
from kernels import Layers, Linears, Mail, PreparedWeight, Stream
from minigpt.model import GPT, KVCache
from minigpt.quantization.fused_decode import FusedStep, blocks, fits_kernels, weight_and_bias
from minigpt.quantization.linear import Int4Linear

HEAD_SIZE = 64  # the kernel's


class PersistentStep(FusedStep):
    """As `FusedStep`, but all blocks in one kernel, and for one sequence only.

    The weights of all blocks are put into a few tensors, of which the model's become parts: it takes no more memory.
    """

    def __init__(self, model: GPT) -> None:
        by_block = [(b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in blocks(model)]
        c_attn, attn_proj, c_fc, mlp_proj = (stack_weights(layers) for layers in zip(*by_block, strict=True))
        super().__init__(model)
        size = self.blocks[0].c_attn.group_size
        none = torch.empty(0, device=self.wpe.device)

        def stack(tensors: Iterable[Tensor]) -> Tensor:
            """A tensor for each block, as float32 [blocks, ...]."""
            return torch.stack(list(tensors)).float()

        norms_1, norms_2 = [b.norm_1 for b in self.blocks], [b.norm_2 for b in self.blocks]
        self.layers = Layers(
            Linears(*c_attn, stack(norm.bias for norm in norms_1), stack(norm.folded for norm in norms_1), size),
            Linears(*attn_proj, stack(b.attn_bias for b in self.blocks), none, size),
            Linears(*c_fc, stack(norm.bias for norm in norms_2), stack(norm.folded for norm in norms_2), size),
            Linears(*mlp_proj, stack(b.mlp_bias for b in self.blocks), none, size),
            stack(self.gammas),
        )
        # A cache's lives as long as the cache: a captured graph may be replayed.
        self.mail: WeakKeyDictionary[KVCache, Mail] = WeakKeyDictionary()

    def _stream(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Stream:
        """The residual stream behind the last block."""
        stream, _ = self._buffers(1, cache)
        if cache not in self.mail:
            with torch.inference_mode(False):
                self.mail[cache] = kernels.mail_for(cache.k, cache.v)
        kernels.embed(tokens, positions, self.wte, self.wpe, self.gammas[0], stream)
        kernels.all_blocks(stream, self.layers, cache.k, cache.v, positions, self.mail[cache], self.eps)
        return stream


def persistent_step(model: GPT, batch_size: int) -> PersistentStep | None:
    """The step for a model and as many sequences, or None where the kernel does not serve it.

    It does where `fused_step` would, for one sequence, heads of 64 numbers, and one group size for all linear layers.
    """
    config = model.config
    if batch_size != 1 or config.n_embd != HEAD_SIZE * config.n_head or not fits_kernels(model, 1):
        return None
    sizes = {layer.group_size for layer in model.modules() if isinstance(layer, Int4Linear)}
    return PersistentStep(model) if len(sizes) == 1 else None


def stack_weights(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """The codes and scale_zeros of layers of one shape, one behind another: what a GPU holds of them becomes views."""
    weights = [weight_and_bias(layer)[0] for layer in layers]
    codes = torch.stack([weight.codes for weight in weights])
    scale_zeros = torch.stack([weight.scale_zeros for weight in weights])
    for layer, weight, c, s in zip(layers, weights, codes, scale_zeros, strict=True):
        assert isinstance(layer, Int4Linear)
        if isinstance(layer.held, PreparedWeight):
            layer.hold(weight._replace(codes=c, scale_zeros=s))
    return codes, scale_zeros
