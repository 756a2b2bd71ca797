"""What int4 costs: every method at every group size, against FP16, into results/accuracy.json and a plot.

    python -m minigpt.sweep demo                                          all methods, groups of 32, 64, 128, whole rows
    python -m minigpt.sweep gpt2 --method absmax mse --group-size 64 128
    python -m minigpt.sweep demo --method gptq awq+gptq gptq+tune --seed 0 1 2
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
from tqdm import tqdm

from minigpt import checkpoint, data, evaluate, plots
from minigpt.device import add_device_argument, arithmetic_dtype, check_device, describe_device
from minigpt.errors import UserError, run_script
from minigpt.files import check_file, write_json
from minigpt.generate import seed as read_seed
from minigpt.model import GPT
from minigpt.peers import PEERS, check_installed
from minigpt.quantization import awq, tune
from minigpt.quantization.calibration import Calibration, load_calibration
from minigpt.quantization.convert import (
    WHOLE_ROW,
    bits_per_weight,
    block_linears,
    check_fits,
    quantize_model,
    read_group_size,
)
from minigpt.quantization.methods import CALIBRATED, DATA_FREE, METHODS
from minigpt.table import format_table
from minigpt.tokenizer import encode, tokenizer_for

PEER = "peer:"  # before the name of a method that is not ours
AWQ, TUNE = "awq+", "+tune"  # before and after the name of one that is: the passes around it
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
    parser.add_argument(
        "--method",
        nargs="*",
        type=read_method,
        default=list(METHODS),
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or awq+METHOD, METHOD+tune (default: all, without these passes)",
    )
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[], help="quantizers that are installed here")
    parser.add_argument(
        "--group-size", nargs="+", type=read_group_size, help="(default: those of 32 64 128 row that fit the model)"
    )
    parser.add_argument("--calibration", help="text for methods that look at some (default: c4; for demo: demo)")
    parser.add_argument("--calibration-tokens", type=int, default=65536, help="how much of it (default: 65536)")
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
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, it must be at least 1")
    args.calibration = args.calibration or ("demo" if args.model == "demo" else "c4")
    args.dataset = args.dataset or ("demo" if args.model == "demo" else "wikitext-2")
    return args


def read_method(text: str) -> str:
    """Reads one of --method."""
    if text.removeprefix(AWQ).removesuffix(TUNE) not in METHODS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(METHODS)}, nor one of them with {AWQ} before or {TUNE} after it"
        )
    return text


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
    if method.startswith(PEER):
        return PEERS[method.removeprefix(PEER)].calibrated
    return method not in DATA_FREE


def jobs(args: argparse.Namespace, group_sizes: Sequence[int]) -> Iterator[tuple[str, int, int | None]]:
    """Yields (method, group size, seed): what is to be measured. The seed is None where nothing depends on it."""
    methods = [*args.method, *(PEER + name for name in args.peer)]
    for method, group_size in itertools.product(methods, group_sizes):
        for seed in args.seed if is_calibrated(method) else [None]:
            yield method, group_size, seed


def quantized(
    path: Path, method: str, group_size: int, calibration: Calibration | None, device: str
) -> tuple[GPT, float, float]:
    """A model quantized in memory.

    Args:
        path: of the FP checkpoint.
        method: as `read_method` takes it, or PEER and the name of one of PEERS.
        group_size: weights that share a scale, or WHOLE_ROW.
        calibration: text, for those that look at some.
        device: where.

    Returns:
        The model, as it is after being saved in fp16; its bits a weight; the seconds that quantizing took.
    """
    model = checkpoint.load(path, torch.float32, device)
    begin = time.perf_counter()
    if method.startswith(PEER):
        windows = calibration.windows if calibration else None
        model, bits = PEERS[method.removeprefix(PEER)].quantize(model, group_size, windows)
    else:
        apply(method, model, path, group_size, calibration, device)
        bits = bits_per_weight(model)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return model.to(torch.float16).to(arithmetic_dtype(device)), bits, seconds


def apply(method: str, model: GPT, path: Path, group_size: int, calibration: Calibration | None, device: str) -> None:
    """Quantizes a model in place by one of our methods and the passes around it. Arguments as in `quantized`."""
    name = method.removeprefix(AWQ).removesuffix(TUNE)
    if method.startswith(AWQ):
        assert calibration is not None
        awq.scale(model, calibration.windows, DATA_FREE.get(name, DATA_FREE["mse"]), group_size)
    windows = calibration.windows if calibration is not None and name in CALIBRATED else None
    steps = quantize_model(model, METHODS[name], group_size, windows)
    for _ in tqdm(steps, total=len(list(block_linears(model))), desc=method, unit="layer", leave=False):
        pass
    if method.endswith(TUNE):
        assert calibration is not None
        reference = checkpoint.load(path, torch.float32, device)
        tune.tune(model, reference, calibration.windows, seed=calibration.seed)


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
    calibrations: dict[int | None, Calibration] = {
        seed: load_calibration(args.calibration, tokenizer, reference.config, args.calibration_tokens, seed)
        for seed in args.seed
        if any(is_calibrated(method) for method, *_ in todo)
    }
    for warning in dict.fromkeys(warning for each in calibrations.values() for warning in each.warnings):
        print(f"warning: {warning}", flush=True)

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
        calibration = calibrations.get(seed)
        model, bits, seconds = quantized(path, method, group_size, calibration, args.device)
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
            "calibration": short_name(args.calibration) if calibration else None,
            "calibration_tokens": calibration.tokens if calibration else None,
            "gpu": describe_device(args.device) if args.device.startswith("cuda") else "cpu",
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
