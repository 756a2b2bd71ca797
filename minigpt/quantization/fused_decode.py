"""A decode step of an int4 GPT in five kernels a block: what lessons 18 to 20 are for.

A step for one token is short of arithmetic and of bytes: what it has too much of is kernels, one after the other. As
plain layers a block takes some fifteen; here LayerNorm, bias, GELU and the residual sum are parts of the matmuls.
"""

import torch
from torch import Tensor, nn

import kernels
from kernels import FoldedNorm, Parts, PreparedWeight, Stream
from minigpt.model import GPT, Block, KVCache
from minigpt.quantization.embedding import embedding_weight
from minigpt.quantization.linear import Int4Linear, prepared

BLOCK = 64  # the kernels read weights in blocks of as many columns


class FusedBlock:
    """A block's weights as the fused kernels want them: both norms taken into the layers behind them."""

    def __init__(self, block: Block) -> None:
        self.c_attn, self.norm_1 = folded(block.ln_1, block.attn.c_attn)
        self.c_fc, self.norm_2 = folded(block.ln_2, block.mlp.c_fc)
        self.attn_proj, self.attn_bias = weight_and_bias(block.attn.c_proj)
        self.mlp_proj, self.mlp_bias = weight_and_bias(block.mlp.c_proj)


class FusedStep:
    """Computes a step's logits, as `minigpt.decode.StepLogits`, for up to 8 sequences.

    It shares the model's int4 weights, and keeps buffers for each batch size and cache length. Biases and LayerNorms
    are read when it is made: a model changed afterwards needs a new one.
    """

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.eps = model.config.layer_norm_epsilon
        self.wpe = model.wpe.weight
        self.wte = embedding_weight(model)
        self.blocks = [FusedBlock(block) for block in blocks(model)]
        # The weight of the norm that reads the stream, in order: after the embedding, and after each sum.
        norms = [norm for block in blocks(model) for norm in (block.ln_1, block.ln_2)] + [model.ln_f]
        self.gammas = [norm.weight for norm in norms]
        self.norm_f = kernels.fold_norm(self.wte, model.ln_f.weight, model.ln_f.bias)
        self.streams: dict[int, Stream] = {}  # by batch size
        self.parts: dict[tuple[int, int], Parts] = {}  # by batch size and cache length

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """tokens, positions: int64 [B, 1]; -> logits of the next tokens, float16 [B, V]."""
        return kernels.score(self._stream(tokens, positions, cache), self.wte, self.norm_f, self.eps)

    @torch.no_grad()
    def greedy(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The same, but -> the likeliest next tokens, int64 [B, 1]."""
        return kernels.best_tokens(self._stream(tokens, positions, cache), self.wte, self.norm_f, self.eps)

    def _stream(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Stream:
        """The residual stream behind the last block."""
        stream, parts = self._buffers(len(tokens), cache)
        kernels.embed(tokens, positions, self.wte, self.wpe, self.gammas[0], stream)
        for layer, block in enumerate(self.blocks):
            qkv = kernels.normed_matmul(stream, block.c_attn, block.norm_1, self.eps)  # [B, 3C]
            keys, values = cache.k[layer], cache.v[layer]
            proj = block.attn_proj, block.attn_bias
            kernels.attend_and_add(qkv, keys, values, positions, parts, *proj, stream, self.gammas[2 * layer + 1])
            hidden = kernels.normed_matmul(stream, block.c_fc, block.norm_2, self.eps, gelu=True)  # [B, 4C]
            kernels.add_matmul(hidden, block.mlp_proj, block.mlp_bias, stream, self.gammas[2 * layer + 2])
        return stream

    def _buffers(self, batch_size: int, cache: KVCache) -> tuple[Stream, Parts]:
        """The stream and the attention's scratch. They stay where they are: a captured graph may be replayed."""
        device, c = cache.k[0].device, self.config
        length = cache.k[0].shape[2]
        with torch.inference_mode(False):
            if batch_size not in self.streams:
                self.streams[batch_size] = Stream.zeros(batch_size, c.n_embd, device)
            if (batch_size, length) not in self.parts:
                parts = Parts.empty(batch_size, c.n_head, c.n_embd // c.n_head, length, device)
                self.parts[batch_size, length] = parts
        return self.streams[batch_size], self.parts[batch_size, length]


def fused_step(model: GPT, batch_size: int) -> FusedStep | None:
    """The fused step for a model and as many sequences, or None where the kernels do not serve it."""
    return FusedStep(model) if fits_kernels(model, batch_size) else None


def fits_kernels(model: GPT, batch_size: int) -> bool:
    """Whether the kernels serve a model and as many sequences.

    They do for models whose blocks are all int4 with groups of a multiple of 64, n_embd a multiple of 64 and at most
    2048, activations in fp16, on an NVIDIA GPU of sm_80 or newer with enough shared memory for x, up to 8 sequences.
    """
    linears = [layer for b in blocks(model) for layer in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    dtype = model.wpe.weight.dtype
    return model.config.n_embd % BLOCK == 0 and all(
        isinstance(layer, Int4Linear) and kernels.can_fuse(layer.held, dtype, batch_size) for layer in linears
    )


def blocks(model: GPT) -> list[Block]:
    """The transformer blocks."""
    return [block for block in model.h if isinstance(block, Block)]


def weight_and_bias(layer: nn.Module) -> tuple[PreparedWeight, Tensor]:
    """An int4 layer's weight, prepared for the kernels, and its bias."""
    assert isinstance(layer, Int4Linear)
    return prepared(layer), layer.bias


def folded(norm: nn.LayerNorm, layer: nn.Module) -> tuple[PreparedWeight, FoldedNorm]:
    """An int4 layer's weight, and what is left of the norm before it and of its bias (`kernels.fold_norm`)."""
    weight, bias = weight_and_bias(layer)
    return weight, kernels.fold_norm(weight, norm.weight, norm.bias, bias)
