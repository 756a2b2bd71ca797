"""The one error that users see, and the wrapper that shows it in one line."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can mend: a wrong flag, a missing file, an unreachable hub.

    The message names the value at fault and says what would be right. The scripts print it
    without a traceback and exit with status 2; anything else that is raised is our own fault
    and keeps its traceback.
    """


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and turns what can go wrong outside the program into one line.

    Exit status: 2 for a `UserError`, a failing disk or too little memory; 130 for Ctrl-C. When nobody reads the output
    any more (`| head`) the script ends without a word, with status 141, as the shell reports for other programs.
    """
    for name in ("stdout", "stderr"):  # None where whoever called has closed them
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open until the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    try:
        main()
        sys.stdout.flush()  # here, where an error is still one line
    except UserError as error:
        _exit(str(error), 2)
    except torch.OutOfMemoryError:
        _exit("out of GPU memory: use a smaller model, or less at once", 2)
    except MemoryError:
        _exit("out of memory", 2)
    except RuntimeError as error:  # torch's way of saying so on a CPU
        if "can't allocate memory" not in str(error):
            raise
        _exit("out of memory", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more while it exits
        sys.exit(141)
    except OSError as error:  # the disk is full, a folder is not writable
        where = f"{error.filename}: " if error.filename else ""
        _exit(f"{where}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
