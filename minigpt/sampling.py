"""How the next token is chosen: the likeliest, or a draw from the likely ones.

Nothing here waits for the GPU, so that choosing can be part of a captured decode step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """A way to choose a token, given the scores of all.

    Attributes:
        temperature: 0 takes the best token (greedy); else draws from softmax(logits / temperature).
        top_k: draws among the k best tokens only (Fan et al. 2018, "Hierarchical Neural Story Generation").
        top_p: draws from the nucleus only: the fewest tokens, best first, whose probabilities sum to at least top_p
            (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", section 3.1). With top_k, of those.

    Raises:
        UserError: a number out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}, it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}, it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}, it must be more than 0 and at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each sequence: [B, V] -> int64 [B, 1]."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return draw(self.probabilities(logits), generator)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What `choose` draws from, if the temperature is not 0: [B, V] -> [B, V], 0 for tokens left out.

        Tokens that score the same as the last one taken are taken as well. In float32 at least.
        """
        # A smaller temperature would overflow, and choose no differently.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / max(self.temperature, 1e-6)
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]  # [B, 1]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            best_first = logits.sort(-1, descending=True).values  # [B, V]
            p = best_first.softmax(-1)  # [B, V]
            before = p.cumsum(-1) - p  # [B, V], the sum over the better tokens: a token is needed if it is too small
            nucleus = max(self.top_p, torch.finfo(p.dtype).tiny)  # less is 0, and would leave out the best token, too
            last = best_first.masked_fill(before >= nucleus, torch.inf).amin(-1, keepdim=True)  # [B, 1]
            logits = logits.masked_fill(logits < last, -torch.inf)
        return logits.softmax(-1)


GREEDY = Sampling()


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws a token with the probabilities given: [B, V] -> int64 [B, 1].

    A race: token i finishes after a time drawn from the exponential distribution with rate p_i, which is Exp(1) / p_i,
    and is the first with probability p_i. (Gumbel 1954's argmax(log p + Gumbel noise) without the logarithms: minus
    the log of an Exp(1) is Gumbel noise.) One pass and no sums, where torch.multinomial may make the host wait.
    """
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / times).argmax(-1, keepdim=True)
