"""What int4 costs: every method at every group size, against FP16, into results/accuracy.json and a plot.

    python -m minigpt.sweep demo                                          all methods, groups of 32, 64, 128, whole rows
    python -m minigpt.sweep gpt2 --method absmax mse --group-size 64 128
    python -m minigpt.sweep demo --peer hqq quanto gptqmodel --method     other people's quantizers, and none of ours
    python -m minigpt.plots                                               draws the plot anew

A measurement is a model quantized in memory, as quantize.py does it, and scored as eval.py does it. Each is written at
once: an interrupted sweep keeps what it has measured. One that is in the file already, of the same model, text, method,
group size, seed and device, is replaced.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt import checkpoint, data, evaluate, plots
from minigpt.device import add_device_argument, arithmetic_dtype, check_device, describe_device
from minigpt.errors import UserError, run_script
from minigpt.files import check_file, write_json
from minigpt.generate import seed as read_seed
from minigpt.model import GPT
from minigpt.peers import PEERS, check_installed
from minigpt.quantization.convert import (
    WHOLE_ROW,
    bits_per_weight,
    block_linears,
    check_fits,
    quantize_model,
    read_group_size,
)
from minigpt.quantization.rtn import METHODS
from minigpt.table import format_table
from minigpt.tokenizer import encode, tokenizer_for

PEER = "peer:"  # before the name of a method that is not ours
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
# What tells one measurement from another: of two that agree in all of these, the newer one counts.
IDENTITY = ("model", "text", "method", "group_size", "seed", "gpu", "context_length", "stride")

Row = dict[str, Any]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known = ", ".join(checkpoint.PRETRAINED)
    parser.add_argument(
        "model", nargs="?", default="gpt2", help=f"{known}, or the path of a checkpoint (default: gpt2)"
    )
    parser.add_argument("--dataset", help="text to score, as for eval.py (default: wikitext-2; for demo: demo)")
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS), help="ours (default: all)")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[], help="quantizers that are installed here")
    parser.add_argument(
        "--group-size", nargs="+", type=read_group_size, help="(default: those of 32 64 128 row that fit the model)"
    )
    parser.add_argument("--calibration", default="demo", help="text for methods that look at some (default: demo)")
    parser.add_argument("--calibration-tokens", type=int, default=131072, help="how much of it (default: 131072)")
    parser.add_argument(
        "--seed", nargs="+", type=read_seed, default=[0], help="which parts of it, each measured (default: 0)"
    )
    parser.add_argument("--context-length", type=int, help="tokens in a window (default: as many as the model reads)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: the context length)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("results/accuracy.json"))
    add_device_argument(parser)
    args = parser.parse_args()
    check_device(args.device)
    check_file("--json", args.json)
    for name in args.peer:
        check_installed(name)
    for name in ("batch_size", "calibration_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    args.dataset = args.dataset or ("demo" if args.model == "demo" else "wikitext-2")
    return args


def read_rows(path: Path) -> list[Row]:
    """The measurements in a file; none if there is no such file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= set(IDENTITY) for row in rows):
        raise UserError(f"{path}: not a list of measurements; give --json another file")
    return rows


def merge(rows: Sequence[Row], row: Row) -> list[Row]:
    """The measurements with one more, in the place of the one that it repeats or else at the end."""

    def identity(row: Row) -> list[Any]:
        """What the row is a measurement of."""
        return [row[name] for name in IDENTITY]

    places = [identity(other) for other in rows]
    if identity(row) not in places:
        return [*rows, row]
    return [row if place == identity(row) else other for place, other in zip(places, rows, strict=True)]


def fitting_sizes(model: GPT, asked: Sequence[int] | None) -> list[int]:
    """The group sizes to measure: those that were asked for, or else the usual ones that fit.

    Raises:
        UserError: one that was asked for does not fit the model, or the model is int4 already.
    """
    check_fits(model, WHOLE_ROW)
    if asked:
        for size in asked:
            check_fits(model, size)
        return list(asked)
    return [size for size in GROUP_SIZES if size == WHOLE_ROW or _fits(model, size)]


def _fits(model: GPT, group_size: int) -> bool:
    return all(layer.in_features % group_size == 0 for _, layer in block_linears(model))


def is_calibrated(method: str) -> bool:
    """Whether a method looks at text, so that each seed gives something else."""
    return method.startswith(PEER) and PEERS[method.removeprefix(PEER)].calibrated


def jobs(args: argparse.Namespace, group_sizes: Sequence[int]) -> Iterator[tuple[str, int, int | None]]:
    """Yields (method, group size, seed): what is to be measured. The seed is None where nothing depends on it."""
    methods = [*args.method, *(PEER + name for name in args.peer)]
    for method, group_size in itertools.product(methods, group_sizes):
        for seed in args.seed if is_calibrated(method) else [None]:
            yield method, group_size, seed


def quantized(path: Path, method: str, group_size: int, windows: Tensor, device: str) -> tuple[GPT, float, float]:
    """A model quantized in memory.

    Args:
        path: of the FP checkpoint.
        method: one of METHODS, or PEER and the name of one of PEERS.
        group_size: weights that share a scale, or WHOLE_ROW.
        windows: int64 [n, T], text for those that look at some.
        device: where.

    Returns:
        The model, as it is after being saved in fp16; its bits a weight; the seconds that quantizing took.
    """
    model = checkpoint.load(path, torch.float32, device)
    begin = time.perf_counter()
    if method.startswith(PEER):
        model, bits = PEERS[method.removeprefix(PEER)].quantize(model, group_size, windows)
    else:
        n_layers = len(list(block_linears(model)))
        for _ in tqdm(
            quantize_model(model, METHODS[method], group_size), total=n_layers, desc=method, unit="layer", leave=False
        ):
            pass
        bits = bits_per_weight(model)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return model.to(torch.float16).to(arithmetic_dtype(device)), bits, seconds


def calibration_windows(name: str, tokens: Tensor, length: int, n_tokens: int, seed: int) -> Tensor:
    """Windows from random places of a text: int64 [n, length], of about n_tokens in all."""
    if len(tokens) < length:
        raise UserError(f"--calibration {name} has {len(tokens)} tokens, fewer than a window of {length}")
    generator = torch.Generator().manual_seed(seed)
    return data.random_windows(tokens, max(1, n_tokens // length), length, generator)


def short_name(name: str) -> str:
    """A model's or a text's name as it stands in a table: of a path, the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def versions() -> dict[str, str | None]:
    """Of what a measurement depends on."""
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else None,
    }


def main() -> None:
    """Measures, writes each measurement at once, then prints a table and draws the plot."""
    args = parse_args()
    rows = read_rows(args.json)
    path = checkpoint.resolve(args.model)
    reference = checkpoint.load(path, torch.float16)
    sizes = fitting_sizes(reference, args.group_size)
    reference = reference.to(device=args.device, dtype=arithmetic_dtype(args.device))
    length = reference.config.n_positions if args.context_length is None else args.context_length
    stride = length if args.stride is None else args.stride
    evaluate.check_windows(reference, length, stride)
    tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), reference.config.vocab_size)
    tokens = torch.tensor(encode(tokenizer, data.load_text(args.dataset)), device=args.device)
    todo = list(jobs(args, sizes))
    calibration = torch.empty(0, dtype=torch.int64)
    if any(is_calibrated(method) for method, *_ in todo):
        calibration = torch.tensor(encode(tokenizer, data.load_text(args.calibration, "train")))

    def score(model: GPT, label: str, against: GPT | None = None) -> evaluate.Score:
        """Scores a model, FP16 or int4, on the text."""
        return evaluate.perplexity(model, tokens, length, stride, args.batch_size, label, against)

    fp16 = score(reference, "fp16").perplexity
    print(
        f"{args.model} on {args.dataset}: {len(tokens):,} tokens, windows of {length}, stride {stride}, "
        f"{describe_device(args.device)}; perplexity of FP16: {fp16:.3f}",
        flush=True,
    )
    measured: list[Row] = []
    for method, group_size, seed in tqdm(todo, desc="sweep", unit="model", file=sys.stderr):
        windows = calibration  # not looked at
        if seed is not None:
            window = reference.config.n_positions
            windows = calibration_windows(args.calibration, calibration, window, args.calibration_tokens, seed)
        model, bits, seconds = quantized(path, method, group_size, windows, args.device)
        result = score(model, method, reference)
        del model
        row = {
            "model": short_name(args.model),
            "text": short_name(args.dataset),
            "method": method,
            "group_size": "row" if group_size == WHOLE_ROW else group_size,
            "seed": seed,
            "bits_per_weight": bits,
            "perplexity": result.perplexity,
            "fp16_perplexity": fp16,
            "kl": result.kl,
            "top1": result.top1,
            "tokens_scored": result.tokens_scored,
            "context_length": length,
            "stride": stride,
            "quantize_seconds": round(seconds, 3),
            "calibration": None if seed is None else short_name(args.calibration),
            "calibration_tokens": None if seed is None else windows.numel(),
            "gpu": describe_device(args.device),
            **versions(),
            "peer_version": PEERS[method.removeprefix(PEER)].version if method.startswith(PEER) else None,
            "date": datetime.date.today().isoformat(),
            "command": "python -m minigpt.sweep " + shlex.join(sys.argv[1:]),
        }
        measured.append(row)
        rows = merge(rows, row)
        write_json(args.json, rows)
    print(format_measurements(measured))
    if importlib.util.find_spec("matplotlib"):
        print(f"{args.json}; {plots.save_accuracy(args.json)}")


def format_measurements(rows: Sequence[Row]) -> str:
    """A table of what was measured, a line each."""
    cells = [
        [
            row["method"],
            str(row["group_size"]),
            "" if row["seed"] is None else str(row["seed"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{100 * (row['perplexity'] / row['fp16_perplexity'] - 1):+.2f}%",
            f"{row['kl']:.5f}",
            f"{100 * row['top1']:.2f}%",
            f"{row['quantize_seconds']:.1f}",
        ]
        for row in rows
    ]
    columns = ["method", "group", "seed", "bits/weight", "perplexity", "change", "KL", "top-1", "seconds"]
    return format_table(columns, cells)


if __name__ == "__main__":
    run_script(main)
