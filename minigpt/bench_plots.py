"""Draws what `python -m minigpt.bench` measured. Needs matplotlib.

decode.json    tokens a second against the model's size, a panel for each batch
profile.json   where a decode step's time goes, a bar for each way to compute it
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError
from minigpt.files import Row, read_rows
from minigpt.step_profile import GAPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart too.
GREY, BLUE, ORANGE = "#777777", "#0072B2", "#D55E00"
# Of a step's parts (minigpt.step_profile), in the order in which they are drawn: what reads weights, attention, what
# costs little but its launch. A part that is not here takes one of OTHER_COLOURS.
PART_COLOURS = {
    "attn.c_attn": "#08519C",
    "attn.c_proj": "#3182BD",
    "mlp.c_fc": "#6BAED6",
    "mlp.c_proj": "#B9D7EE",
    "linear layers, fused": "#0072B2",
    "output layer": "#54278F",
    "attention": "#E69F00",
    "LayerNorm": "#006D2C",
    "GELU": "#41AB5D",
    "residual sums": "#A1D99B",
    "embedding": "#CC79A7",
    "cache mask": "#E7B8D3",
    "sampling": "#8C2D04",
}
OTHER_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#332288", "#999933", "#882255")
GAPS_COLOUR = "#DDDDDD"

# A line of the plot: is it int4, how it is computed (at each context the fastest counts), its name, colour, marker.
LINES: tuple[tuple[bool, tuple[str, ...], str, str, str], ...] = (
    (True, ("fused",), "int4, fused kernels", ORANGE, "s"),
    (False, ("captured", "compiled"), "FP16, captured, and compiled where faster", BLUE, "o"),
    (False, ("eager",), "FP16, eager", GREY, "^"),
)
CPU_LINES = (
    (True, ("eager",), "int4", ORANGE, "s"),
    (False, ("eager",), "floating point", BLUE, "o"),
)


def draw_all(folder: Path) -> list[Path]:
    """Draws folder/decode.json and folder/profile.json, those that exist, as .png beside them, whose paths it returns.

    Raises:
        UserError: neither is there, or matplotlib is not.
    """
    if not find_spec("matplotlib"):
        raise UserError("plots need matplotlib: pip install matplotlib")
    drawings = {folder / "decode.json": draw_decode, folder / "profile.json": draw_profile}
    found = [path for path in drawings if path.is_file()]
    if not found:
        raise UserError(f"--folder {folder} has neither decode.json nor profile.json; measure first")
    for path in found:
        figure = drawings[path](read_rows("--folder", path, ("gpu", "model", "how")))
        figure.savefig(path.with_suffix(".png"), dpi=150)
    return [path.with_suffix(".png") for path in found]


def on_gpus(rows: Sequence[Row]) -> list[Row]:
    """The decode measurements taken on a GPU; if there is none, all."""
    decode = [row for row in rows if row["what"] == "decode"]
    return [row for row in decode if not row["gpu"].startswith("cpu")] or decode


def points(rows: Sequence[Row], models: Sequence[str], line: tuple[Any, ...]) -> list[tuple[int, Row, Row]]:
    """Of a line: (place of the model, its measurement at the shortest context, that at the longest)."""
    int4, hows, *_ = line
    found = []
    for place, model in enumerate(models):
        of_model = [row for row in rows if row["model"] == model and (row["weights"] == "int4") == int4]
        embedding = next((row["embedding"] for row in of_model), None)  # the one measured first
        same = [row for row in of_model if row["how"] in hows and row["embedding"] == embedding]
        if same:
            fastest = {row["context"]: row for row in sorted(same, key=lambda row: row["tokens_per_second"])}
            found.append((place, fastest[min(fastest)], fastest[max(fastest)]))
    return found


def draw_decode(rows: Sequence[Row]) -> "Figure":
    """Tokens a second against model size, FP16 beside int4, each under its roofline: a panel for each GPU and batch.

    A point is the longest context, and the bar upwards from it reaches to the shortest.
    """
    from matplotlib.figure import Figure

    rows = on_gpus(rows)
    lines = CPU_LINES if all(row["how"] == "eager" for row in rows) else LINES
    sizes = {row["model"]: row["weight_bytes"] for row in rows if row["weights"] != "int4"}
    models = sorted(dict.fromkeys(row["model"] for row in rows), key=lambda model: sizes.get(model, 0))
    panels = sorted({(row["gpu"], row["batch"]) for row in rows})
    figure = Figure(figsize=(max(7.0, 5.6 * len(panels)), 5.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (gpu, batch) in zip(axes, panels, strict=True):
        of_panel = [row for row in rows if (row["gpu"], row["batch"]) == (gpu, batch)]
        draw_batch(panel, of_panel, models, lines)
        panel.set_title(f"batch {batch}, {gpu}", fontsize=12)
    shown = {line.get_label(): line for panel in axes for line in panel.get_lines() if line.get_label()[0] != "_"}
    figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    axes[0].set_ylabel("tokens a second", fontsize=12)
    contexts = sorted({row["context"] for row in rows})
    if len(contexts) > 1:
        figure.supxlabel(f"points: context {contexts[-1]}; bars: up to context {contexts[0]}", fontsize=10)
    return figure


def draw_batch(panel: "Axes", rows: Sequence[Row], models: Sequence[str], lines: Sequence[tuple[Any, ...]]) -> None:
    """A panel of `draw_decode`: the lines, their rooflines, and by how much int4 is ahead."""
    found = {line[2]: points(rows, models, line) for line in lines}
    for _, _, label, colour, marker in lines:
        if not (series := found[label]):
            continue
        places = [place for place, *_ in series]
        rates = [long["tokens_per_second"] for *_, long in series]
        panel.plot(places, rates, label=label, color=colour, marker=marker, ms=7, lw=2)
        highest = [short["tokens_per_second"] for _, short, _ in series]
        panel.vlines(places, rates, highest, color=colour, lw=4, alpha=0.5)
        if label != LINES[-1][2]:  # eager is far from it
            limits = [long["roofline_tokens_per_second"] for *_, long in series]
            panel.plot(places, limits, color=colour, lw=1.3, linestyle=":", label=f"roofline of {label.split(',')[0]}")
    baseline = {place: long["tokens_per_second"] for place, _, long in found[lines[1][2]]}
    for place, _, long in found[lines[0][2]]:
        if place in baseline:
            rate = long["tokens_per_second"]
            style: dict[str, Any] = {"color": ORANGE, "weight": "bold", "fontsize": 12}
            text = f"{rate / baseline[place]:.1f}x"
            panel.annotate(text, (place, rate), xytext=(8, 6), textcoords="offset points", **style)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xticks(range(len(models)), models, fontsize=11)
    panel.set_xlim(-0.3, len(models) - 0.5)
    panel.grid(alpha=0.3, which="both")


def draw_profile(rows: Sequence[Row]) -> "Figure":
    """Microseconds of a decode step by part, a bar for each kind of weights and way. On a GPU without the eager ones,
    which are gaps almost alone."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = list(dict.fromkeys((row["weights"], row["embedding"], row["how"]) for row in rows))
    if any(how != "eager" for *_, how in bars):
        bars = [bar for bar in bars if bar[2] != "eager"]
    shown = [row for row in rows if (row["weights"], row["embedding"], row["how"]) in bars]
    colours = part_colours(row["part"] for row in shown)
    figure = Figure(figsize=(11, 1.9 + 0.8 * len(bars)), layout="constrained")
    axes = figure.subplots()
    longest = max(sum(row["microseconds"] for row in shown if key(row) == bar) for bar in bars)
    for place, bar in enumerate(bars):
        times = {row["part"]: row["microseconds"] for row in shown if key(row) == bar}
        left = 0.0
        for part, colour in colours.items():
            width = times.get(part, 0.0)
            axes.barh(place, width, left=left, color=colour, edgecolor="white", height=0.62)
            if width > 0.03 * longest:
                ink = "black" if brightness(colour) > 0.5 else "white"
                axes.text(left + width / 2, place, f"{width:,.0f}", ha="center", va="center", fontsize=9, color=ink)
            left += width
        axes.text(left + 0.008 * longest, place, f"{left:,.0f} µs", va="center", fontsize=11, weight="bold")
    several = len({bar[1] for bar in bars if bar[0] == "int4"}) > 1
    names = [f"{weights} {how}" + (f"\n{embedding} embedding" if several else "") for weights, embedding, how in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("microseconds")
    first = rows[0]
    axes.set_title(
        f"A decode step of {first['model']}, batch {first['batch']}, context {first['context']}, {first['gpu']}"
    )
    patches = [Patch(color=colour, label=part) for part, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def part_colours(parts: Iterable[str]) -> dict[str, str]:
    """A colour for each part, in the order in which they are drawn; the gaps are last."""
    asked = dict.fromkeys(parts)
    known = {part: colour for part, colour in PART_COLOURS.items() if part in asked}
    others = [part for part in asked if part not in (*PART_COLOURS, GAPS)]
    own = {part: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, part in enumerate(others)}
    return known | own | ({GAPS: GAPS_COLOUR} if GAPS in asked else {})


def brightness(colour: str) -> float:
    """How bright a colour #RRGGBB is, from 0 to 1: the luma of ITU-R BT.601."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def key(row: Row) -> tuple[str, str, str]:
    """Which bar of `draw_profile` a measurement belongs to."""
    return row["weights"], row["embedding"], row["how"]
