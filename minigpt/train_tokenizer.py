"""Makes the demo's tokenizer: byte-pair encoding learned from the demo's training text.

    python -m minigpt.train_tokenizer [--vocab-size 4096] [--output minigpt/demo/tokenizer.tiktoken]

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units": start from the 256 bytes and
merge the most frequent pair of neighbours into a new token, again and again. The merging is done by Hugging Face's
`tokenizers`; what is kept is the list of tokens in the order of their merging, which is all that tiktoken needs.
"""

import argparse
import base64
from pathlib import Path

from minigpt.data import load_text
from minigpt.errors import UserError, run_script
from minigpt.tokenizer import PATTERN, encode, read_tokenizer


def train(text: str, vocab_size: int) -> list[bytes]:
    """The tokens of a byte-pair encoding of `text`, in merging order; the first 256 are the single bytes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=True
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    by_number = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    byte_of = printable_bytes()
    return [bytes(byte_of[character] for character in token) for token, _ in by_number]


def printable_bytes() -> dict[str, int]:
    """The alphabet in which byte-level tokenizers write bytes: printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def main() -> None:
    """Trains on the demo's training text and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo" / "tokenizer.tiktoken")
    args = parser.parse_args()
    if args.vocab_size < 256:
        raise UserError(f"--vocab-size is {args.vocab_size}, it must be at least 256: the single bytes")
    tokens = train(load_text("demo", "train"), args.vocab_size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    args.output.write_bytes(b"".join(lines))
    sample = load_text("demo", "validation")
    length = len(encode(read_tokenizer(args.output), sample))
    print(
        f"{args.output}: {len(tokens)} tokens, {len(sample.encode()) / length:.2f} bytes a token on the validation text"
    )


if __name__ == "__main__":
    run_script(main)
