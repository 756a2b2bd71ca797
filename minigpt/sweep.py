"""What int4 costs: every method at every group size, against FP16, into results/accuracy.json and a plot.

    python -m minigpt.sweep demo                                          all methods, groups of 32, 64, 128, whole rows
    python -m minigpt.sweep gpt2 --method absmax mse --group-size 64 128
    python -m minigpt.sweep demo --method gptq awq+gptq gptq+tune --seed 0 1 2
    python -m minigpt.sweep demo --peer hqq quanto gptqmodel --method     other people's quantizers, and none of ours
    python -m minigpt.plots                                               draws the plot anew

A measurement is a model whose blocks are quantized in memory, as quantize.py does it, and which is scored as eval.py
does it; the embedding, which quantize.py packs too, stays as it is. Each is written at once: an interrupted sweep keeps
what it has measured. One that is in the file already, of the same model, text, method, group size, seed, calibration
and device, is replaced.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken
import torch
from tqdm import tqdm

from minigpt import arguments, checkpoint, data, evaluate, plots
from minigpt.config import GPTConfig
from minigpt.device import add_device_argument, arithmetic_dtype, check_device, describe_device, versions
from minigpt.errors import UserError, run_script
from minigpt.files import Row, add_row, check_file, read_rows
from minigpt.model import GPT
from minigpt.peers import PEERS, check_installed
from minigpt.plots import PEER
from minigpt.quantization.calibration import Calibration, Draw, load_calibrations
from minigpt.quantization.convert import (
    WHOLE_ROW,
    bits_per_weight,
    check_fits,
    fitting_group_sizes,
    read_group_size,
)
from minigpt.quantization.methods import METHODS
from minigpt.quantization.recipe import (
    KNOWN,
    Recipe,
    add_calibration_arguments,
    check_calibration_arguments,
    quantize,
    read_recipe,
)
from minigpt.table import format_table
from minigpt.tokenizer import encode, tokenizer_for

GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
# What tells one measurement from another: of two that agree in all of these, the newer one counts.
IDENTITY = (
    *("model", "text", "method", "group_size", "seed", "gpu", "context_length", "stride"),
    *("calibration", "calibration_tokens", "tuning_steps"),
)


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
        type=read_recipe,
        default=list(map(Recipe, METHODS)),
        metavar="METHOD",
        help=f"{KNOWN}\n(default: all, without awq and tune)",
    )
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[], help="quantizers that are installed here")
    parser.add_argument(
        "--group-size", nargs="+", type=read_group_size, help="(default: those of 32 64 128 row that fit the model)"
    )
    add_calibration_arguments(parser)
    parser.add_argument("--seed", nargs="+", type=arguments.seed, help="which parts of it, each measured (default: 0)")
    parser.add_argument("--context-length", type=int, help="tokens in a window (default: as many as the model reads)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: the context length)")
    parser.add_argument("--batch-size", type=arguments.at_least_1, default=8, help="windows at once (default: 8)")
    parser.add_argument("--json", type=arguments.path, metavar="FILE", default=Path("results/accuracy.json"))
    add_device_argument(parser)
    args = parser.parse_args()
    check_device(args.device)
    check_file("--json", args.json)
    for name in args.peer:
        check_installed(name)
    if not args.method and not args.peer:
        raise UserError("--method names none, and there is no --peer: nothing to measure")
    calibrated = any(map(is_calibrated, [*args.method, *args.peer]))
    check_calibration_arguments(args, args.method, calibrated)
    args.seed = args.seed or [0]
    if args.dataset is None:
        args.dataset = data.default_text(args.model)
    return args


def fitting_sizes(model: GPT, asked: Sequence[int] | None) -> list[int]:
    """The group sizes to measure: those that were asked for, or else the usual ones that fit.

    Raises:
        UserError: one that was asked for does not fit the model, none does, or the model is int4 already.
    """
    fitting = [*fitting_group_sizes(model), WHOLE_ROW]
    for size in asked or ():
        check_fits(model, size)
    return list(asked) if asked else [size for size in GROUP_SIZES if size in fitting]


def is_calibrated(method: Recipe | str) -> bool:
    """Whether a recipe or a peer looks at text, so that each seed gives something else."""
    return method.calibrated if isinstance(method, Recipe) else PEERS[method].calibrated


def draw_of(method: Recipe | str, seed: int | None, steps: int) -> Draw | None:
    """What a measurement needs of the calibration text; None if nothing."""
    if seed is None:
        return None
    return seed, method.tuning_windows(steps) if isinstance(method, Recipe) else 0


def jobs(args: argparse.Namespace, group_sizes: Sequence[int]) -> Iterator[tuple[Recipe | str, int, int | None]]:
    """Yields (recipe or peer, group size, seed): what is to be measured. No seed: nothing depends on it."""
    for method, group_size in itertools.product([*args.method, *args.peer], group_sizes):
        for seed in args.seed if is_calibrated(method) else [None]:
            yield method, group_size, seed


def quantized(
    path: Path, method: Recipe | str, group_size: int, calibration: Calibration | None, steps: int, device: str
) -> tuple[GPT, float, float]:
    """A model quantized in memory.

    Args:
        path: of the FP checkpoint.
        method: how; a name is one of PEERS.
        group_size: weights that share a scale, or WHOLE_ROW.
        calibration: text, for those that look at some.
        steps: of tuning.
        device: where.

    Returns:
        The model, as it is after being saved in fp16; its bits a weight; the seconds that quantizing took.
    """
    model = checkpoint.load(path, torch.float32, device)
    begin = time.perf_counter()
    if isinstance(method, Recipe):
        _, notes = quantize(model, method, group_size, calibration, steps)
        for note in notes:
            tqdm.write(f"{method}: {note}")
        bits = bits_per_weight(model)
    else:
        model, bits = PEERS[method].quantize(model, group_size, calibration.windows if calibration else None)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return model.to(torch.float16).to(arithmetic_dtype(device)), bits, seconds


def short_name(name: str) -> str:
    """A model's or a text's name as it stands in a table: of a path, the last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def name_of(method: Recipe | str) -> str:
    """What a measurement's `method` says: a recipe, or a peer."""
    return str(method) if isinstance(method, Recipe) else PEER + method


def labels(
    method: Recipe | str, group_size: int, seed: int | None, calibration: Calibration | None, args: argparse.Namespace
) -> Row:
    """What tells a measurement from others, and all that one needs to take it again."""
    tuned = isinstance(method, Recipe) and method.tune
    return {
        "model": short_name(args.model),
        "text": short_name(args.dataset),
        "method": name_of(method),
        "group_size": "row" if group_size == WHOLE_ROW else group_size,
        "seed": seed,
        "calibration": short_name(args.calibration) if calibration else None,
        "calibration_tokens": calibration.tokens if calibration else None,
        "tuning_steps": args.steps if tuned else None,
        "tuning_tokens": calibration.tuning_windows.numel() if calibration and tuned else None,
        "gpu": describe_device(args.device) if args.device.startswith("cuda") else "cpu",
        **versions(),
        "peer_version": None if isinstance(method, Recipe) else PEERS[method].version,
        "date": datetime.date.today().isoformat(),
        "command": "python -m minigpt.sweep " + shlex.join(sys.argv[1:]),
    }


def read_calibrations(
    args: argparse.Namespace, tokenizer: tiktoken.Encoding, config: GPTConfig, draws: Sequence[Draw]
) -> dict[Draw, Calibration]:
    """The calibration text of each draw, if there is any; says what to beware of."""
    if not draws:
        return {}
    calibrations = load_calibrations(args.calibration, tokenizer, config, args.calibration_tokens, draws)
    for warning in dict.fromkeys(warning for each in calibrations.values() for warning in each.warnings):
        print(f"warning: {warning}", flush=True)
    return calibrations


def main() -> None:
    """Measures, writes each measurement at once, then prints a table and draws the plot."""
    args = parse_args()
    read_rows("--json", args.json, (*IDENTITY, *plots.DRAWN))  # or it is no file of such measurements
    path = checkpoint.resolve(args.model)
    reference = checkpoint.load(path, torch.float16)
    sizes = fitting_sizes(reference, args.group_size)
    reference = reference.to(device=args.device, dtype=arithmetic_dtype(args.device))
    length, stride = evaluate.window_sizes(reference, args.context_length, args.stride)
    tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), reference.config.vocab_size)
    tokens = torch.tensor(encode(tokenizer, data.load_text(args.dataset)), device=args.device)
    todo = list(jobs(args, sizes))
    draws = dict.fromkeys(draw for method, _, seed in todo if (draw := draw_of(method, seed, args.steps)))
    calibrations = read_calibrations(args, tokenizer, reference.config, list(draws))

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
        draw = draw_of(method, seed, args.steps)
        calibration = calibrations[draw] if draw else None
        model, bits, seconds = quantized(path, method, group_size, calibration, args.steps, args.device)
        result = score(model, name_of(method), reference)
        del model
        measurement = {
            "bits_per_weight": bits,
            "perplexity": result.perplexity,
            "fp16_perplexity": fp16,
            "kl": result.kl,
            "top1": result.top1,
            "tokens_scored": result.tokens_scored,
            "context_length": length,
            "stride": stride,
            "quantize_seconds": round(seconds, 3),
        }
        measured.append(labels(method, group_size, seed, calibration, args) | measurement)
        add_row("--json", args.json, measured[-1], IDENTITY)
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
