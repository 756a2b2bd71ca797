"""Where text comes from: WikiText, the demo's corpus (Python's own standard library), the hub, files of one's own."""

import re
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigpt.errors import UserError
from minigpt.tokenizer import data_folder

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
Split = Literal["train", "validation", "test"]

WIKITEXT = ("wikitext-2", "wikitext-103")  # Merity et al. 2016, "Pointer Sentinel Mixture Models"
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
WIKITEXT_TEST_TITLE = " = Robert Boulter = \n"  # begins the test split, of WikiText-2 and -103 alike; in no other split

# Raffel et al. 2019, "Exploring the Limits of Transfer Learning": cleaned pages of the web. Pinned, as WikiText is.
C4 = "allenai/c4:en"
C4_REVISION = "607bd4c8450a42878aa9ddc051a65a055450ef87"
HUB_DOCUMENTS = 8000  # how much of a dataset is read; of C4, some three million tokens, enough to tune on

# The demo's text is on every machine that runs it: the sources of Python's standard library, docstrings and all, and
# the language reference that `help()` shows. These modules are kept from training, whole, with their private twins
# (`_pydatetime` belongs to datetime).
TEST_MODULES = (
    *("calendar", "configparser", "csv", "datetime", "fractions", "heapq"),
    *("pathlib", "shutil", "statistics", "textwrap", "zipfile"),
)
VALIDATION_MODULES = ("bisect", "cmd", "ftplib", "gettext", "graphlib", "ipaddress", "mailbox", "random")
# Not prose, not code that people read, or not there in every version and distribution of Python.
SKIPPED_FOLDERS = (
    *("site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "distutils"),
    *("turtledemo", "ensurepip", "pydoc_data"),
)


def load_text(dataset: str, split: Split = "test") -> str:
    """The text called `dataset`.

    Args:
        dataset: wikitext-2, wikitext-103, demo; the path of a text file or of a folder of text files; c4, or another
            dataset on the hub, OWNER/NAME or OWNER/NAME:CONFIG, of which `hub_text` reads the beginning.
        split: train, validation or test. C4 has no test split: its validation split serves. A path has no splits: all
            of its text is returned.

    Raises:
        UserError: there is no such text, it is empty, it is not UTF-8, or it cannot be downloaded.
    """
    if dataset in WIKITEXT:
        # The usual protocol: the rows joined by an empty line.
        text = "\n\n".join(wikitext_rows(dataset, split))
    elif dataset == "demo":
        text = standard_library_text(split)
    elif is_path(dataset):
        text = _read_path(Path(dataset))
    elif dataset == "c4":
        text = hub_text(C4, "validation" if split == "test" else split, C4_REVISION)
    elif HUB_NAME.fullmatch(dataset):
        text = hub_text(dataset, split)
    else:
        raise UserError(
            f"unknown dataset {dataset!r}: neither one of {', '.join(WIKITEXT)}, c4, demo, nor a path that exists, "
            "nor a name on the hub (OWNER/NAME)"
        )
    if not text.strip():
        raise UserError(f"dataset {dataset!r} is empty")
    return text


def default_text(model: str) -> str:
    """What a model is scored on if nothing else is asked for: the demo on a text like those that it has read."""
    return "demo" if model == "demo" else "wikitext-2"


def is_path(dataset: str) -> bool:
    """Whether `load_text` would read a file or a folder: there is one, and its name is not one of the texts'."""
    return dataset not in (*WIKITEXT, "demo", "") and Path(dataset).exists()


def wikitext_rows(dataset: str, split: Split) -> list[str]:
    """The rows of raw WikiText as the dataset hub has them: a line each with its newline, blank lines empty.

    Read from MINIGPT_DATA/wikitext-2/wiki.test.raw (and so on) where that is set, else downloaded through `datasets`.

    Raises:
        UserError: the file is missing, or the hub cannot be reached.
    """
    folder = data_folder()
    if folder:
        path = folder / dataset / f"wiki.{'valid' if split == 'validation' else split}.raw"
        # Not splitlines(): WikiText has characters such as U+2028 that would split a row.
        lines = _read_file(path).split("\n")
        return ["" if line == " " else line + "\n" for line in lines[:-1]]
    import datasets  # slow to import, and only needed here

    from minigpt import hub

    repository = "Salesforce/wikitext"
    try:
        hub.check_reachable(repository, "README.md", WIKITEXT_REVISION, "dataset")
        rows = datasets.load_dataset(repository, f"{dataset}-raw-v1", split=split, revision=WIKITEXT_REVISION)
    except Exception as error:  # the library raises many kinds; each means that there is no data
        raise UserError(
            f"cannot download {dataset} ({hub.reason(error)}). Without a network: --dataset demo or --dataset FILE"
        ) from error
    return rows["text"][:]


def hub_text(dataset: str, split: Split, revision: str | None = None) -> str:
    """The first HUB_DOCUMENTS texts of a dataset on the hub, joined by empty lines; no more than those is downloaded.

    Args:
        dataset: OWNER/NAME or OWNER/NAME:CONFIG; its rows have a column `text`.
        split: train, validation or test.
        revision: a commit, a tag or a branch; the main branch if left out.

    Raises:
        UserError: the hub cannot be reached, there is no such dataset, configuration or split, or no column `text`.
    """
    import datasets  # as above

    from minigpt import hub

    repository, _, config = dataset.partition(":")
    try:
        hub.check_reachable(repository, "README.md", revision or "main", "dataset")
        rows = datasets.load_dataset(repository, config or None, split=split, revision=revision, streaming=True)
        return "\n\n".join(row["text"] for row in rows.take(HUB_DOCUMENTS))
    except KeyError as error:
        raise UserError(f"dataset {dataset} has no column {error}") from error
    except Exception as error:  # the library raises many kinds; each means that there is no data
        raise UserError(
            f"cannot read dataset {dataset} ({hub.reason(error)}), and no file has that name. "
            "Without a network: demo, or the path of a text file"
        ) from error


def standard_library_text(split: Split) -> str:
    """The demo's text in the version of Python that runs this: sources and, for training, the language reference.

    The modules of TEST_MODULES and VALIDATION_MODULES are the test and validation splits; all others are for training.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for path in sorted(root.rglob("*.py")) if _split_of(path.relative_to(root)) == split]
    texts = []
    for path in sources:
        with tokenize.open(path) as file:  # heeds the file's own declaration of its encoding
            texts.append(file.read())
    if split == "train":
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    return "\n\n".join(texts)


def _split_of(path: Path) -> Split | None:
    """The split that a file of the standard library belongs to, by its top-level module; None if to none."""
    if any(part in SKIPPED_FOLDERS for part in path.parts[:-1]) or path.name.startswith("_sysconfigdata"):
        return None
    module = path.with_suffix("").parts[0].lstrip("_").removeprefix("py")
    if module in TEST_MODULES:
        return "test"
    return "validation" if module in VALIDATION_MODULES else "train"


def _read_path(path: Path) -> str:
    """A file's text, or the text of all files in a folder that hold text, in the order of their names."""
    if not path.is_dir():
        return _read_file(path)
    texts = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and b"\0" not in file.read_bytes()[:4096]:
            texts.append(_read_file(file))
    return "\n\n".join(texts)


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # without the byte order mark that some editors put first
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def random_windows(tokens: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows that start at random places: int64 [N] -> int64 [batch_size, length].

    Raises:
        UserError: the text is shorter than a window.
    """
    if len(tokens) < length:
        raise UserError(f"the text has {len(tokens)} tokens, fewer than a window of {length}")
    starts = torch.randint(len(tokens) - length + 1, (batch_size, 1), generator=generator, device=generator.device)
    return tokens[starts.to(tokens.device) + torch.arange(length, device=tokens.device)]
