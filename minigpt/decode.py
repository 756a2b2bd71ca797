"""The decode step: one token for each sequence, again and again, without the host in the loop.

A step at batch 1 is a few hundred kernels of a few microseconds each. Launched one by one from Python, the GPU waits
for the host most of the time. So a step is made of tensors that stay where they are: it reads the last token and its
position, chooses the next one on the GPU, writes it where the last one was, and counts the position up. All of it is
captured once in a CUDA graph, and a step is then one launch. The host reads the tokens a step behind.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minigpt.model import GPT, KVCache
from minigpt.sampling import GREEDY

# tokens [B, 1] and their positions [B, 1], int64, and the cache, which they are added to -> logits of the next [B, V]
StepLogits = Callable[[Tensor, Tensor, KVCache], Tensor]

# eager: kernels launched one by one. captured: as a CUDA graph. compiled: by torch.compile, then captured.
How = Literal["eager", "captured", "compiled"]

# What torch's compiler can do beyond its defaults. The first tunes the kernels that it writes, and lets it write those
# for attention and for matrix times vector itself; the second tries its own matmuls beside cuBLAS's.
COMPILER_TUNING = ("coordinate_descent_tuning", "max_autotune")


def model_logits(model: GPT) -> StepLogits:
    """The model as it is. Faster steps for one token have the same arguments and the same result."""

    def step_logits(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The model's own logits, see `StepLogits`."""
        return model.lm_head(model.hidden(tokens, cache, positions)[:, -1])  # [B, V]

    return step_logits


def attention_in_parts(step_logits: StepLogits) -> StepLogits:
    """The same step with attention as plain operations, and not as torch's own kernel for it.

    That is what a compiler can fuse: it cannot look into a kernel. For one token it is as good. (As gpt-fast does,
    github.com/meta-pytorch/gpt-fast.) And on a CPU the kernel takes three times as long in bfloat16.
    """

    def step(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`step_logits`, within."""
        with sdpa_kernel(SDPBackend.MATH):
            return step_logits(tokens, positions, cache)

    return step


def compiled_logits(step_logits: StepLogits, tuning: Sequence[str] = COMPILER_TUNING) -> StepLogits:
    """A step made by torch.compile, once, at its first call; the graph to replay it from is `DecodeStep`'s.

    Call it under `torch.inference_mode`, as DecodeStep does: it would be compiled anew elsewhere. For caches of several
    lengths it is compiled once as well, if `torch._dynamo.mark_dynamic(tensor, 2)` has been said of each k and v.

    Args:
        step_logits: what to compile.
        tuning: those of COMPILER_TUNING that the compiler is to do; each takes it longer.
    """
    torch.compiler.reset()  # it refuses to compile one function for too many models; captured steps are safe
    options: dict[str, str | int | bool | Callable[..., object]] = dict.fromkeys(tuning, True)
    return attention_in_parts(torch.compile(step_logits, fullgraph=True, dynamic=False, options=options))


def greedy_way(step_logits: StepLogits) -> tuple[StepLogits, Callable[[Tensor], Tensor]]:
    """The fastest way to the likeliest tokens, as the first two arguments of `DecodeStep`.

    A step may have a method `greedy`, which gives the tokens themselves, int64 [B, 1]; else they are looked for among
    its logits.
    """
    greedy: StepLogits | None = getattr(step_logits, "greedy", None)
    return (greedy, lambda tokens: tokens) if greedy else (step_logits, GREEDY.choose)


def read_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """Reads prompts into a cache, all at once.

    Short ones are padded on the right. Nothing sees the padding: a prompt's tokens look only to the left, and a new
    token is written over it before any looks there.

    Args:
        model: in evaluation mode.
        prompts: B lists of tokens, of at least one each and at most n_positions.
        max_new_tokens: room for as many in the cache, or as many as the model can read.

    Returns:
        the logits of each prompt's next token, [B, V], and the cache.
    """
    weight = model.wpe.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)  # [B]
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=weight.device)
    room = -(-(longest + max_new_tokens) // 64) * 64  # attention kernels like round lengths
    cache = KVCache(model.config, len(prompts), min(room, model.config.n_positions), weight.dtype, weight.device)
    hidden = model.hidden(tokens, cache)  # [B, T, C]
    return model.lm_head(hidden[cache.rows[:, 0], lengths - 1]), cache


class DecodeStep:
    """A step that feeds itself: called again and again, it writes a token further each time.

    On a CPU there is nothing to capture: a step simply runs.

    Attributes:
        tokens: int64 [B, 1], the last token of each sequence, read and replaced by a step.
        positions: int64 [B, 1], where it stands; a step adds 1. Whoever calls keeps them below the model's n_positions
            and the cache's length, and may write to them between steps.
    """

    def __init__(
        self,
        step_logits: StepLogits,
        choose: Callable[[Tensor], Tensor],
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        how: How = "captured",
        generator: torch.Generator | None = None,
    ) -> None:
        """Captures a step; tokens, positions and generator are afterwards as they were.

        Args:
            step_logits: computes the logits, see `StepLogits`. It may not make the host wait for the GPU.
            choose: the next tokens by their logits, [B, V] -> int64 [B, 1]. Neither may this.
            cache: of the sequences so far; capturing writes to it at `positions`, as the first step will.
            tokens, positions: int64 [B, 1], what the first step reads.
            how: see `How`.
            generator: the one that `choose` draws from, if it draws: a graph must know, to go on in its numbers.
        """
        self.step_logits, self.choose, self.cache = step_logits, choose, cache
        self.tokens, self.positions = tokens.clone(), positions.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if how == "compiled":
            self.step_logits = compiled_logits(step_logits)
        elif not tokens.is_cuda and cache.k[0].dtype == torch.bfloat16:
            self.step_logits = attention_in_parts(step_logits)
        if how != "eager" and tokens.is_cuda:
            self._capture(generator)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Makes a step; on a GPU, asks for it. Returns `tokens`, which the next step overwrites: int64 [B, 1]."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.tokens

    def _run(self) -> None:
        logits = self.step_logits(self.tokens, self.positions, self.cache)  # [B, V]
        self.tokens.copy_(self.choose(logits))
        self.positions.add_(1)

    @torch.inference_mode()
    def _capture(self, generator: torch.Generator | None) -> None:
        """Runs a step once, on a stream of its own as CUDA graphs want it, so that what happens at a first call (a
        kernel compiled, a workspace allocated) is over; then records one."""
        tokens, positions = self.tokens.clone(), self.positions.clone()
        if generator:
            random_state = generator.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        graph = torch.cuda.CUDAGraph()
        if generator:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):  # nothing runs here, it is only recorded
            self._run()
        if generator:
            generator.set_state(random_state)
        self.graph = graph


def read_behind(steps: Iterable[Tensor]) -> Iterator[list[int]]:
    """Reads each step's tokens on the host, but only once the next step has been launched: the GPU never waits.

    Args:
        steps: gives int64 [B, 1] a step, maybe the same memory each time. On a CPU, where a step is over when it
            returns, they are read at once.

    Yields:
        the B tokens of a step.
    """
    behind: list[tuple[Tensor, torch.cuda.Event]] = []
    for tokens in steps:
        if not tokens.is_cuda:
            yield tokens.flatten().tolist()
            continue
        # Into pinned memory, the only kind that a GPU writes to by itself; the event says when it has done so.
        behind.append((tokens.to("cpu", non_blocking=True), torch.cuda.Event()))
        behind[-1][1].record()
        if len(behind) == 2:
            yield _wait(*behind.pop(0))
    for copy, copied in behind:
        yield _wait(copy, copied)


def _wait(copy: Tensor, copied: torch.cuda.Event) -> list[int]:
    copied.synchronize()
    return copy.flatten().tolist()
