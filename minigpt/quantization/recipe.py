"""Recipes: how a whole model is quantized, in one name, such as `gptq` or `awq+gptq+tune`.

A method (`methods.py`) chooses the codes. `awq+` before it scales the weights by what they are fed (`awq.py`); `+tune`
after it trains what came out towards the model it was made from (`tune.py`).
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kernels import dequantize
from minigpt import arguments
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import awq, tune
from minigpt.quantization.calibration import Calibration
from minigpt.quantization.convert import LayerReport, block_linears, quantize_model
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.methods import CALIBRATED, DATA_FREE, METHODS, SYMMETRIC

AWQ, TUNE = "awq+", "+tune"
TUNE_ALONE = "tune"  # short for the recipe that loses least
BEST = "yaqa+tune"
CALIBRATION_TOKENS = 65536
KNOWN = f"{', '.join(METHODS)}, awq+METHOD, METHOD+tune, or {TUNE_ALONE} for {BEST}"


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        method: by which of METHODS the codes are chosen.
        awq: whether weights are scaled by what they are fed before that.
        tune: whether the model is tuned after it.
    """

    method: str
    awq: bool = False
    tune: bool = False

    def __str__(self) -> str:
        """Its name, as `read_recipe` reads it."""
        return f"{AWQ if self.awq else ''}{self.method}{TUNE if self.tune else ''}"

    @property
    def calibrated(self) -> bool:
        """Whether it looks at text."""
        return self.awq or self.tune or self.method in CALIBRATED

    @property
    def symmetric(self) -> bool:
        """Whether all zeros are 8."""
        return self.method in SYMMETRIC

    def tuning_windows(self, steps: int) -> int:
        """How many windows of text so many steps of tuning read; 0 if nothing is tuned."""
        return steps * tune.BATCH_SIZE if self.tune else 0


def read_recipe(text: str) -> Recipe:
    """Reads a --method.

    Raises:
        argparse.ArgumentTypeError: there is no such recipe.
    """
    name = BEST if text == TUNE_ALONE else text
    method = name.removeprefix(AWQ).removesuffix(TUNE)
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {KNOWN}")
    return Recipe(method, name.startswith(AWQ), name.endswith(TUNE))


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what recipes that look at text want to know, but for the seed."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text for methods that look at some: c4, demo, OWNER/NAME[:CONFIG] on the hub, a text file\n"
        "or a folder (default: c4; for demo: demo, what it was trained on)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=arguments.at_least_1,
        help=f"how much of it layers are watched on (default: {CALIBRATION_TOKENS})",
    )
    parser.add_argument(
        "--steps",
        type=arguments.at_least_1,
        help=f"of tuning, each on {tune.BATCH_SIZE} windows of the text (default: {tune.STEPS})",
    )


def check_calibration_arguments(args: argparse.Namespace, recipes: Sequence[Recipe], calibrated: bool) -> None:
    """Checks what `add_calibration_arguments` added, and `--seed`; fills in defaults, `args.model` being known.

    The seed's default is the caller's: a script has one, or several.

    Args:
        args: changed in place.
        recipes: what `--method` asks for.
        calibrated: whether anything looks at text.

    Raises:
        UserError: a flag that nothing would read.
    """
    names = ", ".join(map(str, recipes)) or "these peers"
    for name in ("calibration", "calibration_tokens", "seed"):
        if getattr(args, name) is not None and not calibrated:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is for {', '.join(CALIBRATED)}, awq+METHOD and METHOD+tune, not for {names}")
    if args.steps is not None and not any(recipe.tune for recipe in recipes):
        raise UserError(f"--steps is for METHOD+tune, not for {names}")
    args.steps = tune.STEPS if args.steps is None else args.steps
    if args.calibration is None:
        args.calibration = "demo" if args.model == "demo" else "c4"
    args.calibration_tokens = CALIBRATION_TOKENS if args.calibration_tokens is None else args.calibration_tokens


def describe(recipe: Recipe, calibration: Calibration, steps: int) -> dict[str, Any]:
    """What a checkpoint's config.json says of the text, and of tuning on it."""
    tuning = {"steps": steps, "tuning_tokens": calibration.tuning_windows.numel()} if recipe.tune else {}
    return calibration.describe() | tuning


def quantize(
    model: GPT, recipe: Recipe, group_size: int, calibration: Calibration | None = None, steps: int = tune.STEPS
) -> tuple[list[LayerReport], list[str]]:
    """Quantizes a model in place, behind progress bars.

    Args:
        model: float32, in evaluation mode.
        recipe: how.
        group_size: weights that share a scale; WHOLE_ROW for one scale a row.
        calibration: text, for a calibrated recipe.
        steps: of tuning.

    Returns:
        A report for each layer, and what else is to be told, a line each.

    Raises:
        UserError: as `quantize_model`, `awq.scale` and `tune.tune` do.
    """
    if recipe.calibrated and calibration is None:
        raise ValueError(f"{recipe} needs calibration text")
    notes = []
    if recipe.awq and calibration:
        # Where that method looks at text itself, the search over scales is by the best that does not.
        rounding = DATA_FREE.get(recipe.method, DATA_FREE["mse"])
        scaled = awq.scale(model, calibration.windows, rounding, group_size)
        notes.append(awq.describe(scaled))
    reference = copy.deepcopy(model) if recipe.tune else None  # with awq's scales, which its codes will belong to
    watched = calibration.windows if calibration and recipe.method in CALIBRATED else None
    layers = quantize_model(model, METHODS[recipe.method], group_size, watched)
    n_layers = len(list(block_linears(model)))
    reports = list(tqdm(layers, total=n_layers, desc=recipe.method, unit="layer"))
    notes += [note for report in reports for note in report.notes]
    if reference and calibration:
        tuned = tune.tune(model, reference, calibration.tuning_windows, steps, seed=calibration.seed)
        notes.append(tuned.describe())
        reports = [_report_anew(report, reference, model) for report in reports]
    return reports, notes


@torch.no_grad()
def _report_anew(report: LayerReport, reference: GPT, model: GPT) -> LayerReport:
    """A layer's report after its codes have changed."""
    layer = model.get_submodule(report.name)
    assert isinstance(layer, Int4Linear)
    weight = reference.get_parameter(f"{report.name}.weight")
    return LayerReport.of(
        report.name, weight, dequantize(layer.weight, torch.float32), report.stored_bytes, report.notes
    )
