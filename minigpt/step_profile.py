"""Where the microseconds of a decode step go: to which parts of the model, and to nothing at all.

Hooks leave a mark wherever the computation passes from one part of the model to another. On a CPU a mark is a reading
of the clock. On a GPU, which computes long after the host has asked for it, a mark is a kernel that does nothing, put
between the others and captured with them: torch's profiler lists the kernels of a replay in the order in which they
ran, and each belongs to the mark before it. The time of a whole step is taken without marks and profiler; what the
kernels do not fill of it are gaps.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minigpt import evaluate
from minigpt.decode import DecodeStep, How, StepLogits, greedy_way
from minigpt.files import Row
from minigpt.model import GPT, KVCache
from minigpt.table import format_table

MARK = "spin_kernel"  # what torch.cuda._sleep launches, and nothing else does
N_STEPS = 20  # looked at, or as many as the cache is long
GAPS = "gaps"
BEFORE, AFTER = "cache mask", "sampling"  # what is outside of all modules, before and after the output layer
PARTS = {  # by a module's name in its block or in the model
    "wte": "embedding",
    "wpe": "embedding",
    "ln_1": "LayerNorm",
    "ln_2": "LayerNorm",
    "ln_f": "LayerNorm",
    "attn": "attention",
    "attn.c_attn": "attn.c_attn",
    "attn.c_proj": "attn.c_proj",
    "mlp": "GELU",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
    "": "residual sums",  # what a block does itself
    "lm_head": "output layer",
}
KERNELS = {  # what the fused kernels of lessons 18 to 20 compute
    "embed_kernel": "embedding",
    "fused_kernel": "linear layers, fused",
    "attention_kernel": "attention",
    "output_kernel": "output layer",
    "pick_kernel": AFTER,
}


class Kernel(NamedTuple):
    """A kernel that ran on a GPU: its name, and from when to when, in microseconds."""

    name: str
    begin: float
    end: float


class Marks:
    """The marks of one step, the latest: each says which part of the model is computed from there on.

    Attributes:
        parts: a name for each mark.
        times: when each was made, by the host's clock, in seconds.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.parts: list[str] = []
        self.times: list[float] = []
        self._on_gpu = on_gpu

    def begin(self) -> None:
        """Starts a step, and forgets the one before."""
        self.parts, self.times = [], []
        self.add(BEFORE)

    def add(self, part: str) -> None:
        """Makes a mark."""
        self.parts.append(part)
        self.times.append(time.perf_counter())
        if self._on_gpu:
            torch.cuda._sleep(1)


@contextmanager
def hooked(model: GPT, marks: Marks) -> Iterator[None]:
    """While in it, a module of `model` that is called marks itself, and, when it is done, the one that called it."""
    names = {module: PARTS[name] for name, module in model.named_children() if name in PARTS}
    for block in model.h:
        names |= {module: PARTS[name] for name, module in block.named_modules() if name in PARTS}
    around = [BEFORE]  # what is being computed, the innermost last

    def enter(module: nn.Module, _: object) -> None:
        """A module begins: what comes now is its."""
        around.append(names[module])
        marks.add(around[-1])

    def leave(module: nn.Module, _: object, __: object) -> None:
        """A module ends: what comes now is of the one around it."""
        around.pop()
        marks.add(AFTER if module is model.lm_head else around[-1])

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def profile_step(model: GPT, step_logits: StepLogits, cache: KVCache, how: str) -> dict[str, float]:
    """Microseconds of a greedy decode step by part.

    On a GPU those of the gaps are there too, under GAPS, and all add up to the whole step. A CPU has none: a part
    includes what Python takes between its operations.

    Args:
        model: in evaluation mode.
        step_logits: `model_logits(model)`, or a step whose parts are its kernels and no modules (`how` is fused).
        cache: of L >= 1 tokens; the steps are taken at its end.
        how: eager, captured or fused.
    """
    batch_size, _, length, _ = cache.k[0].shape
    device = cache.k[0].device
    n_steps = min(N_STEPS, length)
    tokens = torch.zeros((batch_size, 1), dtype=torch.int64, device=device)
    positions = torch.full_like(tokens, length - n_steps)

    def make(step_logits: StepLogits, how: How) -> DecodeStep:
        """A greedy step over the same cache."""
        return DecodeStep(*greedy_way(step_logits), cache, tokens, positions, how)

    marks = Marks(device.type == "cuda")

    def marked(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`step_logits`, with the marks of a new step."""
        marks.begin()
        return step_logits(tokens, positions, cache)

    if device.type != "cuda":
        with hooked(model, marks):
            return per_step(by_clock(make(marked, "eager"), marks, n_steps), n_steps)
    step = make(step_logits, "eager" if how == "eager" else "captured")
    whole = 1e6 * batch_size / evaluate.step_rate(step, length - n_steps, length, seconds=0.5)
    if how == "fused":
        step.positions.copy_(positions)
        parts = per_step(by_kernel(replay(step, n_steps)), n_steps)
    else:
        with hooked(model, marks):
            step = make(marked, "captured")  # also if it is eager: the kernels are the same
        parts = per_step(by_mark(replay(step, n_steps), marks.parts), n_steps)
    return parts | {GAPS: max(0.0, whole - sum(parts.values()))}


def per_step(spent: dict[str, float], n_steps: int) -> dict[str, float]:
    """What one step of n_steps took."""
    return {part: microseconds / n_steps for part, microseconds in spent.items()}


def by_clock(step: DecodeStep, marks: Marks, n_steps: int) -> dict[str, float]:
    """Microseconds by part of all of n_steps steps on a CPU, after one that does not count."""
    spent: dict[str, float] = defaultdict(float)
    step()
    step.positions.sub_(1)
    for _ in range(n_steps):
        step()
        times = [*marks.times, time.perf_counter()]
        for part, begin, end in zip(marks.parts, times, times[1:], strict=False):
            spent[part] += 1e6 * (end - begin)
    return spent


def replay(step: DecodeStep, n_steps: int) -> list[Kernel]:
    """The kernels of n_steps captured steps on a GPU, in the order in which they began."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(n_steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(kernels, key=lambda kernel: kernel.begin)


def durations(kernels: Sequence[Kernel]) -> Iterator[tuple[Kernel, float]]:
    """Yields each kernel with its microseconds; while several run, the time is the earliest one's."""
    busy_until = -math.inf
    for kernel in kernels:
        yield kernel, max(0.0, kernel.end - max(kernel.begin, busy_until))
        busy_until = max(busy_until, kernel.end)


def by_mark(kernels: Sequence[Kernel], parts: Sequence[str]) -> dict[str, float]:
    """Microseconds by part of steps with a mark before each part, `parts` naming those of one step in order."""
    spent: dict[str, float] = defaultdict(float)
    n_marks = 0
    for kernel, microseconds in durations(kernels):
        if MARK in kernel.name:
            n_marks += 1
        elif n_marks:
            spent[parts[(n_marks - 1) % len(parts)]] += microseconds
    if n_marks == 0 or n_marks % len(parts):
        raise RuntimeError(f"the profiler saw {n_marks} marks, where each step has {len(parts)}")
    return spent


def by_kernel(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds by part of steps whose parts are kernels; torch's own choose the token."""
    spent: dict[str, float] = defaultdict(float)
    for kernel, microseconds in durations(kernels):
        torchs = "::" in kernel.name or kernel.name.startswith(("Memcpy", "Memset"))
        spent[AFTER if torchs else KERNELS.get(kernel.name, kernel.name)] += microseconds
    return spent


def format_profile(rows: Sequence[Row]) -> str:
    """A table of microseconds: parts down, ways across; the last line is the whole step."""
    columns = {(row["weights"], row["embedding"], row["how"]): f"{row['weights']} {row['how']}" for row in rows}
    if len(set(columns.values())) < len(columns):  # several embeddings
        columns = {key: f"{label}, {key[1]} embedding" for key, label in columns.items()}
    table: dict[str, dict[tuple[str, str, str], float]] = {}
    for row in sorted(rows, key=lambda row: row["part"] == GAPS):  # the gaps last
        table.setdefault(row["part"], {})[row["weights"], row["embedding"], row["how"]] = row["microseconds"]
    cells = [[part, *(f"{line[key]:,.1f}" if key in line else "" for key in columns)] for part, line in table.items()]
    wholes = [sum(line.get(key, 0.0) for line in table.values()) for key in columns]
    cells.append(["whole step", *(f"{whole:,.1f}" for whole in wholes)])
    return format_table(["microseconds", *columns.values()], cells)
