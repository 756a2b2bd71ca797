"""Trains a GPT from scratch.

    python train.py                                       the demo model on Python's standard library
    python train.py --preset gpt2 --dataset wikitext-103  GPT-2 124M on WikiText, on a GPU
    python train.py --dataset my_book.txt --steps 2000    text of your own; its last twentieth is for validation

Read from top to bottom: settings, data, model, optimizer, the loop. What it writes: a checkpoint folder that
quantize.py and eval.py take, with the weights of the lowest validation loss, and `training.json`, the record of how
they came about (command, seed, versions, GPU, losses).
"""

import argparse
import contextlib
import dataclasses
import datetime
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minigpt import arguments, checkpoint, data
from minigpt.config import PRESETS
from minigpt.device import add_device_argument, check_device, describe_device
from minigpt.errors import UserError, run_script
from minigpt.evaluate import Score
from minigpt.files import write_json
from minigpt.generate import generate
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import FILE_NAME, encode, gpt2_tokenizer, read_tokenizer

LossOf = Callable[[GPT, Tensor], Tensor]


def parse_args() -> argparse.Namespace:
    """The settings. Defaults train the demo model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="the model's shape (default: demo)")
    parser.add_argument(
        "--dataset", default="demo", help="demo, wikitext-2, wikitext-103, a text file or folder, c4, OWNER/NAME"
    )
    parser.add_argument("--output", type=arguments.path, help="checkpoint folder (default: checkpoints/PRESET-trained)")
    parser.add_argument("--steps", type=arguments.at_least_1, default=4000, help="updates of the weights")
    parser.add_argument(
        "--batch-size", type=arguments.at_least_1, default=32, help="sequences that are computed at once"
    )
    parser.add_argument(
        "--accumulate", type=arguments.at_least_1, default=1, help="batches whose gradients add up to one update"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak, after the warm-up")
    parser.add_argument(
        "--warmup", type=arguments.whole, default=200, help="steps in which the learning rate rises from 0"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; biases and gains have none")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (inf: any)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=arguments.at_least_1, default=200, help="steps between validations")
    parser.add_argument("--seed", type=arguments.seed, default=0)
    add_device_argument(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    args = parser.parse_args()
    check_device(args.device)
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout is {args.dropout}, it must be at least 0 and less than 1")
    for name in ("learning_rate", "weight_decay", "warmup"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be 0 or more")
    if not args.clip > 0:
        raise UserError(f"--clip is {args.clip}, it must be more than 0 (inf: never clip)")
    args.output = args.output or Path("checkpoints") / f"{args.preset}-trained"
    checkpoint.check_output(args.output)
    if (args.output / "model.safetensors").exists():
        raise UserError(f"--output {args.output} holds a model already; give another folder, or remove that one")
    return args


def load_splits(dataset: str) -> tuple[str, str]:
    """Training and validation text; of a file or folder the last twentieth is for validation."""
    if data.is_path(dataset):
        text = data.load_text(dataset)
        cut = len(text) * 19 // 20
        return text[:cut], text[cut:]
    return data.load_text(dataset, "train"), data.load_text(dataset, "validation")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Rises linearly over the warm-up, then falls along a cosine to a tenth of the peak at the last step."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - 1 - args.warmup)
    return args.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: GPT, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay only for matrices, as biases and gains should be free to grow."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=args.device.startswith("cuda"))


def loss_of(model: GPT, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of predicting each token from those before it: int64 [B, T + 1] -> []."""
    logits = model(windows[:, :-1])  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPT, tokens: Tensor, length: int, args: argparse.Namespace) -> float:
    """Loss over consecutive windows of the validation text, at most 64 batches of them."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    model.eval()
    with precision(args.device):
        batches = windows.split(args.batch_size)[:64]
        nats = sum(loss_of(model, batch).item() * len(batch) for batch in batches)
    model.train()
    return nats / sum(len(batch) for batch in batches)


def precision(device: str) -> contextlib.AbstractContextManager[None]:
    """Mixed precision where it pays: matrix products in bfloat16 on a GPU that has it, weights always in float32."""
    use_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if use_bf16 else contextlib.nullcontext()


def record(
    args: argparse.Namespace, model: GPT, n_tokens: int, losses: list[dict[str, float]], seconds: float
) -> dict[str, Any]:
    """How the weights came about, for training.json."""
    settings: dict[str, Any] = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    return {
        "command": "python train.py " + shlex.join(sys.argv[1:]),
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": n_tokens,
        "tokens_seen": losses[-1]["step"] * args.accumulate * args.batch_size * model.config.n_positions,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": describe_device(args.device),
        "date": datetime.date.today().isoformat(),
        "losses": losses,
    }


def main() -> None:
    """Trains, and keeps the weights with the lowest validation loss."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # whatever autocast leaves in float32 may use TF32

    # Data: the whole text as one long line of tokens, from which windows are drawn.
    tokenizer_file = checkpoint.DEMO_FOLDER / FILE_NAME if args.preset in ("tiny", "demo") else None
    tokenizer = read_tokenizer(tokenizer_file) if tokenizer_file else gpt2_tokenizer()
    train_text, validation_text = load_splits(args.dataset)
    train_tokens = torch.tensor(encode(tokenizer, train_text), device=args.device)
    validation_tokens = torch.tensor(encode(tokenizer, validation_text), device=args.device)

    # Model.
    config = dataclasses.replace(PRESETS[args.preset], dropout=args.dropout)
    model = GPT(config)
    model.init_weights()
    model.to(args.device)
    window = config.n_positions + 1  # a token more than the model reads: the last one is only predicted
    if len(validation_tokens) < window:
        raise UserError(f"the validation text has {len(validation_tokens)} tokens, fewer than a window of {window}")
    # The loss is compiled with the model, so that the logits, many as they are, go through memory once or twice only.
    training_loss: LossOf = torch.compile(loss_of) if args.compile else loss_of
    optimizer = make_optimizer(model, args)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(train_tokens):,} training tokens, "
        f"{args.steps * args.accumulate * args.batch_size * config.n_positions / len(train_tokens):.0f} epochs"
    )

    # The loop.
    losses: list[dict[str, float]] = []
    best = math.inf
    start = time.perf_counter()
    bar = tqdm(range(args.steps), unit="step", smoothing=0.05)
    for step in bar:
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch_losses = []
        for _ in range(args.accumulate):
            windows = data.random_windows(train_tokens, args.batch_size, window, generator)
            with precision(args.device):
                loss = training_loss(model, windows) / args.accumulate
            loss.backward()
            batch_losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        last = step + 1 == args.steps
        if step % 20 == 0 or step % args.eval_every == args.eval_every - 1 or last:  # not always: it waits for the GPU
            train_loss = torch.stack(batch_losses).sum().item()
            if not math.isfinite(train_loss):
                raise UserError(f"the loss became {train_loss} at step {step}: try a lower --learning-rate")
            tokens_seen = (step + 1) * args.accumulate * args.batch_size * config.n_positions
            rate_seen = tokens_seen / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {train_loss:.3f}, validation {best:.3f}, {rate_seen:,.0f} tokens/s")
        if step % args.eval_every == args.eval_every - 1 or last:
            validation = validation_loss(model, validation_tokens, window, args)
            if not math.isfinite(validation):
                raise UserError(f"the validation loss became {validation}: try a lower --learning-rate")
            losses.append({"step": step + 1, "train": round(train_loss, 4), "validation": round(validation, 4)})
            if validation < best:
                best = validation
                checkpoint.save(model, args.output, tokenizer_file)
            seconds = time.perf_counter() - start
            write_json(args.output / "training.json", record(args, model, len(train_tokens), losses, seconds))
    bar.close()

    model = checkpoint.load(args.output, torch.float32, args.device)
    prompt = validation_tokens[: config.n_positions // 8].tolist()
    steps = generate(model, [prompt], config.n_positions // 4, Sampling(temperature=0.8, top_k=50), args.seed)
    sample = [token for step in steps for token in step if token is not None]
    print(f"a sample:\n{tokenizer.decode(prompt + sample)}\n")
    perplexity = Score(best, 1).perplexity
    print(f"lowest validation loss {best:.4f} nats a token (perplexity {perplexity:.2f}); saved in {args.output}")


if __name__ == "__main__":
    run_script(main)
