"""GPT-2 in plain torch: the whole model on one page.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". A GPT-2 reads a sequence of
tokens and gives, at each position, a score (logit) for every token that could come next:

    tokens -> wte + wpe -> n_layer x [ x += attn(ln_1(x)); x += mlp(ln_2(x)) ] -> ln_f -> wte^T -> logits

Shapes trail on the right of each line. B = batch, T = tokens, C = n_embd, H = n_head, D = C / H,
V = vocab_size, L = length of the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import GPTConfig


class KVCache:
    """The keys and values of all tokens read so far, so that a new token costs one row and not a whole sequence.

    Allocated once at its full length ("static"): shapes never change while generating, which is what
    lets a decode step be captured in a CUDA graph and replayed.

    Sequences of one batch may have different lengths: each token says at which position of its own sequence it is
    written, and sees that position and those before it. What lies behind (zeros, or what padding to the right of a
    short prompt left there) is masked out until the sequence gets that far and writes over it.

    Attributes:
        k, v: n_layer tensors [B, H, L, D], zeros at first. (Were they one, torch.compile would copy it for each write.)
        rows: int64 [B, 1], the number of each sequence in the batch.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.rows = torch.arange(batch_size, device=device)[:, None]

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v, [B, H, T, D], at positions [B, T]; returns all keys and values of the layer, [B, H, L, D]."""
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2)  # [B, T, H, D]
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def mask(self, positions: Tensor) -> Tensor:
        """What tokens at positions [B, T] see: [B, 1, T, L], 0 up to a token's own position and -inf behind it."""
        places = torch.arange(self.k[0].shape[2], device=positions.device)  # [L]
        hidden = places > positions[:, None, :, None]  # [B, 1, T, L]
        return torch.zeros_like(hidden, dtype=self.k[0].dtype).masked_fill_(hidden, -torch.inf)


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and at the tokens before it, with n_head independent patterns of attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, T, C] -> [B, T, C]. `layer` says which slice of the cache is this block's."""
        q, k, v = (self._split_heads(part) for part in self.c_attn(x).chunk(3, dim=-1))  # each [B, H, T, D]
        if cache is not None:  # then look at every position written so far, not only at these tokens
            k, v = cache.write(layer, positions, k, v)  # [B, H, L, D]
        dropout = self.dropout if self.training else 0.0
        # Without a cache the whole sequence is here: token t sees tokens 0..t.
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=cache is None)  # [B, H, T, D]
        return self.c_proj(y.transpose(1, 2).flatten(2))  # [B, T, C]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]


class MLP(nn.Module):
    """Two linear layers with a GELU between: where a transformer keeps most of its weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, C] -> [B, T, C]."""
        # GPT-2 was trained with the tanh form of GELU; the exact form gives slightly different logits.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention then MLP, each reading a normalised copy of the residual stream and adding to it (pre-LayerNorm)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None, positions: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, T, C] -> [B, T, C]."""
        x = x + self.drop(self.attn(self.ln_1(x), layer, cache, positions, mask))  # [B, T, C]
        return x + self.drop(self.mlp(self.ln_2(x)))  # [B, T, C]


class GPT(nn.Module):
    """GPT-2. `forward` gives logits; `hidden` stops before the output layer, where most callers need few positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: the same numbers read tokens in and score tokens out

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initialisation: N(0, 0.02), and smaller for the layers that write into the residual stream,
        whose 2 * n_layer contributions add up (section 2.3 of the paper)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """The residual stream after ln_f.

        Args:
            tokens: int64 [B, T].
            cache: keys and values of the tokens before these; theirs are added to it in place.
            positions: int64, broadcastable to [B, T], each token's place in its own sequence; 0..T-1 if left out.
                Below n_positions and, with a cache, below its length.

        Returns:
            [B, T, C], in the dtype of the weights.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # [B, T, C]
        mask = None
        if cache is not None:
            positions = positions.expand(tokens.shape)  # [B, T]
            mask = cache.mask(positions)  # [B, 1, T, L], the same for all layers
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, positions, mask)  # [B, T, C]
        return self.ln_f(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position: int64 [B, T] -> [B, T, V]. Arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, cache, positions))
