"""Draws what `python -m kernels.bench` measured. Needs matplotlib, which nothing else here does."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.common import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart too.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#777777"

# mode: label, colour, marker, line
MODES = {
    "w4a16": ("int4 weights, 16-bit activations", BLUE, "o", "-"),
    "w4a8": ("int4 weights, 8-bit activations", ORANGE, "s", "-"),
    "peer:torch": ("torch's int4", GREEN, "^", "--"),
    "peer:gemlite": ("GemLite", PURPLE, "v", "--"),
}
FP16 = "FP16, torch's matmul"
METHODS = {
    "plain absmax": ("max |w| / 8, codes -8..7", GREY, "o", "-"),
    "absmax": ("absmax: symmetric, whole range", BLUE, "s", "-"),
    "minmax": ("minmax: asymmetric, whole range", SKY, "D", "-"),
    "mse symmetric": ("symmetric, least squared error", GREEN, "^", "-"),
    "mse": ("mse: asymmetric, least squared error", ORANGE, "v", "-"),
}

# Mean absolute errors on a normal distribution when the squared error is as small as it can be
# (tests/kernels/test_bench.py works them out).
UNIFORM_MAE = 0.0866  # sixteen uniform levels with one scale for all weights
BEST_MAE_AT_64 = {"symmetric": 0.0754, "asymmetric": 0.0734}  # a scale (and a whole zero) for every 64


def draw_all(folder: Path) -> list[Path]:
    """Draws folder/matmul.json and folder/quantization.json, those that exist, as .png beside them.

    Returns:
        The pictures.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if one is not JSON.
    """
    drawings = {folder / "matmul.json": draw_matmul, folder / "quantization.json": draw_quantization}
    found = [path for path in drawings if path.exists()]
    if not found:
        raise FileNotFoundError(f"neither {' nor '.join(map(str, drawings))} exists: measure first")
    for path in found:
        try:
            rows = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        figure = drawings[path](rows)
        figure.savefig(path.with_suffix(".png"), dpi=150)
    return [path.with_suffix(".png") for path in found]


def draw_matmul(rows: Sequence[Row]) -> "Figure":
    """Times FP16 against tokens: a panel for each shape, with the largest group size measured for it."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    columns = min(len(shapes), 3 if len(shapes) <= 9 else 4)
    height = math.ceil(len(shapes) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.4, 2.7 * height + 0.9), layout="constrained")
    panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (n, k) in zip(panels, shapes, strict=False):
        of_shape = [row for row in rows if (row["n"], row["k"]) == (n, k) and "microseconds" in row]
        group_size = max(row["group_size"] for row in of_shape)
        draw_shape(panel, [row for row in of_shape if row["group_size"] == group_size])
        panel.set_title(f"{n} x {k}, groups of {group_size}", fontsize=10)
    for panel in panels[len(shapes) :]:
        panel.set_visible(False)
    for i in range(len(shapes)):
        if i + columns >= len(shapes):  # the lowest of its column, where the panel below is hidden or there is none
            panels[i].tick_params(labelbottom=True)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    names = [name for name in (*(label for label, *_ in MODES.values()), FP16) if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("tokens (M)", fontsize=11)
    figure.supylabel(f"times FP16 on {rows[0]['gpu']}", fontsize=11)
    return figure


def draw_shape(panel: "Axes", rows: Sequence[Row]) -> None:
    """A panel of `draw_matmul`: a line for each mode, and FP16 as the line at 1."""
    for mode, (label, colour, marker, line) in MODES.items():
        points = sorted((row["m"], row["times_fp16"]) for row in rows if row["mode"] == mode)
        if points:
            panel.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, linestyle=line, ms=5)
    tokens = sorted({row["m"] for row in rows})
    panel.axhline(1.0, label=FP16, color="black", linewidth=1.2)
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens, [str(m) for m in tokens])
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.grid(alpha=0.3)


def draw_quantization(rows: Sequence[Row]) -> "Figure":
    """Mean absolute error against bits a weight: a curve for each method, what was published, what is possible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    bits = {row["group_size"]: row["bits_per_weight"] for row in rows}
    for method, (label, colour, marker, line) in METHODS.items():
        points = sorted((row["group_size"], row["mae"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, linestyle=line, ms=5)
    published = {row["group_size"]: row["published_mae"] for row in rows if row["published_mae"]}
    axes.plot(list(published), list(published.values()), "x", color="black", ms=8, label="max |w| / 8, as published")
    best = list(BEST_MAE_AT_64.values())
    axes.plot([64] * len(best), best, "*", color="black", mfc="white", ms=9, label="least squared error possible at 64")
    axes.axhline(UNIFORM_MAE, color="black", linestyle=":", label="sixteen uniform levels, one scale for all")
    axes.set_xscale("log", base=2)
    axes.invert_xaxis()
    axes.set_xticks(list(bits), [f"{value:.2f}\n{size}" for size, value in bits.items()])
    axes.set_xlabel("bits a weight, scales and zeros included\nweights that share a scale")
    axes.set_ylabel("mean absolute error")
    axes.set_title(f"Int4 on a {rows[0]['n']} x {rows[0]['k']} standard normal matrix")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False)
    return figure
