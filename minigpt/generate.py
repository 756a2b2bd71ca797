"""Writes text with a model, and shows it as it is written.

    python -m minigpt.generate "def main("                               the model that ships with this project
    python -m minigpt.generate --model gpt2 "The meaning of life is"     OpenAI's
    python -m minigpt.generate --model gpt2 "Once" "Twice" --quantized   what quantize.py made of it, two texts at once
    python -m minigpt.generate --temperature 0 --stop $'\\n\\n' "import"    always the likeliest, up to an empty line

The text goes to stdout; how fast it was, and why it ended if there was no more room, to stderr.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from minigpt import arguments, checkpoint
from minigpt.decode import DecodeStep, How, StepLogits, greedy_way, model_logits, read_behind, read_prompts
from minigpt.device import add_device_argument, arithmetic_dtype, check_device
from minigpt.errors import UserError, run_script
from minigpt.model import GPT
from minigpt.quantization.fused_decode import fused_step
from minigpt.sampling import GREEDY, Sampling
from minigpt.tokenizer import encode, tokenizer_for

END_OF_TEXT = "<|endoftext|>"  # between two documents in what GPT-2 was trained on


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_token: int | None = None,
    n_vocab: int | None = None,
    how: How = "captured",
    step_logits: StepLogits | None = None,
) -> Iterator[list[int | None]]:
    """Continues prompts, all of them a token at a time.

    A sequence ends with `stop_token`, after max_new_tokens, or when it has as many tokens as the model can read.

    Args:
        model: in evaluation mode.
        prompts: B lists of tokens, of at least one token each; they need not be equally long.
        max_new_tokens: how many to add to each at most.
        sampling: how tokens are chosen. Draws depend on the seed and on how many prompts there are.
        seed: of the draws, from 0 to 2^63 - 1.
        stop_token: ends a sequence, and is not yielded.
        n_vocab: chooses from tokens 0..n_vocab-1; a model's vocabulary may be padded beyond what its tokenizer knows.
        how: see `decode.How`.
        step_logits: a faster step for one token, see `decode.StepLogits`; the model's own if left out.

    Yields:
        the next token of each of the B sequences, None for those that have ended, until all have.

    Raises:
        UserError: no prompt, an empty one, one that leaves no room for a new token, or a negative max_new_tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit = model.config.n_positions
    if max_new_tokens < 0:
        raise UserError(f"--max-new-tokens is {max_new_tokens}, it must be at least 0")
    if not lengths or min(lengths) == 0:
        raise UserError("the prompt is empty; give at least one token")
    if max_new_tokens and max(lengths) >= limit:
        raise UserError(f"the prompt has {max(lengths)} tokens; the model reads {limit}, with at least one new one")
    n_steps = min(max_new_tokens, limit - min(lengths))
    generator = torch.Generator(model.wpe.weight.device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        """The next tokens: logits [B, V] -> int64 [B, 1]."""
        return sampling.choose(logits[:, :n_vocab], generator)  # [B, 1]

    def steps() -> Iterator[Tensor]:
        """Yields the next tokens, int64 [B, 1], n_steps times: the first from the prompts, the others from steps."""
        logits, cache = read_prompts(model, prompts, n_steps)
        tokens = choose(logits)
        yield tokens
        positions = torch.tensor(lengths, device=tokens.device)[:, None]  # [B, 1]
        way: StepLogits = step_logits or model_logits(model)
        choice: Callable[[Tensor], Tensor] = choose
        if sampling == GREEDY and n_vocab in (None, logits.shape[1]):
            way, choice = greedy_way(way)
        step = DecodeStep(way, choice, cache, tokens, positions, how, generator)
        for n in range(n_steps - 1):
            for row, length in enumerate(lengths):
                if length + n == limit:  # it has ended, and must not run on beyond the cache
                    step.positions[row] = 0
            yield step()

    running = [True] * len(prompts)
    for n, tokens in enumerate(read_behind(steps()) if n_steps else ()):
        running = [
            runs and length + n < limit and token != stop_token
            for runs, length, token in zip(running, lengths, tokens, strict=True)
        ]
        if not any(running):
            return
        yield [token if runs else None for runs, token in zip(running, tokens, strict=True)]


class TextStream:
    """A text that arrives token by token, given out in whole characters, up to a stop text.

    A token is some bytes: one may end in the middle of a character, whose rest the next one brings. And what could be
    the beginning of the stop text waits until it is clear whether it is.

    Attributes:
        ended: nothing more will come.
        n_tokens: how many tokens have come.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stop: str | None = None) -> None:
        self.ended = False
        self.n_tokens = 0
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    def add(self, token: int) -> str:
        """Takes a token; returns the text that can now be shown."""
        self.n_tokens += 1
        return self._show(self._decoder.decode(self._tokenizer.decode_single_token_bytes(token)))

    def end(self) -> str:
        """Says that no more will come; returns the text that waited. (Half a character becomes U+FFFD.)"""
        text = self._show(self._decoder.decode(b"", final=True)) + self._waiting
        self.ended, self._waiting = True, ""
        return text

    def _show(self, text: str) -> str:
        if self.ended:
            return ""
        if not self._stop:
            return text
        text = self._waiting + text
        if self._stop in text:
            self.ended, self._waiting = True, ""
            return text[: text.index(self._stop)]
        shown = max(0, len(text) - len(self._stop) + 1)
        while not self._stop.startswith(text[shown:]):  # the empty end at the latest
            shown += 1
        self._waiting = text[shown:]
        return text[:shown]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="several are continued at the same time")
    parser.add_argument("--model", default="demo", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, or a path")
    parser.add_argument(
        "--quantized",
        nargs="?",
        const=True,
        metavar="PATH",
        help="an int4 checkpoint instead (without PATH: what quantize.py made of --model)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the K best tokens (default: 50)")
    parser.add_argument("--top-p", type=float, help="draw among the best tokens whose probabilities sum to P")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--stop", metavar="TEXT", help=f"end before this text (always: at {END_OF_TEXT})")
    add_device_argument(parser)
    args = parser.parse_intermixed_args()
    if not args.prompts:
        taken = f": --quantized took {args.quantized!r} as its path; put the prompt before it"
        raise UserError("no prompt is given" + (taken if isinstance(args.quantized, str) else ""))
    for what, text in [*(("the prompt", prompt) for prompt in args.prompts), ("--stop", args.stop or "")]:
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of other bytes
            raise UserError(f"{what} {ascii(text)} is not UTF-8 text")
    if args.stop == "":
        raise UserError("--stop is empty; leave it out, or give the text to stop at")
    check_device(args.device)
    return args


def checkpoint_path(args: argparse.Namespace) -> Path:
    """The checkpoint that --model and --quantized ask for."""
    if args.quantized is None:
        return checkpoint.resolve(args.model)
    if args.quantized is not True:
        if not (args.quantized and Path(args.quantized).exists()):
            raise UserError(f"--quantized {args.quantized!r}: no such folder")
        checkpoint.check_int4(Path(args.quantized))
        return Path(args.quantized)
    checkpoint.check_known(args.model)
    folder = checkpoint.default_int4_folder(args.model)
    if not folder.exists():
        raise UserError(f"no int4 checkpoint at {folder}; make it with: python quantize.py {args.model}")
    return folder


def first_token(tokenizer: tiktoken.Encoding) -> int:
    """What an empty prompt begins with: the token that stood before every text GPT-2 was trained on.

    Raises:
        UserError: the vocabulary has no such token.
    """
    if END_OF_TEXT not in tokenizer.special_tokens_set:
        raise UserError(f"the prompt is empty, and this model's vocabulary has no {END_OF_TEXT} to begin a text with")
    return tokenizer.eot_token


def show(steps: Iterable[list[int | None]], prompts: Sequence[str], streams: Sequence[TextStream]) -> float | None:
    """Prints texts one after another while all are written: the first as it comes, the next once that has ended.

    Args:
        steps: the next token of each, as `generate` gives them.
        prompts: what the texts begin with.
        streams: turn tokens into text.

    Returns:
        tokens a second, all texts together; the first ones, for which the prompts were read, are not counted. None if
        there are no others.
    """
    n = len(prompts)
    ready = [f"--- {row + 1} of {n} ---\n{prompt}" if n > 1 else prompt for row, prompt in enumerate(prompts)]
    shown, n_first, begin, end = 0, 0, 0.0, 0.0

    def print_ready() -> None:
        """Prints what there is of the text that is shown, and of those behind it if that has ended."""
        nonlocal shown
        while True:
            print(ready[shown], end="", flush=True)
            ready[shown] = ""
            if not streams[shown].ended or shown == n - 1:
                return
            print()
            shown += 1

    try:
        for step in steps:
            for row, (stream, token) in enumerate(zip(streams, step, strict=True)):
                if not stream.ended:
                    ready[row] += stream.end() if token is None else stream.add(token)
            print_ready()
            end = time.perf_counter()
            if not begin:
                begin, n_first = end, sum(stream.n_tokens for stream in streams)
            if all(stream.ended for stream in streams):
                break
        for row, stream in enumerate(streams):
            ready[row] += stream.end()
        print_ready()
    except KeyboardInterrupt:
        print(flush=True)  # what comes next on the terminal begins a line
        raise
    print(flush=True)
    n_timed = sum(stream.n_tokens for stream in streams) - n_first
    return n_timed / (end - begin) if n_timed > 0 else None


def main() -> None:
    """Continues the prompts given on the command line."""
    args = parse_args()
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    path = checkpoint_path(args)
    try:
        model = checkpoint.load(path, arithmetic_dtype(args.device), args.device)
        tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), model.config.vocab_size)
        prompts = [encode(tokenizer, prompt) or [first_token(tokenizer)] for prompt in args.prompts]
        stop_token = tokenizer.eot_token if END_OF_TEXT in tokenizer.special_tokens_set else None
        steps = generate(
            model,
            prompts,
            args.max_new_tokens,
            sampling,
            args.seed,
            stop_token,
            tokenizer.n_vocab,
            step_logits=fused_step(model, len(prompts)),
        )
        streams = [TextStream(tokenizer, args.stop) for _ in prompts]
        rate = show(steps, args.prompts, streams)
    except torch.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: fewer prompts at once, a smaller --max-new-tokens, a smaller --model, or --device cpu"
        ) from None
    limit = model.config.n_positions
    for row, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        if stream.n_tokens < args.max_new_tokens and len(prompt) + stream.n_tokens == limit:
            print(f"text {row + 1} ended at {limit} tokens, all that the model can read", file=sys.stderr)
    if rate is not None:
        n_tokens = sum(stream.n_tokens for stream in streams)
        print(f"{n_tokens} new tokens, {rate:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
