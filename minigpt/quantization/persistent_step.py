"""A decode step of an int4 GPT whose blocks are all one kernel (lesson 21), for one sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from kernels import Layers, Linears, Mail, PreparedWeight, Stream
from minigpt.model import GPT, Block, KVCache
from minigpt.quantization.fused_decode import FusedStep, blocks, fused_step, weight_and_bias
from minigpt.quantization.linear import Int4Linear

HEAD_SIZE = 64  # the kernel's


class PersistentStep(FusedStep):
    """As `FusedStep`, but all blocks in one kernel, and for one sequence only.

    The weights of all blocks are put into a few tensors, of which the model's become parts: it takes no more memory.
    """

    def __init__(self, model: GPT) -> None:
        bs = blocks(model)
        kinds = zip(*((b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in bs), strict=True)
        weights = [stack_weights(layers) for layers in kinds]
        super().__init__(model)
        none = weights[0][1].new_empty(0)
        added = [
            (torch.stack([b.norm_1.bias for b in self.blocks]), torch.stack([b.norm_1.folded for b in self.blocks])),
            (torch.stack([b.attn_bias for b in self.blocks]).float(), none),
            (torch.stack([b.norm_2.bias for b in self.blocks]), torch.stack([b.norm_2.folded for b in self.blocks])),
            (torch.stack([b.mlp_bias for b in self.blocks]).float(), none),
        ]
        group_size = self.blocks[0].c_attn.group_size
        linears = (Linears(*weight, *rest, group_size) for weight, rest in zip(weights, added, strict=True))
        self.layers = Layers(*linears, torch.stack(self.gammas).float())
        self.mail: dict[int, Mail] = {}  # by cache length
        self.distances: dict[tuple[int, ...], Tensor] = {}  # by where a cache's keys and values are

    def _stream(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Stream:
        """The residual stream behind the last block."""
        stream, _ = self._buffers(1, cache)
        kernels.embed(tokens, positions, self.wte, self.wpe, self.gammas[0], stream)
        mail, distances = self._mail(cache)
        kernels.all_blocks(stream, self.layers, cache.k, cache.v, positions, mail, distances, self.eps)
        return stream

    def _mail(self, cache: KVCache) -> tuple[Mail, Tensor]:
        """The kernel's buffers, and where the cache is. They stay where they are: a captured graph may be replayed."""
        device, length, c = cache.k[0].device, cache.k[0].shape[2], self.config
        places = tuple(tensor.data_ptr() for pair in zip(cache.k, cache.v, strict=True) for tensor in pair)
        with torch.inference_mode(False):
            if length not in self.mail:
                programs = kernels.programs_of_all_blocks(device)
                self.mail[length] = Mail.empty(c.n_layer, c.n_head, c.n_embd, length, programs, device)
            if places not in self.distances:
                apart = [(place - places[0]) // 16 for place in places]
                self.distances[places] = torch.tensor(apart, device=device).view(-1, 2)
        return self.mail[length], self.distances[places]


def persistent_step(model: GPT, batch_size: int) -> PersistentStep | None:
    """The step for a model, or None where the kernel does not serve it: see `fused_step`; for one sequence, heads of 64
    numbers, and one group size for all linear layers."""
    config = model.config
    if batch_size != 1 or config.n_embd != HEAD_SIZE * config.n_head or fused_step(model, 1) is None:
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
