"""Calibration: some text on which a model is watched, so that quantizing knows what its layers are fed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

from minigpt import data
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.tokenizer import encode

CHUNK_TOKENS = 4096  # tokens that go through a block at once
DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean; GPTQ's choice
MAX_DAMPING = 1024.0


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on.

    Attributes:
        name: of the text, as the user gave it.
        windows: int64 [n, T], T = the model's n_positions.
        seed: that chose the windows.
        warnings: what the user should know about it, a line each.
    """

    name: str
    windows: Tensor
    seed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens the windows hold."""
        return self.windows.numel()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's config.json says of it."""
        return {"text": self.name, "tokens": self.tokens, "seed": self.seed}


def load_calibration(
    name: str, tokenizer: tiktoken.Encoding, config: GPTConfig, n_tokens: int, seed: int
) -> Calibration:
    """Reads a text and takes windows from random places of it.

    Args:
        name: as `minigpt.data.load_text` knows it; of texts that have splits, the training text.
        tokenizer: the model's.
        config: the model's; windows are as long as the model reads.
        n_tokens: about how many tokens to take, in whole windows; at most what the text has, then with a warning.
        seed: of the places.

    Raises:
        UserError: there is no such text, it is shorter than a window, or it is WikiText's test split, on which
            perplexities are reported.
    """
    length = config.n_positions
    if n_tokens < length:
        raise UserError(f"--calibration-tokens {n_tokens} is less than a window, which for this model is {length}")
    text = data.load_text(name, "train")
    if data.WIKITEXT_TEST_TITLE in text:
        raise UserError(f"--calibration {name}: this is WikiText's test split, on which perplexities are reported")
    warnings = []
    if "wikitext" in name.lower():
        warnings.append(
            f"calibrating on {name}: perplexity on WikiText will flatter this model, as it has seen text of the "
            "same kind; calibrate on other text to compare"
        )
    tokens = torch.tensor(encode(tokenizer, text))  # [tokens]
    if len(tokens) < n_tokens:
        warnings.append(
            f"the calibration text {name} has {len(tokens):,} tokens, fewer than the {n_tokens:,} asked for"
        )
    n_windows = min(n_tokens, len(tokens)) // length
    generator = torch.Generator().manual_seed(seed)
    windows = data.random_windows(tokens, max(1, n_windows), length, generator)
    if windows.numel() < 4 * config.n_embd:  # the widest layer's in_features
        warnings.append(
            f"{windows.numel():,} calibration tokens say little about layers of {4 * config.n_embd:,} inputs; "
            "give more --calibration-tokens"
        )
    return Calibration(name, windows, seed, warnings)


@dataclass(frozen=True)
class LayerInputs:
    """What a calibrated method is told of a layer's inputs x.

    Attributes:
        mean: E[x], float64 [in_features].
        hessian: E[(x - E[x]) (x - E[x])^T], damped until it is positive definite: float64 [in_features, in_features].
            The mean is taken out because the layer's bias makes up for its error (see `watch`).
        notes: what was out of the ordinary, and what was done about it.
    """

    mean: Tensor
    hessian: Tensor
    notes: tuple[str, ...]


class ResidualStream:
    """What flows from block to block, for all windows of the calibration text: float32 [n, T, C], kept on the CPU.

    A chunk at a time goes to the model's device, so the device holds no more than a chunk's activations.
    """

    def __init__(self, model: GPT, windows: Tensor) -> None:
        """What reaches the first block; windows: int64 [n, T]."""
        self._device = model.wte.weight.device
        self._positions = torch.arange(windows.shape[1], device=self._device)  # [T]
        self._chunks = []
        for tokens in windows.split(max(1, CHUNK_TOKENS // windows.shape[1])):
            with torch.no_grad():
                embedded = model.wte(tokens.to(self._device)) + model.wpe(self._positions)  # [B, T, C]
            self._chunks.append(embedded.float().cpu())

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Takes the stream through a block."""
        for i, chunk in enumerate(self._chunks):
            self._chunks[i] = block(chunk.to(self._device), 0, self._positions, None).cpu()

    @torch.no_grad()
    def inputs_of(self, layer: nn.Module, block: nn.Module) -> Iterator[Tensor]:
        """What reaches a layer inside the next block, a chunk at a time: yields float32 [tokens, in_features].

        The block runs only as far as it must.
        """
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        hook = layer.register_forward_pre_hook(catch)
        try:
            for chunk in self._chunks:
                with contextlib.suppress(_Reached):
                    block(chunk.to(self._device), 0, self._positions, None)
                yield caught.pop().flatten(0, -2)
        finally:
            hook.remove()


class _Reached(Exception):  # noqa: N818 (nothing went wrong)
    """The layer's input is known; the rest of the block need not run."""


def watch(name: str, layer: nn.Linear, block: nn.Module, stream: ResidualStream) -> LayerInputs:
    """Sums up a layer's inputs over the calibration text, for the loss of Frantar et al. (`gptq.py`) with a free bias.

    The error of an output is (w - q) x + (b - b'), which b' = b + (w - q) E[x] makes zero in the mean. (Nagel et al.
    2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2.)
    What remains is (w - q) (x - E[x]), so the Hessian is the covariance: codes need not spend themselves on the mean.

    Raises:
        UserError: inputs are not finite, or no damping makes the Hessian positive definite.
    """
    count = 0
    total = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)
    products = torch.zeros((layer.in_features, layer.in_features), dtype=torch.float64, device=layer.weight.device)
    for x in stream.inputs_of(layer, block):
        count += len(x)
        total += x.sum(0, dtype=torch.float64)
        products += x.t() @ x  # float32 does for a chunk
    mean = total / count
    hessian = products / count - torch.outer(mean, mean)
    if not torch.isfinite(hessian).all():
        raise UserError(f"the inputs of layer {name} are NaN or infinite on the calibration text; does the model work?")
    hessian, damping = damp(name, hessian)
    notes = []
    dead = int((products.diagonal() == 0).sum())
    if dead:
        notes.append(f"{name}: {dead} of {layer.in_features} inputs are 0 on all the text; rounded to nearest")
    if damping > DAMPING:
        notes.append(f"{name}: its Hessian is not positive definite; damping raised from {DAMPING} to {damping:g}")
    return LayerInputs(mean, hessian, tuple(notes))


def damp(name: str, hessian: Tensor) -> tuple[Tensor, float]:
    """Adds to the diagonal, first DAMPING of its mean and then twice as much each time, until a Cholesky exists.

    Args:
        name: of the layer, for the error.
        hessian: symmetric, float64 [K, K].

    Returns:
        The damped Hessian, and how much of the mean was added. A Hessian of zeros gives the identity.

    Raises:
        UserError: not even 1024 times the mean helped.
    """
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), DAMPING
    damping = DAMPING
    while damping < MAX_DAMPING:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        if torch.linalg.cholesky_ex(damped).info == 0:
            return damped, damping
        damping *= 2
    raise UserError(f"layer {name}: the Hessian of its inputs is not positive definite, not even with damping")
