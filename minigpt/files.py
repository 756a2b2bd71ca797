"""Files of results: whether one can be written is asked before the work, and it is written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path

from minigpt.errors import UserError


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


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file()
