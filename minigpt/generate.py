"""Writes text with a model: a KV cache, greedy or random choice of the next token.

python -m minigpt.generate [--model demo] [--max-new-tokens 100] [--temperature 0.8] "def main("
"""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minigpt import checkpoint
from minigpt.device import add_device_argument, arithmetic_dtype, check_device
from minigpt.errors import UserError, run_script
from minigpt.model import GPT, KVCache
from minigpt.tokenizer import encode, tokenizer_for


def choose_token(
    logits: Tensor, temperature: float = 0.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each sequence: [B, V] -> int64 [B, 1].

    Args:
        logits: scores of all tokens.
        temperature: 0 takes the best (greedy); else samples from softmax(logits / temperature).
        top_k: samples among the k best only.
        generator: the source of randomness.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / max(temperature, 1e-6)  # a smaller one would overflow, and choose no differently
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    n_vocab: int | None = None,
) -> Iterator[Tensor]:
    """Continues a prompt, a token at a time.

    Args:
        model: in evaluation mode.
        prompt: int64 [B, T], T at least 1.
        max_new_tokens: how many to make; prompt and new tokens must fit n_positions together.
        temperature, top_k, generator: see `choose_token`.
        n_vocab: chooses from tokens 0..n_vocab-1; a model's vocabulary may be padded beyond what its tokenizer knows.

    Yields:
        int64 [B, 1], the next token of each sequence.

    Raises:
        UserError: an empty prompt, one that leaves no room for max_new_tokens, or a number out of range.
    """
    if max_new_tokens < 0:
        raise UserError(f"--max-new-tokens is {max_new_tokens}, it must be at least 0")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature is {temperature}, it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k is {top_k}, it must be at least 1")
    batch_size, length = prompt.shape
    limit = model.config.n_positions
    if length == 0:
        raise UserError("the prompt is empty; give at least one token")
    if length + max_new_tokens > limit:
        raise UserError(f"the prompt's {length} tokens and {max_new_tokens} new ones exceed the model's {limit}")
    dtype, device = model.wpe.weight.dtype, prompt.device
    cache = KVCache(model.config, batch_size, length + max_new_tokens, dtype, device)
    tokens, positions = prompt, torch.arange(length, device=device)
    for _ in range(max_new_tokens):
        last = model.hidden(tokens, cache, positions)[:, -1]  # [B, C]: the output layer is needed only here
        tokens = choose_token(model.lm_head(last)[:, :n_vocab], temperature, top_k, generator)  # [B, 1]
        positions = positions[-1:] + 1
        yield tokens


def seed(text: str) -> int:
    """Reads --seed: a whole number from 0 to 2^63 - 1, as torch's generators take it."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 - 1")
    return int(text)


def main() -> None:
    """Continues the prompt given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="demo", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, or a path")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=seed, default=0)
    add_device_argument(parser)
    args = parser.parse_args()
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):  # what Python makes of other bytes
        raise UserError(f"the prompt {ascii(args.prompt)} is not UTF-8 text")
    path = checkpoint.resolve(args.model)
    model = checkpoint.load(path, arithmetic_dtype(check_device(args.device)), args.device)
    tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), model.config.vocab_size)
    prompt = torch.tensor([encode(tokenizer, args.prompt)], dtype=torch.int64, device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    new = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, generator, tokenizer.n_vocab)
    print(args.prompt + tokenizer.decode([int(token) for token in new]))


if __name__ == "__main__":
    run_script(main)
