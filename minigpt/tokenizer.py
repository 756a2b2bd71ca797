"""Text to tokens and back, by tiktoken: GPT-2's encoding, and small ones of our own such as the demo's.

An encoding of our own is a file `tokenizer.tiktoken` beside the model's weights, in tiktoken's format: a line a token,
its bytes in base64 and its number. `python -m minigpt.train_tokenizer` makes such a file.
"""

import base64
import os
import re
from pathlib import Path

import tiktoken

from minigpt.errors import UserError

FILE_NAME = "tokenizer.tiktoken"

LONGEST_SPACE = 100_000

# How text is cut before pairs of bytes are merged: words and numbers with the space before them, runs of signs, and
# white space. No token crosses these cuts, so none holds half of one word and half of the next.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def data_folder() -> Path | None:
    """The folder that the environment variable MINIGPT_DATA names: local copies that are read instead of the hub's.

    Raises:
        UserError: it is set and names no folder.
    """
    name = os.environ.get("MINIGPT_DATA")
    if not name:
        return None
    if not Path(name).is_dir():
        raise UserError(f"MINIGPT_DATA is {name!r}, which is no folder")
    return Path(name)


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's 50,257 tokens. The vocabulary is downloaded once by tiktoken, or read from MINIGPT_DATA/tiktoken.

    Raises:
        UserError: it can be had from neither.
    """
    folder = data_folder()
    if folder and (folder / "tiktoken").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder / "tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests', urllib3's and tiktoken's own: all mean that there is no vocabulary
        raise UserError(
            f"cannot download GPT-2's vocabulary ({type(error).__name__}). Without a network: use the model demo, or "
            "set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached it"
        ) from error


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens of a text; words such as <|endoftext|> in it are ordinary text.

    The tokens are tiktoken's own, with one exception: runs of LONGEST_SPACE white-space characters or more, at a
    million of which tiktoken would panic, are cut and encoded in parts.
    """
    tokens: list[int] = []
    for part in re.split(rf"(\s{{{LONGEST_SPACE}}})", text):
        tokens += tokenizer.encode_ordinary(part)
    return tokens


def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """An encoding of our own from its file.

    Raises:
        UserError: the file is missing or is not in tiktoken's format.
    """
    try:
        lines = (line.split() for line in path.read_bytes().splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("token numbers are not 0, 1, 2, ...")
        if any(bytes([byte]) not in ranks for byte in range(256)):  # or some text would have no tokens
            raise ValueError("not each of the 256 single bytes is a token")
        return tiktoken.Encoding(path.parent.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer in tiktoken's format ({error})") from error


def tokenizer_for(folder: Path, vocab_size: int) -> tiktoken.Encoding:
    """The encoding that a model in `folder` was trained with: the one beside its weights, or else GPT-2's.

    Raises:
        UserError: the model's vocabulary fits neither.
    """
    own = folder / FILE_NAME
    tokenizer = read_tokenizer(own) if own.exists() else gpt2_tokenizer()
    if vocab_size < tokenizer.n_vocab:  # a larger one is padding
        raise UserError(
            f"{folder}: the model has {vocab_size} tokens and no {FILE_NAME} beside it; GPT-2's has {tokenizer.n_vocab}"
            if not own.exists()
            else f"{own}: {tokenizer.n_vocab} tokens for a model that has {vocab_size}"
        )
    return tokenizer
