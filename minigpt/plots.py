"""Draws what `python -m minigpt.sweep` measured: perplexity and KL divergence against bits a weight. Needs matplotlib.

python -m minigpt.plots [FILE]      results/accuracy.json -> results/accuracy.png
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError, run_script
from minigpt.files import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours and two of Tol's, which colour-blind people tell apart too, and markers; methods take them in
# this order.
STYLES = (
    *(("#777777", "o"), ("#56B4E9", "D"), ("#0072B2", "s"), ("#CC79A7", "P"), ("#009E73", "^")),
    *(("#E69F00", "X"), ("#D55E00", "v"), ("#000000", "h"), ("#882255", "H"), ("#999933", ">")),
)
PEER_MARKERS = "*pd<>"
PEER = "peer:"  # before the name of a method that is not ours
TUNED = "+tune"  # behind the name of one that is tuned
# What is drawn of a measurement, and what tells where.
DRAWN = (
    *("method", "group_size", "bits_per_weight", "perplexity", "fp16_perplexity", "kl"),
    *("model", "text", "context_length", "stride", "gpu"),
)


def save_accuracy(path: Path) -> Path:
    """Draws a file of measurements as a .png beside it, whose path is returned.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    if not (rows := read_rows("the file", path, DRAWN)):
        raise UserError(f"{path}: no measurements; make them with: python -m minigpt.sweep")
    picture = path.with_suffix(".png")
    draw_accuracy(rows).savefig(picture, dpi=150)
    return picture


def panel_of(row: Row) -> tuple[Any, ...]:
    """What measurements must share to be compared: the model, the text, and how it was scored."""
    return (row["model"], row["text"], row["context_length"], row["stride"], row["gpu"])


def over_seeds(rows: Sequence[Row], measure: str) -> list[tuple[float, float, float, float]]:
    """(bits a weight; mean, least and greatest value over the seeds) for each group size of a method, in order."""
    by_size: dict[Any, list[Row]] = {}
    for row in rows:
        by_size.setdefault(row["group_size"], []).append(row)
    points = []
    for same in by_size.values():
        values = [row[measure] for row in same]
        points.append((same[0]["bits_per_weight"], statistics.mean(values), min(values), max(values)))
    return sorted(points)


def draw_accuracy(rows: Sequence[Row]) -> "Figure":
    """A column for each model and text: perplexity above, KL divergence below, against bits a weight.

    Methods are curves, FP16 is a line, peers are points.

    Args:
        rows: measurements as `minigpt.sweep` writes them. A bar spans the seeds, calibration texts and tuning steps
            of a method that depends on them.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(panel_of(row) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(max(7.5, 6.2 * len(panels)), 9.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (upper, lower), key in zip(axes.T, panels, strict=True):
        same = [row for row in rows if panel_of(row) == key]
        draw_panel(upper, same, methods, "perplexity", same[0]["fp16_perplexity"])
        draw_panel(lower, same, methods, "kl", 0.0)
        add_percent(upper, same[0]["fp16_perplexity"])
        upper.set_title(f"{same[0]['model']} on {same[0]['text']}, windows of {same[0]['context_length']}")
        upper.set_ylabel("perplexity")
        lower.set_ylabel("KL divergence from FP16, nats a token")
        lower.set_xlabel("bits a weight, scales and zeros included")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=4 * len(panels), frameon=False)
    return figure


def draw_panel(panel: "Axes", rows: Sequence[Row], methods: Sequence[str], measure: str, fp16: float) -> None:
    """A panel of `draw_accuracy`: `measure` of the rows, and FP16's; `methods` gives each method its colour.

    What is tuned looks like what it was made from, but hollow.
    """
    ours = list(dict.fromkeys(method.removesuffix(TUNED) for method in methods if not method.startswith(PEER)))
    peers = [method for method in methods if method.startswith(PEER)]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        bits, means, least, greatest = zip(*over_seeds(of_method, measure), strict=True)
        if method not in peers:
            colour, marker = STYLES[ours.index(method.removesuffix(TUNED)) % len(STYLES)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "-", "ms": 6, "lw": 1.8}
            if method.endswith(TUNED):
                style |= {"mfc": "white", "mew": 1.6, "linestyle": "--"}
        else:
            marker = PEER_MARKERS[peers.index(method) % len(PEER_MARKERS)]
            style = {"color": "black", "marker": marker, "mfc": "white", "linestyle": "none", "ms": 9}
        label = method.removeprefix(PEER) + (" (peer)" if method in peers else "")
        panel.plot(bits, means, label=label, **style)
        panel.vlines(bits, least, greatest, color=style["color"], linewidth=1.2)
    panel.axhline(fp16, color="black", linewidth=1.2, linestyle="--", label="FP16")
    panel.grid(alpha=0.3)


def add_percent(panel: "Axes", fp16: float) -> None:
    """Adds an axis on the right: how far perplexity is over FP16's."""

    def rise(perplexity: Any) -> Any:  # noqa: ANN401 (an array, or whatever matplotlib makes of it)
        """How much more than FP16's, in percent."""
        return 100 * (perplexity / fp16 - 1)

    def perplexity_of(rise: Any) -> Any:  # noqa: ANN401
        """The perplexity that is so much more than FP16's."""
        return fp16 * (1 + rise / 100)

    percent = panel.secondary_yaxis("right", functions=(rise, perplexity_of))
    percent.set_ylabel("over FP16")
    percent.yaxis.set_major_formatter(lambda value, _: f"{value:+g}%" if value else "0%")


def main() -> None:
    """Draws a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("results/accuracy.json"))
    print(save_accuracy(parser.parse_args().file))


if __name__ == "__main__":
    run_script(main)
