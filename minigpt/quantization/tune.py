"""Tuning: adjusts an int4 model until its predictions come as close as they can to those of the model it was made from.

Every other method looks at one layer at a time and asks how far its weights or outputs are off. But what is lost in one
layer can be made up for in another. So here all of them are trained together, a few hundred steps of Adam, on one
number: how far the int4 model's distribution q of the next token is from the FP model's p,

    KL(p || q) = sum over the vocabulary of p (log p - log q)        in nats, mean over positions

which is what distillation minimises (Hinton et al. 2015, arXiv 1503.02531). The text's own next token plays no part:
the FP model has a divergence of 0 and nothing can have less, so int4 cannot get ahead of it by learning the text. For
the same reason an FP control needs no measuring: tuned in the same way it stays where it is (a test shows it).

What is adjusted, and how a whole number can be learned at all:

    codes    each has a position, a real number that is rounded to give the code. The rounding's derivative is taken to
             be 1 (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), as LSQ (Esser et al. 2019,
             arXiv 1902.08153) and EfficientQAT (Chen et al. 2024, arXiv 2407.11062) do. A position starts where the FP
             weight lies, but not beyond its code's cell, nor quite at the edge: tuning starts from exactly the model
             that it was given, and what GPTQ rounded the other way, on purpose, must be pushed to come back.
    scales   by a factor that starts at 1; rounded to fp16 at each step, as they are stored.
    biases and LayerNorms, as they are.

The zeros, the embeddings and the format stay untouched: what comes out is a plain int4 checkpoint.

Measured (results/quantizers.json) on the demo model with 150 steps of 4 windows of 128 tokens (a minute on one CPU
core), KL divergence on a quarter of its test text: at groups of 128 absmax 0.0222 -> 0.0173, mse 0.0200 -> 0.0149, GPTQ
0.0106 -> 0.0095; GPTQ at 64 0.0092 -> 0.0080, at 32 0.0073 -> 0.0063. So start from GPTQ, or better. On other windows
of the text tuned on, up to twice as much is gained, part of it because they overlapped with those: the wider the text,
the better. Starting from GPTQ, scales and offsets (biases and LayerNorms) make most of the gain (on such windows 0.0083
-> 0.0072, with codes 0.0071); a third of their step sizes gives the same.

The codes' step size decides how much more there is to gain. GPTAQ, groups of 128, on a model of 124M parameters, with
windows of 1024 tokens: 1000 steps give 0.00071 with codes that hardly move (0.5e-3 a step), 0.00066 with 2e-3. On
another training of that model GPTAQ alone has 0.00089, 300 steps with 1.7e-3 give 0.00074; with 5e-3 noise changes so
many codes that no step is better than the start, and 1000 steps with scales and offsets three times as fast get no
further than 0.00076. The demo bears 5e-3. Zeros with positions, too, were tried, and none of them changed.

More steps give more, slowly. GPTAQ, tuned, as a share of plain GPTQ's divergence: 0.64 after 300 steps, 0.58 after
1000, 0.54 after 2500, 0.51 after 5200, each on another training of that model; the latter three are 0.47, 0.45 and 0.42
of that of the library GPTQModel's GPTQ. While the step size is large, noise takes the divergence above where it began,
in 5200 steps to twice as much; it falls as the step size does. So `code_rate` makes that smaller the more steps there
are. From YAQA, which alone has 0.54, 6500 steps lead to 0.40 (0.46 to 0.48 predicted; on an H200 nine minutes, two and
a half of them YAQA's). (On the demo, 1600 steps end at 0.0041 with 1.2e-3 as with 2.5e-3.) Averaging parameters over
some 200 steps instead, with a constant step size, gets as far and no further. Nor is it better to begin with real
numbers for codes, at the FP weights, and to bring each a little nearer to a whole number after every step: on the demo
400 steps end at 0.0109 so, where 400 of these end at 0.0050 (windows of 128 tokens). A better start is worth something
to the end: from YAQA instead of GPTAQ they end at 0.0047, and 1600 at 0.0039.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kernels import MAX_CODE, pack_weight, unpack_weight
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.linear import Int4Linear

STEPS = 300
BATCH_SIZE = 8  # windows a step
# Adam moves a parameter by about its step size, at most, whatever the size of the gradient.
CODE_RATE = 2e-3  # peak step size of a position, at most; see `code_rate`
SCALE_RATE = 1e-3  # peak step size of the factor of a scale
OFFSET_RATE = 3e-4  # peak step size of biases and LayerNorms
BETAS = (0.9, 0.99)
EPSILON = 1e-12  # far below a position's gradient, which in a model of a hundred million weights is about 1e-8
WARMUP = 0.05  # share of the steps in which the rates rise
VALIDATIONS = 10  # how often the held-back windows are looked at
MAX_HELD_BACK = 32  # windows
EMBEDDINGS = ("wte", "wpe", "lm_head")  # what is not tuned
EDGE = 0.45  # how far from a code its position may start; at 0.5 begins the next one's cell


@dataclass(frozen=True)
class TuningReport:
    """What tuning did.

    Attributes:
        steps: how many were taken.
        best_step: after how many of them the divergence was lowest; the model is as it was then. 0: nothing helped.
        kl_before, kl_after: divergence from the FP model on the windows held back, in nats a token.
        codes_changed: share of the weights whose code is another one now.
    """

    steps: int
    best_step: int
    kl_before: float
    kl_after: float
    codes_changed: float

    def describe(self) -> str:
        """All of it in a line."""
        return (
            f"tuning: KL divergence {self.kl_before:.5f} -> {self.kl_after:.5f} on text held back, best after "
            f"{self.best_step} of {self.steps} steps; {100 * self.codes_changed:.2f}% of the codes changed"
        )


class TunableInt4Linear(nn.Module):
    """An Int4Linear whose weight can be differentiated. It computes with the weight that int4 would have.

    Attributes:
        position: float32 [out_features, in_features / group_size, group_size]; rounded, it is the code.
        stretch: float32 [out_features, in_features / group_size]; times `start_scales`, in fp16, it is the scale.
        start_scales, zeros: float32 [out_features, in_features / group_size].
        bias: float32 [out_features].
    """

    def __init__(self, layer: Int4Linear, weight: Tensor) -> None:
        """weight: floating [out_features, in_features], what the layer was quantized from."""
        super().__init__()
        self.start_scales: Tensor
        self.zeros: Tensor
        codes, scales, zeros = (each.float() for each in unpack_weight(layer.weight))
        codes = codes.unflatten(1, (-1, layer.group_size))  # [N, K/group_size, group_size]
        exact = weight.detach().float().view_as(codes) / scales[..., None] + zeros[..., None]
        self.position = nn.Parameter(exact.clamp(codes - EDGE, codes + EDGE))
        self.stretch = nn.Parameter(torch.ones_like(scales))
        self.register_buffer("start_scales", scales)
        self.register_buffer("zeros", zeros)
        self.bias = nn.Parameter(layer.bias.detach().float())

    def codes(self) -> Tensor:
        """float32 [out_features, in_features / group_size, group_size], whole numbers 0..15."""
        return straight_through(self.position, self.position.round().clamp(0, MAX_CODE))

    def scales(self) -> Tensor:
        """float32 [out_features, in_features / group_size], as fp16 can hold them."""
        scales = self.start_scales * self.stretch
        return straight_through(scales, scales.half().float())

    def forward(self, x: Tensor) -> Tensor:
        """x: float32, or as autocast has it, [..., in_features] -> [..., out_features]."""
        weight = (self.codes() - self.zeros[..., None]) * self.scales()[..., None]
        return F.linear(x, weight.flatten(1), self.bias)

    @torch.no_grad()
    def to_int4(self) -> Int4Linear:
        """The layer packed again."""
        return Int4Linear(pack_weight(self.codes().flatten(1), self.scales().half(), self.zeros), self.bias.half())


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, with the derivative of `x`."""
    return rounded.detach() + (x - x.detach())


def tune(
    model: GPT, reference: GPT, windows: Tensor, steps: int = STEPS, batch_size: int = BATCH_SIZE, seed: int = 0
) -> TuningReport:
    """Tunes a model in place. Whatever happens, it ends as the best int4 model seen: at worst as it was given.

    Args:
        model: float32, in evaluation mode, its blocks' linear layers Int4Linear, by whichever method. (A model without
            any would have its biases and LayerNorms tuned: the FP control.)
        reference: the FP model that it was made from, float32, in evaluation mode, on the same device.
        windows: int64 [n, T], calibration text, on any device. The last `n_held_back` of them are held back to
            validate on; they should share no token with the others (`calibration.load_calibrations` sees to that).
            Of too little text, tuning learns the peculiarities.
        steps: updates. Each reads batch_size windows.
        batch_size: windows at a time.
        seed: for the order of the windows.

    Raises:
        UserError: steps is less than 1, or the divergence is NaN or infinite.
        ValueError: there is only one window.
    """
    check_steps(steps)
    if len(windows) < 2:
        raise ValueError(f"tuning needs at least 2 windows, one of them to validate on; there is {len(windows)}")
    windows = windows.to(model.wte.weight.device)
    cut = len(windows) - n_held_back(len(windows))
    training, held_back = windows[:cut], windows[cut:]  # the first ones, methods may have seen
    layers = make_tunable(model, reference)
    codes_before = {name: layer.codes().to(torch.uint8) for name, layer in layers.items()}
    best_step, best_state = 0, snapshot(model)
    optimizer = make_optimizer(model, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    try:
        with tensor_float_32(), tqdm(total=steps, desc="tuning", unit="step", mininterval=1.0) as bar:
            kl_before = best = validate(model, reference, held_back, batch_size)
            for step, batch in enumerate(draw(training, steps, batch_size, seed), start=1):
                differentiate(model, reference, batch)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
                if step % max(1, steps // VALIDATIONS) == 0 or step == steps:
                    kl = validate(model, reference, held_back, batch_size)
                    bar.set_postfix_str(f"KL {kl:.5f}, at the start {kl_before:.5f}")
                    if kl < best:
                        best_step, best, best_state = step, kl, snapshot(model)
    finally:  # also after an error or Ctrl-C
        restore(model, best_state)
        changed = sum((layer.codes() != codes_before[name]).sum().item() for name, layer in layers.items())
        for name, layer in layers.items():
            model.set_submodule(name, layer.to_int4())
    weights = sum(codes.numel() for codes in codes_before.values())
    return TuningReport(steps, best_step, kl_before, best, changed / max(1, weights))


def n_held_back(n_windows: int) -> int:
    """How many of so many windows, two or more, are held back to validate on: an eighth, at most MAX_HELD_BACK."""
    return min(MAX_HELD_BACK, -(-n_windows // 8))


def check_steps(steps: int) -> None:
    """Raises UserError unless there is at least one."""
    if steps < 1:
        raise UserError(f"--steps is {steps}, it must be at least 1")


def make_tunable(model: GPT, reference: GPT) -> dict[str, TunableInt4Linear]:
    """Replaces a model's Int4Linear layers, and marks what is to be tuned by requires_grad; all else is frozen."""
    model.requires_grad_(False)
    layers = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int4Linear):
            layers[name] = TunableInt4Linear(layer, reference.get_parameter(f"{name}.weight"))
            model.set_submodule(name, layers[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(EMBEDDINGS))
    return layers


def make_optimizer(model: GPT, steps: int) -> torch.optim.Adam:
    """Adam (Kingma & Ba 2015) without weight decay, a step size for each kind of parameter, for so many steps.

    Of the gradient of one weight most is noise, the same in every direction over time. What changes a code is what
    stays: small steps, that it takes hundreds of to reach the next one.
    """
    rates = {"position": code_rate(steps), "stretch": SCALE_RATE}
    groups = [
        {"params": [parameter], "lr": rates.get(name.rpartition(".")[2], OFFSET_RATE)}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)


def code_rate(steps: int) -> float:
    """Peak step size of a position.

    Steps of random direction carry it about as far as one step times the square root of their number. That should be
    no further than from EDGE, where it starts at most, to the edge of its cell, or noise undoes what was rounded the
    other way on purpose.
    """
    return min(CODE_RATE, (0.5 - EDGE) / math.sqrt(steps))


def rate(step: int, steps: int) -> float:
    """The step size, as a share of its peak: a linear rise, then a cosine down to 0, which lets the codes settle."""
    warmup = WARMUP * steps
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw(windows: Tensor, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of windows, every window once before any comes again: int64 [n, T] -> `steps` times [batch_size, T]."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    for rows in order.split(batch_size)[:steps]:
        yield windows[rows.to(windows.device)]


def differentiate(model: GPT, reference: GPT, tokens: Tensor) -> None:
    """Adds to the parameters' gradients those of the mean divergence over a batch, int64 [B, T].

    Logits are large (50,257 numbers a position): they are made, differentiated and let go a window at a time, down to
    the residual stream after ln_f, and the blocks are differentiated once, for all windows. With respect to the logits
    behind q, KL(p || q) has the derivative q - p, which takes a third of the passes over them that autograd would.
    """
    with in_bfloat16(tokens.device):
        with torch.no_grad():
            targets = reference.hidden(tokens)  # [B, T, C]
        hidden = model.hidden(tokens)  # [B, T, C]
    windows = [window.detach().requires_grad_() for window in hidden]  # B times [T, C]
    for window, target in zip(windows, targets, strict=True):
        logits = model.lm_head(window)  # [T, V]
        with torch.no_grad():
            gradient = logits.softmax(-1).sub_(reference.lm_head(target).softmax(-1))
        logits.backward(gradient)
    hidden.backward(torch.stack([window.grad for window in windows if window.grad is not None]) / tokens.numel())


@torch.no_grad()
def validate(model: GPT, reference: GPT, windows: Tensor, batch_size: int) -> float:
    """Mean divergence over windows, int64 [n, T], in nats a token.

    Raises:
        UserError: it is NaN or infinite.
    """
    nats = 0.0
    for batch in windows.split(batch_size):
        for hidden, target in zip(model.hidden(batch), reference.hidden(batch), strict=True):  # [T, C]
            nats += divergence(model, reference, hidden, target).item()
    if not math.isfinite(nats):
        raise UserError(
            f"the divergence of the int4 model from the FP one became {nats} while tuning: check with eval.py that "
            "both give finite perplexities; if they do, quantize without tuning"
        )
    return max(nats, 0.0) / windows.numel()  # of two equal models, rounding may leave a little less than nothing


def divergence(model: GPT, reference: GPT, hidden: Tensor, target: Tensor) -> Tensor:
    """Sum over a window's positions of KL(reference || model), from their residual streams after ln_f.

    Args:
        model, reference: for their output layers.
        hidden, target: float32 [T, C], the model's and the reference's.

    Returns:
        [], in nats.
    """
    log_q = F.log_softmax(model.lm_head(hidden), dim=-1)  # [T, V]
    log_p = F.log_softmax(reference.lm_head(target), dim=-1)  # [T, V]
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def snapshot(model: GPT) -> dict[str, Tensor]:
    """A copy of all that is tuned."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: GPT, state: dict[str, Tensor]) -> None:
    """Puts a snapshot back, and freezes all."""
    for name, tensor in state.items():
        model.get_parameter(name).copy_(tensor)
    model.requires_grad_(False)


def in_bfloat16(device: torch.device) -> torch.autocast:
    """The blocks' products in bfloat16, on a GPU that has it.

    On an H200 a step of GPT-2 124M takes 54 milliseconds with it and a fused Adam, without 93. The rounding moves the
    demo's predictions by a divergence of 0.00003 (results/quantizers.json). The output layer would not bear it: logits
    of 20 would be off by up to 0.06.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


@contextlib.contextmanager
def tensor_float_32() -> Iterator[None]:
    """On a GPU, matrix products in TF32: fp16's precision with float32's range, so that no gradient underflows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
