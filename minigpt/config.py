"""The numbers that define a GPT-2, the sizes OpenAI published, and a glossary of GPT-2's names.

GPT-2's own names are used throughout, so that every tensor can be looked up in OpenAI's release:

| name       | what it is                                                                           |
|------------|--------------------------------------------------------------------------------------|
| wte        | token embedding [vocab_size, n_embd]; also the output layer (the weights are tied)    |
| wpe        | learned position embedding [n_positions, n_embd]                                      |
| h          | the list of n_layer transformer blocks                                                |
| ln_1, ln_2 | the LayerNorms before attention and before the MLP                                    |
| attn.c_attn| one linear layer that makes query, key and value at once [n_embd -> 3 n_embd]         |
| attn.c_proj| attention's output projection [n_embd -> n_embd]                                      |
| mlp.c_fc   | the MLP's first layer [n_embd -> 4 n_embd], followed by GELU                          |
| mlp.c_proj | the MLP's second layer [4 n_embd -> n_embd]                                           |
| ln_f       | the last LayerNorm, before the output layer                                           |
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from minigpt.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Field names are those of Hugging Face's `config.json`.

    Attributes:
        vocab_size: how many different tokens there are.
        n_positions: the longest sequence the model can read, in tokens (the context length).
        n_embd: width of the residual stream.
        n_layer: number of transformer blocks.
        n_head: attention heads a block; must divide n_embd.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        dropout: probability of dropping an activation while training; 0 when evaluating.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**24:
                raise UserError(f"config: {name} is {value!r}, it must be a whole number from 1 to 2^24")
        if type(self.layer_norm_epsilon) not in (int, float) or not 0 <= self.layer_norm_epsilon < 1:
            raise UserError(f"config: layer_norm_epsilon is {self.layer_norm_epsilon!r}, it must be a number like 1e-5")
        if self.n_embd % self.n_head:
            raise UserError(f"config: n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as Hugging Face's GPT-2 `config.json` names them, so that transformers loads them too."""
        shape = {k: v for k, v in dataclasses.asdict(self).items() if k != "dropout"}
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            # GPT-2's own id where the vocabulary has it; a smaller vocabulary has no special tokens.
            "bos_token_id": 50256 if self.vocab_size > 50256 else None,
            "eos_token_id": 50256 if self.vocab_size > 50256 else None,
            **shape,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "GPTConfig":
        """Reads a Hugging Face `config.json`.

        Raises:
            UserError: it describes another architecture, or a variant of GPT-2 that this model lacks.
        """
        model_type = fields.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise UserError(f"config: model_type is {model_type!r}, only 'gpt2' can be loaded")
        required = {  # what the model in model.py is; a config.json may leave any of these out
            "activation_function": ("gelu_new",),
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        for name, allowed in required.items():
            if name in fields and fields[name] not in allowed:
                raise UserError(f"config: {name} is {fields[name]!r}, only {allowed[-1]!r} is supported")
        names = {field.name for field in dataclasses.fields(cls)} - {"dropout"}
        config = cls(**{name: value for name, value in fields.items() if name in names})
        if fields.get("n_inner") not in (None, 4 * config.n_embd):
            raise UserError(f"config: n_inner is {fields['n_inner']!r}, only 4 * n_embd is supported")
        return config


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),  # 124M parameters
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),  # 355M
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),  # 774M
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),  # 1558M
    "tiny": GPTConfig(vocab_size=4096, n_positions=128, n_embd=128, n_layer=4, n_head=4),  # 1.3M, to try training
    "demo": GPTConfig(vocab_size=4096, n_positions=512, n_embd=256, n_layer=6, n_head=4),  # 5.9M, ships with us
}
