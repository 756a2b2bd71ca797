"""What a model is worth and what it costs: perplexity, tokens per second, memory. The protocol, in one place.

Perplexity is exp of the mean negative log-likelihood, in nats a token. The text is cut into windows of the context
length, `stride` apart; each window scores the tokens that no window before it has scored, given those before them in
the window. With stride = context length the windows do not overlap, the cheapest and most pessimistic choice: a
window's first tokens have little to go by. Sums are float64.

Perplexity only asks how probable the one right token was, and what a change costs on some tokens it may win back on
others. So a quantized model is also held against the model it was made from, on the same tokens: the Kullback-Leibler
divergence KL(reference || model) = sum over tokens v of p(v) * (log p(v) - log q(v)), which is 0 only where nothing has
changed, and how often both models hold the same token for the most probable (top-1 agreement).
"""

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt.decode import DecodeStep, How, StepLogits, greedy_way, model_logits, read_prompts
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.sampling import GREEDY
from minigpt.scoring import Scorer


@dataclass(frozen=True)
class Score:
    """A perplexity and what it was computed from; beside it, how near the model is to its reference.

    Attributes:
        nats: sum of the negative log-likelihoods of the tokens scored.
        tokens_scored: how many.
        kl: mean over the tokens scored of KL(reference || model), in nats a token; None without a reference.
        top1: share of the tokens scored for which both hold the same token most probable; None without a reference.
    """

    nats: float
    tokens_scored: int
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens_scored); infinite where that is more than a float holds."""
        mean = self.nats / self.tokens_scored
        return math.exp(mean) if mean < 700 or math.isnan(mean) else math.inf


def check_windows(model: GPT, context_length: int, stride: int) -> None:
    """Raises UserError if `perplexity` cannot score a text with this model in such windows."""
    limit = model.config.n_positions
    if not 2 <= context_length <= limit:
        raise UserError(f"--context-length is {context_length}, it must be from 2 to {limit}, the model's n_positions")
    if not 1 <= stride <= context_length:
        raise UserError(f"--stride is {stride}, it must be from 1 to the context length {context_length}")


def window_sizes(model: GPT, context_length: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens in a window, and from one to the next: as asked for, or else as many as the model reads, side by side.

    Raises:
        UserError: this model cannot score a text so.
    """
    length = model.config.n_positions if context_length is None else context_length
    step = length if stride is None else stride
    check_windows(model, length, step)
    return length, step


def windows(n_tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, first): a window holds tokens begin..end-1 and scores tokens first..end-1.

    A token that begins a window has nothing to be predicted from there and is scored by no window but an earlier one.
    """
    scored = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context_length, n_tokens)
        if end - begin >= 2:
            yield begin, end, max(scored, begin + 1)
        scored = end
        if end == n_tokens:
            return


@torch.inference_mode()
def perplexity(
    model: GPT,
    tokens: Tensor,
    context_length: int,
    stride: int,
    batch_size: int = 1,
    label: str = "",
    reference: GPT | None = None,
) -> Score:
    """Scores a text.

    Args:
        model: in evaluation mode.
        tokens: int64 [N], the whole text, on the model's device.
        context_length: tokens in a window, at most the model's n_positions.
        stride: tokens from one window's begin to the next, at most context_length.
        batch_size: windows that go through the model at once.
        label: shown before the progress bar.
        reference: the model that this one was made from, on the same device, to hold it against.

    Raises:
        UserError: the text has fewer than two tokens, or a length or stride is out of range.
    """
    check_windows(model, context_length, stride)
    plan = list(windows(len(tokens), context_length, stride))
    if not plan:
        raise UserError(f"the text has {len(tokens)} token, too few to score")
    n_scored = sum(end - first for _, end, first in plan)
    # The sums stay on the device until the end: to read one is to wait for the GPU, which then waits for us.
    sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)  # negative log-likelihood, KL, agreements
    scorer = Scorer(model, reference)
    with tqdm(total=len(plan), desc=label, unit="window", leave=False, file=sys.stderr) as bar:
        # Windows of one shape go through together. Only a text's first and last one may differ from the others.
        for (_, skip), alike in itertools.groupby(plan, key=lambda w: (w[1] - w[0], w[2] - w[0])):
            begins = [(begin, end) for begin, end, _ in alike]
            for i in range(0, len(begins), batch_size):
                batch = torch.stack([tokens[begin:end] for begin, end in begins[i : i + batch_size]])  # [B, T]
                sums += scorer(batch, skip)
                bar.update(len(batch))
    nats, kl, agreements = sums.tolist()
    return Score(nats, n_scored) if reference is None else Score(nats, n_scored, kl / n_scored, agreements / n_scored)


@torch.inference_mode()
def scoring_rate(model: GPT, tokens: Tensor, length: int, batch_size: int, seconds: float = 3.0) -> float:
    """Tokens a second when scoring a text, as `perplexity` does: `batch_size` windows of `length` tokens at once.

    Args:
        model: in evaluation mode.
        tokens: int64 [N] with N >= length, on the model's device; a text with fewer windows is repeated.
        length: tokens in a window, at least 2.
        seconds: how long to measure, about.
    """
    batch = tokens[torch.arange(batch_size * length, device=tokens.device) % len(tokens)].view(batch_size, length)
    scorer = Scorer(model)
    if batch.is_cuda:
        scorer(batch, skip=1)  # a first call runs, and the second, which is not counted either, records
    times = _repeat(lambda: scorer(batch, skip=1), tokens.device, seconds)
    return batch.numel() / statistics.median(times)


@torch.inference_mode()
def prefill_rate(model: GPT, tokens: Tensor, length: int, seconds: float = 3.0, batch_size: int = 1) -> float:
    """Tokens a second when reading a prompt: `length` tokens at once, output layer for the last one only.

    Args:
        model: in evaluation mode.
        tokens: int64 [N] with N >= length, on the model's device.
        length: tokens at once.
        seconds: how long to measure, about.
        batch_size: prompts at once; the same one, as often. Tokens of all are counted.
    """
    prompt = tokens[:length].repeat(batch_size, 1)  # [B, T]
    times = _repeat(lambda: model.lm_head(model.hidden(prompt)[:, -1]), prompt.device, seconds)
    return prompt.numel() / statistics.median(times)


@torch.inference_mode()
def decode_rate(
    model: GPT,
    tokens: Tensor,
    prompt_length: int,
    max_new_tokens: int,
    seconds: float = 5.0,
    batch_size: int = 1,
    how: How = "captured",
    step_logits: StepLogits | None = None,
) -> float:
    """Tokens a second when writing: greedy, KV cache, after a prompt; the prompt's own time not counted.

    Args:
        model: in evaluation mode.
        tokens: int64 [N], whose first prompt_length are the prompt.
        prompt_length: where in the sequence writing begins, at least 1.
        max_new_tokens: how many to write at most, at least 1; prompt_length + max_new_tokens <= n_positions. Then
            again from the prompt on.
        seconds: how long to measure, about.
        batch_size: sequences at once, all with the same prompt. Tokens of all are counted.
        how, step_logits: how a step is computed, see `minigpt.decode`.
    """
    prompts = [tokens[:prompt_length].tolist()] * batch_size
    logits, cache = read_prompts(model, prompts, max_new_tokens)
    positions = torch.full((batch_size, 1), prompt_length, device=tokens.device)
    step_logits = step_logits or model_logits(model)
    step = DecodeStep(*greedy_way(step_logits), cache, GREEDY.choose(logits), positions, how)
    return step_rate(step, prompt_length, prompt_length + max_new_tokens, seconds)


@torch.inference_mode()
def step_rate(step: DecodeStep, begin: int, end: int, seconds: float = 5.0) -> float:
    """Tokens a second of a decode step, those of all its sequences.

    A run of up to 16 steps is timed at once on a GPU, where `generate` does not wait for each either; on a CPU every
    step. The median counts.

    Args:
        step: its positions are set, and left somewhere.
        begin, end: it is timed at positions begin..end-1, then again from begin on.
        seconds: how long to measure, about.
    """
    n_steps = min(16, end - begin) if step.tokens.is_cuda else 1
    begins = itertools.cycle(range(begin, end - n_steps + 1, n_steps))

    def run() -> None:
        """Makes n_steps steps from the next position on."""
        step.positions.fill_(next(begins))
        for _ in range(n_steps):
            step()

    return len(step.tokens) * n_steps / statistics.median(_repeat(run, step.tokens.device, seconds))


def copy_bandwidth(device: torch.device) -> float:
    """The memory ceiling: bytes read plus bytes written per second by large copies within a device's memory."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**27, dtype=torch.float16, device=device)  # 1 GiB
    target = torch.empty_like(source)
    n_copies = 8 if device.type == "cuda" else 1  # a run is then long beside the time that starting it takes

    def run() -> None:
        """Copies n_copies times."""
        for _ in range(n_copies):
            target.copy_(source)

    return 2 * n_copies * source.nbytes / statistics.median(_repeat(run, device, 0.5))


def _repeat(function: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds that each of several calls took, after one that is not counted."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 100 and (len(times) < 3 or time.perf_counter() - start < seconds):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return times[1:]


class PeakMemory:
    """Watches memory from its creation on: a GPU's allocations, or, on Linux, the resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # what is no longer used should not count, nor be reused unseen
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc keeps freed memory for later, unless told to give it back
                libc.malloc_trim(0)
            with contextlib.suppress(OSError):  # where /proc is read-only, what came before counts as well
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark

    def read(self) -> int | None:
        """The most bytes in use at once so far; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmHWM"].split()[0]) * 1024 if "VmHWM" in fields else None
