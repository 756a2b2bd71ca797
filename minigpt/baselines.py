"""What the demo's perplexity is worth: the same text scored by models that know less.

    python -m minigpt.baselines [--json FILE]

- untrained: the demo's shape with random weights. It guesses: about one in vocab_size.
- bigram: counts which token follows which in the training text, and mixes that with how often each token occurs
  (Jelinek & Mercer 1980; the mixing weight is the best on the validation text).
- demo: the model that ships with this project.
"""

import argparse
import math
import platform
from pathlib import Path

import torch
from torch import Tensor

from minigpt import checkpoint, data, evaluate
from minigpt.config import PRESETS
from minigpt.device import add_device_argument, arithmetic_dtype, check_device
from minigpt.errors import run_script
from minigpt.files import check_file, write_json
from minigpt.model import GPT
from minigpt.table import format_table
from minigpt.tokenizer import FILE_NAME, encode, read_tokenizer

MIXING_WEIGHTS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]


def bigram_probabilities(train: Tensor, text: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """For each token of `text` but the first: its probability given the one before, and by itself.

    Args:
        train, text: int64 [N], [M].
        vocab_size: tokens are 0..vocab_size-1.

    Returns:
        Two of float64 [M - 1]: counted in `train`; the second with one added to each count, so it is never 0.
    """
    counts = torch.bincount(train, minlength=vocab_size).double()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2)
    before, after = text[:-1], text[1:]
    given = pairs[before * vocab_size + after].double() / counts[before].clamp(min=1)
    alone = (counts[after] + 1) / (counts.sum() + vocab_size)
    return given, alone


def bigram_perplexity(train: Tensor, text: Tensor, vocab_size: int, weight: float = 0.99) -> float:
    """Perplexity of weight * bigram + (1 - weight) * unigram. Arguments as in `bigram_probabilities`."""
    given, alone = bigram_probabilities(train, text, vocab_size)
    return math.exp(-(weight * given + (1 - weight) * alone).log().mean().item())


def main() -> None:
    """Scores the demo's test text with each model, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    add_device_argument(parser)
    args = parser.parse_args()
    if args.json:
        check_file("--json", args.json)
    dtype = arithmetic_dtype(check_device(args.device))

    tokenizer = read_tokenizer(checkpoint.DEMO_FOLDER / FILE_NAME)
    texts = {split: data.standard_library_text(split) for split in ("train", "validation", "test")}
    tokens = {split: torch.tensor(encode(tokenizer, text)) for split, text in texts.items()}
    config = PRESETS["demo"]

    def score(model: GPT, label: str) -> float:
        """A model's perplexity on the test text."""
        test = tokens["test"].to(args.device)
        model.to(args.device, dtype).eval()
        return evaluate.perplexity(model, test, config.n_positions, config.n_positions, 8, label).perplexity

    untrained = GPT(config)
    untrained.init_weights(torch.Generator().manual_seed(0))
    best = min(
        MIXING_WEIGHTS,
        key=lambda w: bigram_perplexity(tokens["train"], tokens["validation"], config.vocab_size, w),
    )
    perplexities = {
        "untrained": score(untrained, "untrained"),
        "bigram": bigram_perplexity(tokens["train"], tokens["test"], config.vocab_size, best),
        "demo": score(checkpoint.load(checkpoint.DEMO_FOLDER, torch.float16), "demo"),
    }
    bits = {name: math.log2(p) * len(tokens["test"]) / len(texts["test"].encode()) for name, p in perplexities.items()}
    rows = [[name, f"{perplexity:.2f}", f"{bits[name]:.3f}"] for name, perplexity in perplexities.items()]
    print(format_table(["model", "perplexity", "bits/byte"], rows))
    if args.json:
        content = {"test_tokens": len(tokens["test"]), "python": platform.python_version(), "perplexity": perplexities}
        write_json(args.json, content)


if __name__ == "__main__":
    run_script(main)
