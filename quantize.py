"""Turns a GPT-2's linear layers into packed int4.

    python quantize.py                      GPT-2 124M, pretrained, from the hub
    python quantize.py demo                 the model that ships with this project; no network needed
    python quantize.py demo --method absmax --group-size 128 --output my-int4
    python quantize.py gpt2 --method gptq --calibration my_text.txt     codes chosen by what the layers are fed
    python quantize.py gpt2 --method tune                               and tuned: the least loss; wants a GPU

The blocks' linear layers become int4; the token embedding, which is the output layer as well, becomes int8, or what
--embedding says; the rest becomes fp16. Where there is a GPU it is used; methods that look at the weights alone give
the same codes with and without. `python eval.py` then says what it cost.
"""

import argparse
from pathlib import Path

import torch

from minigpt import arguments, checkpoint
from minigpt.device import add_device_argument, check_device
from minigpt.errors import UserError, run_script
from minigpt.model import GPT
from minigpt.quantization import gptq_format
from minigpt.quantization.calibration import Calibration, load_calibrations
from minigpt.quantization.convert import LayerReport, check_fits, read_group_size
from minigpt.quantization.embedding import CHOICES, quantize_embedding
from minigpt.quantization.recipe import (
    KNOWN,
    Recipe,
    add_calibration_arguments,
    check_calibration_arguments,
    describe,
    quantize,
    read_recipe,
)
from minigpt.table import format_bytes, format_table
from minigpt.tokenizer import FILE_NAME, tokenizer_for


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known = ", ".join(checkpoint.PRETRAINED)
    parser.add_argument(
        "model", nargs="?", default="gpt2", help=f"{known}, or the path of a checkpoint (default: gpt2)"
    )
    parser.add_argument(
        "--method",
        type=read_recipe,
        default=Recipe("mse"),
        help=f"how codes are chosen (default: mse):\n{KNOWN}",
    )
    parser.add_argument(
        "--group-size",
        type=read_group_size,
        default=64,
        help="weights that share a scale; 'row' for one a row (default: 64)",
    )
    parser.add_argument(
        "--embedding",
        choices=CHOICES,
        default="int8",
        help="the token embedding and output layer: int8, int4 in groups as the rest, or fp16,\n"
        "which other tools can read (default: int8)",
    )
    parser.add_argument(
        "--output", type=arguments.path, help="checkpoint folder to write (default: checkpoints/MODEL-int4)"
    )
    add_calibration_arguments(parser)
    parser.add_argument("--seed", type=arguments.seed, help="which windows of it (default: 0)")
    add_device_argument(parser)
    args = parser.parse_args()
    check_device(args.device)
    checkpoint.check_known(args.model)
    check_calibration_arguments(args, [args.method], args.method.calibrated)
    args.seed = args.seed or 0
    return args


def summary(reports: list[LayerReport]) -> str:
    """A table with a row for each kind of layer, one for all layers of the blocks, and one for a packed embedding."""
    rows = []
    blocks = [report for report in reports if report.kind != "wte"]
    for kind in [*dict.fromkeys(report.kind for report in blocks), "all", "wte"]:
        chosen = blocks if kind == "all" else [report for report in reports if report.kind == kind]
        if not chosen:
            continue
        weights = sum(report.weights for report in chosen)
        n_bytes = sum(report.stored_bytes for report in chosen)
        rows.append(
            [
                kind,
                str(len(chosen)),
                f"{weights:,}",
                f"{8 * n_bytes / weights:.2f}",
                format_bytes(2 * weights),
                format_bytes(n_bytes),
                f"{sum(report.mean_absolute_error * report.weights for report in chosen) / weights:.6f}",
                f"{100 * sum(report.relative_error for report in chosen) / len(chosen):.2f}%",
            ]
        )
    columns = ["layer", "layers", "weights", "bits/weight", "fp16", "packed", "mean |error|", "relative error"]
    return format_table(columns, rows)


def calibration_of(args: argparse.Namespace, path: Path, model: GPT) -> Calibration:
    """Reads the calibration text, and says how much of it is used and what to beware of."""
    tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), model.config.vocab_size)
    draw = (args.seed, args.method.tuning_windows(args.steps))
    calibration = load_calibrations(args.calibration, tokenizer, model.config, args.calibration_tokens, [draw])[draw]
    n_windows, length = calibration.windows.shape
    print(
        f"calibrating on {calibration.name}: {calibration.tokens:,} tokens, {n_windows} windows of {length}, "
        f"seed {calibration.seed}"
        + (f"; tuning on {len(calibration.tuning_windows)} windows" if args.method.tune else ""),
        flush=True,
    )
    for warning in calibration.warnings:
        print(f"warning: {warning}", flush=True)
    return calibration


def main() -> None:
    """Loads, quantizes with a progress bar, saves, and prints what was done."""
    args = parse_args()
    output = args.output or checkpoint.default_int4_folder(args.model)
    checkpoint.check_output(output)
    path = checkpoint.resolve(args.model)
    if output.exists() and output.samefile(checkpoint.checkpoint_folder(path)):
        raise UserError(f"--output {output} is the model's own folder, whose weights would be lost; give another")
    model = checkpoint.load(path, torch.float32, args.device)
    check_fits(model, args.group_size)
    if args.output is None and checkpoint.holds_another_model(output, model):
        raise UserError(f"{output} holds another model; to replace it, add --output {output}, or give another folder")
    before = 2 * sum(parameter.numel() for parameter in model.parameters())
    tokenizer_file = checkpoint.checkpoint_folder(path) / FILE_NAME
    calibration = calibration_of(args, path, model) if args.method.calibrated else None
    reports, notes = quantize(model, args.method, args.group_size, calibration, args.steps)
    if embedding_report := quantize_embedding(model, args.embedding, args.group_size):
        reports.append(embedding_report)
        notes.extend(embedding_report.notes)
    for note in notes:
        print(f"note: {note}")
    checkpoint.save(
        model,
        output,
        tokenizer_file if tokenizer_file.exists() else None,
        gptq_format.describe(
            str(args.method),
            args.group_size,
            args.method.symmetric,
            args.embedding,
            describe(args.method, calibration, args.steps) if calibration else None,
        ),
    )
    print(summary(reports))
    if calibration:
        print("errors are of the weights; this method lets them grow where that keeps outputs closer")
    after = checkpoint.file_bytes(output)
    print(
        f"whole model: {format_bytes(before)} in fp16, {format_bytes(after)} in {output}: {before / after:.2f}x smaller"
    )
    print(f"next: python eval.py {args.model}" + (f" --quantized {args.output}" if args.output else ""))


if __name__ == "__main__":
    run_script(main)
