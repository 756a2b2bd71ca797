"""Calibration: some text on which a model is watched, so that quantizing knows what its layers are fed.

Once some layers are quantized, the next one is fed inputs x that differ from those of the original model, X. What its
output should be is still W X + b, so that is what its rounded weight q and its bias are chosen for:

    E |W X + b - (q x + b')|^2

GPTQ looks at x alone (it minimises |W x - q x|); the step to X is that of GPTAQ (Li et al. 2025, arXiv 2504.02692,
"asymmetric calibration") and of Qronos (Zhang et al. 2025, arXiv 2505.11695). Written as here it needs no new
algorithm: least squares says which unrounded weight, the goal, does best on x, and that is handed to the method as the
weight to be rounded, with the covariance of x; the best bias brings the mean of the outputs to where it was.

MEASURED as in gptq.py, with scales by blocks of H: neither bias nor covariance, KL divergence 0.0091 and perplexity up
by 0.68%; the bias alone, 0.0091 and 0.47%; both, 0.0088 and 0.30%; and a quarter of the step to X, 0.0081 and 0.42%.
(0.1% of perplexity, either way, is chance on so few windows.) Half of the step brings KL down further, to 0.0076 with
scales by the diagonal, but perplexity up, to 0.62%.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

from minigpt import data
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.linear import exact_on_cpu
from minigpt.quantization.tune import n_held_back
from minigpt.tokenizer import encode

CHUNK_TOKENS = 4096  # tokens that go through a block at once
TOKENS_PER_INPUT = 16  # of the widest layer, below which a warning is due: the demo does worse than `mse` with 8
DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean; GPTQ's choice
MAX_DAMPING = 1024.0
HELD_BACK = 8  # one token in so many, at the end of a text, is for tuning to validate on

Draw = tuple[int, int]  # a seed, and how many windows to tune on


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on.

    Attributes:
        name: of the text, as the user gave it.
        windows: int64 [n, T], T = the model's n_positions: what layers are watched on.
        tuning_windows: int64 [m, T], these and more: what a model is tuned on, and at the end those held back to
            validate on (`minigpt.quantization.tune`). Empty where nothing is tuned.
        seed: that chose the windows.
        warnings: what the user should know about it, a line each.
    """

    name: str
    windows: Tensor
    tuning_windows: Tensor
    seed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens the windows hold."""
        return self.windows.numel()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's config.json says of it."""
        return {"text": self.name, "tokens": self.tokens, "seed": self.seed}


def load_calibrations(
    name: str, tokenizer: tiktoken.Encoding, config: GPTConfig, n_tokens: int, draws: Iterable[Draw]
) -> dict[Draw, Calibration]:
    """Reads a text once, and for each draw takes windows from random places of it.

    The same text and the same draw give the same windows, whatever else is drawn. Without tuning they come from all of
    the text. With it, the last eighth of the text is set aside: the windows that tuning holds back come from there, all
    others from what stands before it, so that no token is in both.

    Args:
        name: as `minigpt.data.load_text` knows it; of texts that have splits, the training text.
        tokenizer: the model's.
        config: the model's; windows are as long as the model reads.
        n_tokens: about how many tokens to watch layers on, in whole windows; at most what the text has, then with a
            warning.
        draws: a seed of the places, and how many windows to tune on (0 for no tuning), those held back included, and
            those to watch among the others; likewise.

    Raises:
        UserError: there is no such text, it is shorter than a window, or than two where a model is to be tuned on it,
            or it is WikiText's test split, on which perplexities are reported.
    """
    length = config.n_positions
    if n_tokens < length:
        raise UserError(f"--calibration-tokens {n_tokens} is less than a window, which for this model is {length}")
    text = data.load_text(name, "train")
    if data.WIKITEXT_TEST_TITLE in text:
        raise UserError(f"--calibration {name}: this is WikiText's test split, on which perplexities are reported")
    tokens = torch.tensor(encode(tokenizer, text))  # [tokens]
    if len(tokens) < length:
        raise UserError(
            f"--calibration {name}: the text has {len(tokens)} tokens, fewer than a window of {length}; "
            f"--calibration-tokens asks for {n_tokens:,}"
        )
    return {draw: _calibration(name, tokens, config, n_tokens, *draw) for draw in draws}


def _calibration(
    name: str, tokens: Tensor, config: GPTConfig, n_tokens: int, seed: int, n_tuning_windows: int
) -> Calibration:
    """One draw of `load_calibrations`; tokens: int64 [tokens], all of the text."""
    warnings = []
    if "wikitext" in name.lower():
        warnings.append(
            f"calibrating on {name}: perplexity on WikiText will flatter this model, as it has seen text of the "
            "same kind; calibrate on other text to compare"
        )
    length = config.n_positions
    wanted = max(n_tokens, n_tuning_windows * length)
    if len(tokens) < wanted:
        warnings.append(f"the calibration text {name} has {len(tokens):,} tokens, fewer than the {wanted:,} asked for")
    n_windows = max(1, min(wanted, len(tokens)) // length)
    if n_tuning_windows and n_windows < 2:
        raise UserError(
            f"--calibration {name}: the text has {len(tokens):,} tokens; tuning needs at least 2 windows of {length}, "
            "one to learn from and one to be tested on"
        )
    generator = torch.Generator().manual_seed(seed)
    if n_tuning_windows:
        tail = max(length, len(tokens) // HELD_BACK)
        held_back = n_held_back(n_windows)
        shown = data.random_windows(tokens[:-tail], n_windows - held_back, length, generator)
        tuning_windows = torch.cat([shown, data.random_windows(tokens[-tail:], held_back, length, generator)])
    else:
        shown = data.random_windows(tokens, n_windows, length, generator)
        tuning_windows = shown[:0]
    windows = shown[: n_tokens // length]
    widest = 4 * config.n_embd
    if windows.numel() < TOKENS_PER_INPUT * widest:
        warnings.append(
            f"{windows.numel():,} calibration tokens say little about layers of {widest:,} inputs, and the result may "
            f"be worse than without; give {TOKENS_PER_INPUT * widest:,} or more"
        )
    return Calibration(name, windows, tuning_windows, seed, warnings)


@dataclass(frozen=True)
class LayerInputs:
    """What is known of a layer's inputs: x in the model that is being quantized, X in the original one.

    Attributes:
        mean: E[x], float64 [in_features].
        hessian: E[(x - E[x]) (x - E[x])^T], damped until it is positive definite: float64 [in_features, in_features].
        mean_drift: E[X - x], float64 [in_features]; zeros where the original model is not looked at.
        drift: E[(X - x) (x - E[x])^T], float64 [in_features, in_features]; likewise.
        notes: what was out of the ordinary, and what was done about it.
    """

    mean: Tensor
    hessian: Tensor
    mean_drift: Tensor
    drift: Tensor
    notes: tuple[str, ...]

    def goal(self, weight: Tensor, aim: float) -> Tensor:
        """The weight that would bring the outputs closest to the original model's, if it were not rounded.

        By least squares, W X = (W + W drift hessian^-1) x and what no weight can make of x.

        Args:
            weight: floating [out_features, in_features].
            aim: how much of this step is taken, from 0, none, which leaves the weight as it is, to 1, all of it.

        Returns:
            float32 [out_features, in_features].
        """
        if aim == 0:
            return weight.float()
        step = torch.cholesky_solve(self.drift.t(), torch.linalg.cholesky(self.hessian)).t()  # [K, K]
        return (weight.double() + aim * (weight.double() @ step)).float()

    def bias(self, bias: Tensor, weight: Tensor, quantized: Tensor) -> Tensor:
        """The bias with which the outputs' mean is that of W x, or of W X where the original model is looked at.

        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
        section 4.2. As it makes up for the error of the mean, the Hessian need not count it, and is a covariance.

        Args:
            bias: floating [out_features].
            weight, quantized: floating [out_features, in_features].

        Returns:
            float32 [out_features].
        """
        wanted = weight.double() @ (self.mean + self.mean_drift)
        return (bias.double() + wanted - quantized.double() @ self.mean).float()


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
            with exact_on_cpu():
                self._chunks[i] = block(chunk.to(self._device), 0, None, self._positions, None).cpu()

    def inputs_of(self, layer: nn.Module, block: nn.Module) -> Iterator[Tensor]:
        """What reaches a layer inside the next block, a chunk at a time: yields float32 [tokens, in_features]."""
        for chunk in self._chunks:
            yield self._input_of(layer, block, chunk.to(self._device)).flatten(0, -2)

    @torch.no_grad()
    def _input_of(self, layer: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
        """The layer's input, given the block's, [B, T, C]; the block runs only as far as it must."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            """Keeps the layer's input, and ends the block's forward pass."""
            caught.append(arguments[0])
            raise _Reached

        hook = layer.register_forward_pre_hook(catch)
        try:
            with contextlib.suppress(_Reached), exact_on_cpu():
                block(x, 0, None, self._positions, None)
        finally:
            hook.remove()
        return caught[0]


class _Reached(Exception):  # noqa: N818 (nothing went wrong)
    """The layer's input is known; the rest of the block need not run."""


def watch(name: str, inputs: Iterator[Tensor], original_inputs: Iterator[Tensor] | None = None) -> LayerInputs:
    """Sums up a layer's inputs over the calibration text.

    Args:
        name: of the layer, for errors and notes.
        inputs: chunk by chunk, what reaches it in the model that is being quantized: float32 [tokens, in_features].
        original_inputs: the same for the original model, where that is looked at.

    Raises:
        UserError: inputs are not finite, or no damping makes the Hessian positive definite.
    """
    count = 0
    sums: list[Tensor] = []  # in float64; within a chunk float32 does
    for x in inputs:
        count += len(x)
        terms = [x.sum(0), x.t() @ x]
        if original_inputs is not None:
            drift = next(original_inputs) - x
            terms += [drift.sum(0), drift.t() @ x]
        terms = [term.double() for term in terms]
        sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
    mean, products, mean_drift, drift_products = (total / count for total in (*sums, *map(torch.zeros_like, sums))[:4])
    hessian = products - torch.outer(mean, mean)
    if not torch.isfinite(hessian + drift_products).all():
        raise UserError(f"the inputs of layer {name} are NaN or infinite on the calibration text; does the model work?")
    hessian, damping = damp(name, hessian)
    notes = []
    dead = int((products.diagonal() == 0).sum())
    if dead:
        notes.append(f"{name}: {dead} of {len(mean)} inputs are 0 on all the text; rounded to nearest")
    if damping > DAMPING:
        notes.append(f"{name}: its Hessian is not positive definite; damping raised from {DAMPING} to {damping:g}")
    return LayerInputs(mean, hessian, mean_drift, drift_products - torch.outer(mean_drift, mean), tuple(notes))


def damp(name: str, hessian: Tensor) -> tuple[Tensor, float]:
    """Adds to the diagonal, first DAMPING of its mean and then twice as much each time, until a Cholesky exists.

    Args:
        name: of the layer, for the error.
        hessian: symmetric, float64 [K, K].

    Returns:
        The damped Hessian, and how much of the mean was added. A Hessian of zeros gives the identity.

    Raises:
        UserError: no damping below MAX_DAMPING helped.
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
