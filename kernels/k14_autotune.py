"""Lesson 14: autotuning. NEW: launch options that are measured on the user's own GPU, once, and remembered.

Run it:  python -m kernels.k14_autotune --check     (what is remembered, and what survives; needs no GPU)
         python -m kernels.k14_autotune --bench     (on a GPU: lesson 9's candidates beside its default)

THE IDEA. Lesson 9 has a rule for its block sizes, its split and its stages, found on one GPU. Another has more
multiprocessors, or less shared memory, or a larger cache, and no rule foresees them all. So where nobody has measured,
measure: try a handful of options on the very shape that is wanted, keep the fastest, and remember it, in memory for
this process and in a file for all later ones.

THE PRICE. Compiling is what takes long: half a second or so a candidate that Triton has not compiled before, where
timing it takes a twentieth. Five candidates are two seconds, five hundred would be minutes: so few, chosen by somebody
who knows the kernel. With the winner remembered, a process that finds the file pays for reading it. And a price in
reproducibility: another split along K rounds differently, so two machines that chose differently no longer agree to
the last bit. (One machine agrees with itself, as long as its file is kept.)

WHAT DECIDES THE CHOICE, the key under which it is remembered:

    GPU, Triton's version, kernel     another one of these may have another winner
    N, K, group size                  a model has a handful of such shapes
    M, rounded up to a power of two   else each prompt's length would be tuned for by itself

    "NVIDIA H200|3.6.0|kernels.k09_split_k|M<=16|2048x2048|64": {"BLOCK_M": 16, "BLOCK_N": 64, ...}

in $MINIGPT_CACHE/autotune.json, or ~/.cache/minigpt-int4/autotune.json. A choice found there counts only if it is
still among the candidates: a file of an older version, or one that was tampered with, can launch nothing unforeseen.

WHEN NOT TO. Tuning launches kernels, waits for them and reads their times, all of which breaks a CUDA graph's capture:
there, an unknown shape gets the default (so run a shape once before capturing it, as one does anyway). And in Triton's
interpreter times mean nothing.

MEASURED on an H200 (results/k14_autotune.json: command, versions, date; lesson 9, 16 x 2048 x 2048, group size 64),
microseconds:

    the default, SPLIT_K = 8       4.3    fp16 takes 6.1 (results/matmul.json): 1.4x; some 13% of the roofline
    SPLIT_K = 16                   4.8
    SPLIT_K = 4                    5.2
    BLOCK_N = 128                  4.8
    num_stages = 3                 4.6

The rule was made on this GPU, so the default ought to win; it does, and tuning gains nothing here. What it is for is
the third line: a wrong guess costs a fifth. The two seconds predicted above were not measured in this run.

NEXT. Lesson 15 puts lesson 13's integers into lesson 12's loop; `kernels/front_door.py` chooses among all of them, and
calls this lesson where nobody has measured. EXERCISE. `triton.autotune` does all this in one decorator. Find out what
its key is, what it measures with (is the cache cold?), and what it does during a capture; then say which of the three
you would change.
"""

import functools
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from kernels import common
from kernels.k00_reference import QuantizedWeight, quantize_reference
from kernels.prepared import PreparedWeight, prepare

Options = dict[str, int]  # launch options of a kernel, by name
Timer = Callable[[Options], float]  # launches with these options; microseconds

SUBJECT = "kernels.k09_split_k"  # what --bench tunes

_remembered: dict[str, Options] = {}


def tuned_options(
    matmul: Callable[..., Tensor],
    candidates: Callable[[int, int, int, int], list[Options]],
    x: Tensor,
    weight: PreparedWeight,
) -> Options | None:
    """The fastest launch options of `matmul` for this shape on this GPU, measured now if they are not known yet.

    Args:
        matmul: a lesson's, called as matmul(x, weight, None, options).
        candidates: a lesson's: M, N, K, group size -> the options worth trying.
        x: float16 or bfloat16 [..., K], not empty.
        weight: of [N, K].

    Returns:
        One of the candidates; or None, for the lesson's default, where tuning is impossible: in Triton's interpreter
        and, unless the shape is known already, while a CUDA graph is captured.
    """
    if not x.is_cuda or triton.knobs.runtime.interpret:
        return None
    m, n, k, group_size = x.numel() // x.shape[-1], weight.out_features, weight.in_features, weight.group_size
    key = cache_key(gpu_name(x.device), matmul.__module__, m, n, k, group_size)
    if key not in _remembered and torch.cuda.is_current_stream_capturing():
        return None
    return choose(
        key,
        candidates(m, n, k, group_size),
        lambda options: time_options(matmul, x, weight, options),
        cache_file(),
    )


def cache_key(gpu: str, kernel: str, m: int, n: int, k: int, group_size: int) -> str:
    """What a choice is remembered under."""
    return f"{gpu}|{triton.__version__}|{kernel}|M<={triton.next_power_of_2(m)}|{n}x{k}|{group_size}"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name. Cached, as every launch asks for it."""
    return torch.cuda.get_device_name(device)


def time_options(matmul: Callable[..., Tensor], x: Tensor, weight: PreparedWeight, options: Options) -> float:
    """Median microseconds of a launch, on copies of the weight that the L2 cache does not hold; inf if it fails."""
    copies = common.copies_to_fill_cache(weight.codes.nbytes)
    weights = [weight._replace(codes=weight.codes.clone()) for _ in range(copies)]
    try:
        return common.microseconds(matmul, [(x, copy, None, options) for copy in weights], rest=0)  # a user waits
    except TritonError:  # this GPU has too little shared memory, say
        return float("inf")


# NEW: measure once, remember for good.
def choose(key: str, candidates: Sequence[Options], timer: Timer, path: Path) -> Options:
    """The choice remembered under `key`, in memory or in the file; else the fastest candidate, remembered from now on.

    Args:
        key: from `cache_key`.
        candidates: at least one; the first, the default, is chosen if none can be launched.
        timer: measures a candidate; only called if nothing is remembered.
        path: the file.
    """
    if key not in _remembered:
        choices = read_choices(path)
        if choices.get(key) not in candidates:
            choices[key] = fastest(key, candidates, timer)
            save_choices(path, choices)
        _remembered[key] = choices[key]
    return _remembered[key]


def fastest(key: str, candidates: Sequence[Options], timer: Timer) -> Options:
    """Measures the candidates, with a line on stderr, as the user waits meanwhile."""
    print(f"tuning {key}: {len(candidates)} candidates ...", end="", flush=True, file=sys.stderr)
    start = time.perf_counter()
    times = [timer(options) for options in candidates]
    print(f" {min(times):.1f} us, found in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return candidates[times.index(min(times))]


def cache_file() -> Path:
    """Where choices are saved."""
    home = Path(os.environ.get("HOME", tempfile.gettempdir()))
    return Path(os.environ.get("MINIGPT_CACHE") or home / ".cache" / "minigpt-int4") / "autotune.json"


def read_choices(path: Path) -> dict[str, Any]:
    """What the file says, by key. Nothing, with a warning, if it is broken: a cache must never stop a program."""
    try:
        choices = json.loads(path.read_bytes())
        if not isinstance(choices, dict):
            raise ValueError("not a JSON object")
        return choices
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} cannot be read, launch options are tuned anew: {error}", stacklevel=2)
        return {}


def save_choices(path: Path, choices: dict[str, Any]) -> None:
    """Writes the file, whole or not at all. A failure is a warning: the choices still hold in memory."""
    own = path.with_name(f"{path.name}.{os.getpid()}")  # other processes may save at the same time
    try:
        common.save_json(own, choices)
        own.replace(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be written, launch options will be tuned again: {error}", stacklevel=2)


def check() -> Iterator[common.Check]:
    """That choices are remembered, and survive what may happen to a file. The times are made up."""
    times = {16: 9.0, 32: 7.0, 64: float("inf")}
    candidates = [{"BLOCK": block} for block in times]
    measured: list[Options] = []

    def timer(options: Options) -> float:
        """Stands in for the clock, and notes what was asked of it."""
        measured.append(options)
        return times[options["BLOCK"]]

    def tunes(path: Path) -> bool:
        """Whether a choice, which must be the right one, had to be measured."""
        measured.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken files: they are broken on purpose
            assert choose("check", candidates, timer, path) == {"BLOCK": 32}
        return measured == candidates

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "autotune.json"
        yield "the fastest is found", tunes(path)
        yield "asked again, nothing is measured", not tunes(path)
        _remembered.clear()  # as in a new process
        yield "nor in a new process", not tunes(path)
        for content in ("{", "[]", '{"check": "BLOCK"}', '{"check": {"BLOCK": 8}}'):
            _remembered.clear()
            path.write_text(content)
            yield f"a file that says {content} is not believed", tunes(path)
            _remembered.clear()
            yield "and is whole again", not tunes(path)
        _remembered.clear()
        yield "where nothing can be saved there is a choice all the same", tunes(path / "in a file" / "autotune.json")
    _remembered.clear()


def bench() -> list[common.Row]:
    """Times the candidates of lesson 9, its default first, for 16 tokens and a 2048 x 2048 weight."""
    m, n, k, group_size = 16, 2048, 2048, 64
    lesson: Any = importlib.import_module(SUBJECT)  # told what to tune by name, as lessons do not import each other
    packed: QuantizedWeight = quantize_reference(common.random_tensor(n, k), group_size)
    x, weight = common.random_tensor(m, k, seed=1), prepare(packed)
    return [
        {
            "m": m,
            "n": n,
            "k": k,
            "group_size": group_size,
            "default": number == 0,
            **options,
            "microseconds": time_options(lesson.matmul, x, weight, options),
        }
        for number, options in enumerate(lesson.candidates(m, n, k, group_size))
    ]


if __name__ == "__main__":
    common.run_lesson(check, bench)
