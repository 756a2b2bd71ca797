"""The forward pass that scores some windows of a text: its sums, and on a GPU how it is kept from waiting for Python.

The output layer is half of the work at GPT-2's size, and 50,257 rows are an awkward number: where a row of logits in
fp16 does not begin at a multiple of 16 bytes, cuBLAS falls back to a kernel for sm_75, GPUs of 2018. On an H200 1,280
tokens of GPT-2 124M take it 1,127 microseconds; with rows of nothing added, up to 50,304, it takes 155 (results/
attempts.json; that only the memory of the logits is laid out for longer rows does not help). So rows are added, and
their logits have minus infinity for a bias, to which softmax gives the probability 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import GPT
from minigpt.quantization.linear import exact_on_cpu

# How many logits are computed at once, [tokens, vocabulary] together: enough to keep a GPU busy (in float32, 256 MB),
# and few enough for a CPU's cache (8 MB).
LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**21}
ALIGNED = 64  # rows of the output layer are a multiple of this


class Scorer:
    """Scores batches of windows by a model, and holds it against a reference if there is one.

    On a GPU the first batch of a shape simply runs, so that all that happens once (kernels compiled, workspaces
    allocated) is over; the second is recorded in a CUDA graph, which all others replay.
    """

    def __init__(self, model: GPT, reference: GPT | None = None) -> None:
        """model, reference: in evaluation mode, on one device, and not changed as long as this is used."""
        self.models = [model] if reference is None else [model, reference]
        with torch.inference_mode():
            self.outputs = [OutputLayer(each) for each in self.models]
        self.recorded: dict[tuple[torch.Size, int], Recording | None] = {}  # None: has run once

    @torch.inference_mode()
    def __call__(self, batch: Tensor, skip: int) -> Tensor:
        """Sums over the tokens of some windows, all but the first `skip` >= 1 of each: int64 [B, T] -> float64 [3].

        They are the negative log-likelihood, KL(reference || model) and the agreements; without a reference, the last
        two are 0.
        """
        key = (batch.shape, skip)
        if not batch.is_cuda or key not in self.recorded:
            self.recorded[key] = None
            with exact_on_cpu():
                return sums_of(self.models, self.outputs, batch, skip)
        recording = self.recorded[key] or Recording(self.models, self.outputs, batch, skip)
        self.recorded[key] = recording
        return recording.replay(batch)


class Recording:
    """A pass in a CUDA graph."""

    def __init__(self, models: list[GPT], outputs: list["OutputLayer"], batch: Tensor, skip: int) -> None:
        """Records, and runs nothing. Arguments as in `sums_of`."""
        self.batch = batch.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.sums = sums_of(models, outputs, self.batch, skip)

    def replay(self, batch: Tensor) -> Tensor:
        """The sums for a batch of the same shape."""
        self.batch.copy_(batch)
        self.graph.replay()
        return self.sums.clone()


def sums_of(models: list[GPT], outputs: list["OutputLayer"], batch: Tensor, skip: int) -> Tensor:
    """As `Scorer` says, for a model, or a model and its reference, and their output layers.

    Logits are many (GPT-2 has 50,257 for a token), so they are computed for some tokens at a time.
    """
    hidden = [model.hidden(batch)[:, skip - 1 : -1].flatten(0, 1) for model in models]  # [S, C], S = B (T - skip)
    targets = batch[:, skip:].flatten()  # [S]
    sums = torch.zeros(3, dtype=torch.float64, device=batch.device)
    n_vocab = models[0].config.vocab_size
    rows = max(128, LOGITS_AT_ONCE[batch.device.type] // n_vocab // 128 * 128)  # whole matmul tiles
    for i in range(0, len(targets), rows):
        # log_softmax converts as it reads, so that no float32 copy of the logits is made. Each [rows, V].
        logs = [
            layer(part[i : i + rows]).log_softmax(-1, dtype=torch.float32)[:, :n_vocab]
            for layer, part in zip(outputs, hidden, strict=True)
        ]
        sums[0] -= logs[0].gather(1, targets[i : i + rows, None]).sum(dtype=torch.float64)
        if len(logs) == 2:
            log_q, log_p = logs
            sums[1] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums


class OutputLayer:
    """A model's output layer for many tokens: its weight written out in the model's dtype once, with aligned rows.

    Not in float32, which is for CPUs: there a quantized layer multiplies faster than a matrix four times as large.
    """

    def __init__(self, model: GPT) -> None:
        """model: in evaluation mode."""
        self.layer: nn.Module = model.lm_head
        self.written_out = model.wpe.weight.dtype != torch.float32
        if self.written_out:
            self.weight, self.bias = align(model.lm_head.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[S, C] -> logits [S, V], or more than V with those too many minus infinity."""
        return F.linear(hidden, self.weight, self.bias) if self.written_out else self.layer(hidden)


def align(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An output layer [V, C] with rows added up to a multiple of ALIGNED, and a bias that gives them no probability."""
    too_many = -len(weight) % ALIGNED
    bias = F.pad(weight.new_zeros(len(weight)), (0, too_many), value=-torch.inf)
    return F.pad(weight, (0, 0, 0, too_many)), bias
