"""Texts and tokens."""

import base64
import sys

import pytest
import torch

from minigpt import data
from minigpt.errors import UserError
from minigpt.tokenizer import LONGEST_SPACE, encode, gpt2_tokenizer, read_tokenizer, tokenizer_for


def test_wikitext_2_has_the_published_counts(text_folder):
    rows = data.wikitext_rows("wikitext-2", "test")
    assert len(rows) == 4358
    assert rows[0] == "" and rows[1] == " = Robert Boulter = \n"
    assert len(gpt2_tokenizer().encode_ordinary("\n\n".join(rows))) == 287_644


def test_load_text_joins_the_rows(text_folder):
    assert data.load_text("wikitext-2") == "\n\n".join(data.wikitext_rows("wikitext-2", "test"))


def test_gpt2_tokens_are_gpt2s(text_folder):
    assert gpt2_tokenizer().encode_ordinary("Hello, world! 12 naïve") == [15496, 11, 995, 0, 1105, 41492]
    assert gpt2_tokenizer().n_vocab == 50257


def test_missing_split_in_the_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path))
    with pytest.raises(UserError, match="wiki.train.raw: no such file"):
        data.load_text("wikitext-2", "train")
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere.*no folder"):
        data.load_text("wikitext-2")


def test_demo_splits_hold_whole_modules_apart():
    """The text of a module is in its own split and in no other; private twins go with their module."""
    texts = {split: data.standard_library_text(split) for split in ("train", "validation", "test")}
    import heapq
    import inspect
    import random
    import textwrap
    import tokenize

    for module, home in [(heapq, "test"), (textwrap, "test"), (random, "validation"), (tokenize, "train")]:
        source = inspect.getsource(module)
        for split, text in texts.items():
            assert (source in text) == (split == home), (module.__name__, split)
    if sys.version_info >= (3, 12):
        import _pydatetime

        assert inspect.getsource(_pydatetime) in texts["test"]
    assert len(texts["train"]) > 5e6 and len(texts["test"]) > 3e5 and len(texts["validation"]) > 1e5
    assert 'The "if" statement is used for conditional execution' in texts["train"]


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("first é", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("third", encoding="utf-8")
    (tmp_path / ".hidden").write_text("no", encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2")
    assert data.load_text(str(tmp_path)) == "first é\n\nsecond\n\nthird"
    assert data.load_text(str(tmp_path / "b.txt")) == "second"


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert data.load_text(str(tmp_path / "windows.txt")) == "first"


def test_texts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, message in [
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
        ("missing.txt", "unknown dataset.*wikitext-2"),
    ]:
        with pytest.raises(UserError, match=message):
            data.load_text(str(tmp_path / name))


def test_c4_which_has_no_test_split_is_scored_on_its_validation_split(monkeypatch):
    monkeypatch.setattr(data, "hub_text", lambda dataset, split, revision=None: f"{dataset} {split} {revision}")
    for split, read in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        assert data.load_text("c4", split) == f"{data.C4} {read} {data.C4_REVISION}"
    assert data.load_text("someone/texts") == "someone/texts test None"


def test_random_windows_are_windows():
    tokens = torch.arange(100)
    windows = data.random_windows(tokens, 500, 7, torch.Generator().manual_seed(0))
    assert windows.shape == (500, 7) and (windows.diff(dim=1) == 1).all()
    assert windows.min() == 0 and windows.max() == 99  # both ends are reached
    with pytest.raises(UserError, match="100 tokens, fewer than a window of 101"):
        data.random_windows(tokens, 1, 101, torch.Generator())


class TestOwnTokenizer:
    def test_demo_tokenizer_round_trips_any_text(self):
        from minigpt.checkpoint import DEMO_FOLDER

        tokenizer = read_tokenizer(DEMO_FOLDER / "tokenizer.tiktoken")
        for text in [
            "def main():\n    return 0\n",
            "naïve — 漢字 \U0001f600\r\n\t",
            "",
            "a" * 1000,
            "x = 12345.678e-9",
        ]:
            assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
        assert tokenizer.n_vocab == 4096

    def test_runs_of_white_space_however_long(self):
        """A million is too much for tiktoken by itself; below the limit the tokens are its own."""
        from minigpt.checkpoint import DEMO_FOLDER

        tokenizer = read_tokenizer(DEMO_FOLDER / "tokenizer.tiktoken")
        for space in (" ", "\n", " \n"):
            text = "a" + space * 1_500_000 + "b"
            assert tokenizer.decode(encode(tokenizer, text)) == text
        text = "a" + " " * (LONGEST_SPACE - 1) + "b"
        assert encode(tokenizer, text) == tokenizer.encode_ordinary(text)

    def test_training_makes_a_tokenizer(self, tmp_path):
        """Byte-pair encoding by its definition: 'ab' is the most frequent pair, then 'abc'."""
        from minigpt.train_tokenizer import train

        tokens = train("abc abc abd\n" * 10, 258)
        assert len(tokens) == 258 and sorted(tokens[:256]) == [bytes([i]) for i in range(256)]
        assert tokens[256] == b"ab"

    @pytest.mark.parametrize(
        "content", [b"", b"not base64 at all!\n", b"YQ== 0\n", b"YQ==\n", b"\xff\xfe\n", b"YQ== 0 0\n"]
    )
    def test_broken_files_are_named(self, tmp_path, content):
        (tmp_path / "tokenizer.tiktoken").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.tiktoken: not a tokenizer"):
            read_tokenizer(tmp_path / "tokenizer.tiktoken")

    def test_a_missing_byte_is_noticed(self, tmp_path):
        tokens = [bytes([i]) for i in range(255)] + [b"ab", b"abc"]
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
        (tmp_path / "tokenizer.tiktoken").write_bytes(b"".join(lines))
        with pytest.raises(UserError, match="not each of the 256 single bytes"):
            read_tokenizer(tmp_path / "tokenizer.tiktoken")

    def test_model_that_fits_no_tokenizer(self, tmp_path, text_folder):
        with pytest.raises(UserError, match="300 tokens and no tokenizer.tiktoken"):
            tokenizer_for(tmp_path, 300)
        assert tokenizer_for(tmp_path, 50304).n_vocab == 50257  # padded vocabularies are common
