"""Files of results: whether one can be written is asked before the work, and it is written whole or not at all.

Many are lists of measurements, each a `Row`, to which a later run adds its own.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt.errors import UserError

Row = dict[str, Any]


def check_file(flag: str, path: Path) -> None:
    """Raises UserError, naming `flag`, if no file can be written at `path`, before any work is done for it."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give a file's path")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")
    target = path if _is_device(path) else path.parent
    if not os.access(target, os.W_OK):
        raise UserError(f"{flag} {path}: no permission to write to {target}")


def write_json(path: Path, content: object) -> None:
    """Writes JSON to a file beside `path` first, which then takes its place; to a device (/dev/stdout) directly.

    Raises:
        UserError: a number is NaN or infinite, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"{path} is not written: a result is NaN or infinite ({error})") from error
    if _is_device(path):
        path.write_text(text, encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:  # inside: see replace_files
        temporary = Path(folder) / path.name
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def read_rows(flag: str, path: Path, identity: Sequence[str]) -> list[Row]:
    """The measurements in a file; none if there is no such file.

    Raises:
        UserError: naming `flag`: the file holds something else than rows with the fields of `identity`.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(identity) for row in rows):
        raise UserError(f"{flag} {path}: not a list of such measurements; give another file")
    return rows


def merge(rows: Sequence[Row], row: Row, identity: Sequence[str]) -> list[Row]:
    """The measurements with one more, in the place of the one whose `identity` it repeats, or else at the end."""
    places = [[other[name] for name in identity] for other in rows]
    place = [row[name] for name in identity]
    if place not in places:
        return [*rows, row]
    return [row if other == place else old for other, old in zip(places, rows, strict=True)]


def add_row(flag: str, path: Path, row: Row, identity: Sequence[str]) -> None:
    """Merges a measurement into a file as it is now: another program may have added some meanwhile.

    Raises:
        UserError: as `read_rows` and `write_json`.
    """
    write_json(path, merge(read_rows(flag, path, identity), row, identity))


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file()
