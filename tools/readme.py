"""Writes the tables of the READMEs anew from the measurements in results/.

    python tools/readme.py            write them
    python tools/readme.py --check    only say, by the exit status, whether they are up to date

A table stands between two comments, <!-- table: NAME --> and <!-- end of table -->; TABLES says how each is made.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "minigpt" / "demo" / "README.md")


def read(name: str) -> Any:  # noqa: ANN401
    """A file of results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    rule = [":---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *rows])


def evaluation(name: str) -> str:
    """The table of eval.py, with its protocol beneath."""
    content = read(name)
    p, rows = content["protocol"], content["rows"]
    cells = [
        [
            "FP16" if row["weights"] == "fp16" else "int4",
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['perplexity']:.2f}",
            "" if row is rows[0] else f"{100 * (row['perplexity'] / rows[0]['perplexity'] - 1):+.2f}%",
            "" if row is rows[0] else f"{row['kl']:.4f}",
            f"{row['scoring_tokens_per_second']:,.0f}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
        ]
        for row in rows
    ]
    columns = ["weights", "bits/weight", "bytes", "perplexity", "change", "KL"]
    columns += [f"{what} tokens/s" for what in ("scoring", "prefill", "decode")]
    note = (
        f"`{p['command']}`: {p['tokens']:,} tokens, windows of {p['context_length']}, stride {p['stride']}; "
        f"{p['device']}, arithmetic in {p['arithmetic']}, torch {p['torch']}, Python {p['python']}, {p['date']}."
    )
    return markdown(columns, cells) + f"\n\n{note}"


def baselines() -> str:
    """What the demo's perplexity is worth."""
    perplexity = read("demo_baselines")["perplexity"]
    return markdown(["model", "perplexity"], [[name, f"{value:,.1f}"] for name, value in perplexity.items()])


def bandwidth(name: str) -> str:
    """Lessons 1 and 2: microseconds, and share of a plain copy's bandwidth, for each group size."""
    rows = read(name)
    variants: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        label = "search" if row.get("search") else "symmetric" if row.get("symmetric") else "asymmetric"
        variants.setdefault(label, {})[row["group_size"]] = row
    sizes = list(dict.fromkeys(row["group_size"] for row in rows))
    cells = [
        [
            str(size),
            *(f"{v[size]['microseconds']:.0f} ({100 * v[size]['share_of_copy']:.0f}%)" for v in variants.values()),
        ]
        for size in sizes
    ]
    columns = ["group size", *(f"{label}, µs" for label in variants)]
    return markdown(columns, cells) + f"\n\n{source(rows)}"


IDEAS = {
    "k03_matmul": "a tiled FP16 matmul",
    "k04_w4a16": "int4, the textbook way",
    "k05_unpack": "each word loaded once",
    "k06_layout": "an order made for the kernel",
    "k07_weight_left": "the weight on the left",
    "k08_pipeline": "loads further ahead",
    "k09_split_k": "several programs an output tile",
    "k10_gemv": "one token, no tensor cores",
    "k11_dequantize_gemm": "dequantize, then the vendor's matmul",
    "k12_hopper": "dequantize while multiplying (Hopper)",
    "k13_w4a8": "8-bit activations",
    "k15_w4a8_hopper": "8-bit activations in k12's loop",
    "k22_two_rings": "weight and tokens by the copy engine",
    "k23_w4a8_rings": "the same with 8-bit activations",
}
LADDER_SHAPE = (8192, 8192)
LADDER_TOKENS = (1, 16, 128, 512, 2048)


def rung(lesson: str) -> dict[int, dict[str, Any]]:
    """A lesson's measurements of LADDER_SHAPE by tokens: with its default options, at its largest group size."""
    rows = [row for row in read(lesson) if row["m"] > 0 and (row["n"], row["k"]) == LADDER_SHAPE]
    rows = [row for row in rows if row.get("num_stages", "default") == "default"]
    largest = max(row.get("group_size", 0) for row in rows)
    return {row["m"]: row for row in rows if row.get("group_size", 0) == largest}


def ladder() -> str:
    """The matmul lessons: microseconds and times FP16 at each number of tokens, and the share of the roofline."""
    ends = (LADDER_TOKENS[0], LADDER_TOKENS[-1])
    first = rung("k03_matmul")
    # FP16 as timed beside lesson 3, whose floor is the same.
    fp16 = [f"{first[m]['fp16_microseconds']:.0f}" for m in LADDER_TOKENS]
    shares = [first[m]["share_of_roofline"] / first[m]["times_fp16"] for m in ends]
    cells = [["torch's FP16 matmul", *fp16, " / ".join(f"{100 * share:.0f}%" for share in shares)]]
    lessons = {lesson: rung(lesson) for lesson in IDEAS}
    for lesson, rows in lessons.items():
        times = {m: f"{row['microseconds']:.0f} ({row['times_fp16']:.2f}x)" for m, row in rows.items()}
        percent = {m: f"{100 * row['share_of_roofline']:.0f}%" for m, row in rows.items()}
        cells.append(
            [
                f"{lesson[:3]}: {IDEAS[lesson]}",
                *(times.get(m, "-") for m in LADDER_TOKENS),
                " / ".join(percent.get(m, "-") for m in ends),
            ]
        )
    columns = ["lesson", *(f"M = {m}" for m in LADDER_TOKENS), f"roofline, M = {ends[0]} / {ends[1]}"]
    note = (
        "Microseconds (times FP16, which each lesson times in its own run). Roofline: the share of what the bytes, or "
        "16-bit operations, would take at this GPU's measured ceilings; 8-bit operations may pass it."
    )
    every = [row for rows in lessons.values() for row in rows.values()]
    return markdown(columns, cells) + f"\n\n{note} {source(of_any_lesson(every))}"


def few_tokens() -> str:
    """Lesson 17: microseconds and times FP16 for each shape and number of tokens."""
    rows = read("k17_few_tokens")
    tokens = sorted({row["m"] for row in rows})
    cells = {(row["n"], row["k"], row["m"]): row for row in rows}

    def cell(n: int, k: int, m: int) -> str:
        """A shape's column for m tokens."""
        row = cells.get((n, k, m))
        return f"{row['microseconds']:.1f} ({row['times_fp16']:.2f}x)" if row else "-"

    shapes = dict.fromkeys((row["n"], row["k"]) for row in rows)
    lines = [[f"{n} x {k}", *(cell(n, k, m) for m in tokens)] for n, k in shapes]
    note = f"Microseconds (times FP16), group size {rows[0]['group_size']}."
    return markdown(["out x in", *(f"M = {m}" for m in tokens)], lines) + f"\n\n{note} {provenance(rows)}"


def step_parts() -> str:
    """Lessons 18 to 20: what the parts of a decode step take, beside the same in torch's fp16 kernels."""
    mlp, attention, output = read("k18_fused_layers"), read("k19_attention"), read("k20_step_ends")
    parts = [
        *((f"k18: MLP, LayerNorm to sum; n_embd {row['n_embd']}", row["m"], row, "fp16") for row in mlp),
        *(
            (f"k19: attention; {row['heads']} heads, {row['length']} positions", row["batch"], row, "torch")
            for row in attention
        ),
        *((f"k20: output layer, LayerNorm to token; n_embd {row['k']}", row["m"], row, "fp16") for row in output),
    ]
    lines = [
        [
            part,
            str(m),
            f"{row['microseconds']:.1f}",
            f"{row[f'{other}_microseconds']:.1f}",
            f"{row[f'{other}_microseconds'] / row['microseconds']:.1f}x",
        ]
        for part, m, row, other in parts
    ]
    columns = ["part", "tokens", "microseconds", "torch, FP16", "times"]
    return markdown(columns, lines) + f"\n\n{provenance(of_any_lesson([*mlp, *attention, *output]))}"


def matmul() -> str:
    """Times FP16 for each shape and number of tokens, at the largest group size that was measured for the shape."""
    rows = read("matmul")
    largest = {(row["n"], row["k"]): 0 for row in rows}
    for row in rows:
        largest[row["n"], row["k"]] = max(largest[row["n"], row["k"]], row["group_size"])
    chosen = [row for row in rows if row["group_size"] == largest[row["n"], row["k"]]]
    cells = {(row["n"], row["k"], row["m"], row["mode"]): row for row in chosen}
    tokens = list(dict.fromkeys(row["m"] for row in rows))

    def cell(n: int, k: int, m: int) -> str:
        """A shape's column for m tokens: both modes, and FP16's own time."""
        pair = [cells.get((n, k, m, mode)) for mode in ("w4a16", "w4a8")]
        times = " / ".join(f"{row['times_fp16']:.2f}x" for row in pair if row)
        fp16 = next(row["fp16_microseconds"] for row in pair if row)
        return f"{times} ({fp16:.{0 if fp16 >= 10 else 1}f})"

    lines = [[f"{n} x {k}", str(size), *(cell(n, k, m) for m in tokens)] for (n, k), size in largest.items()]
    note = (
        "Times FP16, with 16-bit / 8-bit activations (and FP16's own microseconds). Below 3 billion products, "
        "and with small weights, 8 bits are not taken: both are one kernel there, timed twice."
    )
    columns = ["out x in", "group size", *(f"M = {m}" for m in tokens)]
    return markdown(columns, lines) + f"\n\n{note} {provenance(rows)}"


def matmul_gpt2() -> str:
    """One token through GPT-2's linear layers: times FP16 for each model and layer."""
    layers = {"c_attn": (3, 1), "attn.c_proj": (1, 1), "c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    models = {"gpt2": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600}
    rows = read("matmul_gpt2")
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["group_size"]):
        best[row["n"], row["k"]] = row  # the largest group size comes last

    def cell(n: int, k: int) -> str:
        """A layer's: times FP16, and microseconds."""
        return f"{best[n, k]['times_fp16']:.2f}x ({best[n, k]['microseconds']:.1f})"

    vocabulary = max(n for n, _ in best)
    cells = [
        [model, *(cell(n * width, k * width) for n, k in layers.values()), cell(vocabulary, width)]
        for model, width in models.items()
    ]
    note = "Times FP16 (and microseconds), M = 1; group size 128, or 64 where 128 does not divide in_features."
    return markdown(["model", *layers, "lm_head"], cells) + f"\n\n{note} {provenance(rows)}"


def quantization() -> str:
    """The error of int4 on a normal matrix for each group size and method."""
    rows = read("quantization")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["group_size"], row["method"]): row for row in rows}
    lines = [
        [
            str(row["group_size"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['compression']:.2f}x",
            f"{row['published_mae']:.4f}",
            *(
                f"{cells[row['group_size'], m]['mae']:.4f} ({1000 * cells[row['group_size'], m]['mse']:.1f})"
                for m in methods
            ),
        ]
        for row in rows
        if row["published_mae"]
    ]
    note = (
        "Mean absolute error (and mean squared error, in thousandths). Published: by the project before this one, for "
        "the plain rule, scale = max |w| / 8; per row it gave 0.1023, from the maximum of the first 512 columns only, "
        "and 0.2611 asymmetric, a fault: whole rows are the last line. What the least squared error leaves: 0.0866 "
        "(11.5) with sixteen uniform levels and one scale for all, 0.0754 symmetric and 0.0734 asymmetric at 64."
    )
    columns = ["group size", "bits/weight", "compression", "published", *methods]
    return markdown(columns, lines) + f"\n\n{note} {source(rows)}"


def accuracy() -> str:
    """What int4 costs: a table for each model and text, a line for each method, a column for each group size."""
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read("accuracy"):
        protocol = tuple(row[name] for name in ("model", "text", "context_length", "stride", "gpu"))
        tables.setdefault(protocol, []).append(row)
    return "\n\n".join(accuracy_of(rows) for rows in tables.values())


def accuracy_of(rows: list[dict[str, Any]]) -> str:
    """A table of `accuracy`: the rise of perplexity and the divergence, each the mean over the seeds."""
    sizes = sorted({row["group_size"] for row in rows}, key=lambda size: math.inf if size == "row" else size)

    def cell(method: str, size: int | str) -> str:
        """A method's column for a group size."""
        same = [row for row in rows if (row["method"], row["group_size"]) == (method, size)]
        if not same:
            return "-"
        rises = [100 * (row["perplexity"] / row["fp16_perplexity"] - 1) for row in same]
        spread = f" ± {(max(rises) - min(rises)) / 2:.2f}" if len(rises) > 1 else ""
        return f"{statistics.mean(rises):+.2f}%{spread} ({statistics.mean(row['kl'] for row in same):#.3g})"

    def label(method: str) -> str:
        """A method's name; of a peer's, with the version."""
        version = next(row["peer_version"] for row in rows if row["method"] == method)
        return f"{method.removeprefix('peer:')} {version} (peer)" if version else method

    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = [[label(method), *(cell(method, size) for size in sizes)] for method in methods]
    bits = {row["group_size"]: row["bits_per_weight"] for row in rows if not row["peer_version"]}
    columns = ["method", *(f"{size} ({bits[size]:.2f} bits)" if size in bits else str(size) for size in sizes)]
    first = rows[0]
    note = (
        f"Rise of perplexity over FP16's {first['fp16_perplexity']:.2f} (and KL divergence from FP16, in nats a token) "
        f"for each group size: {first['model']} on {first['text']}, {first['tokens_scored']:,} tokens scored, windows "
        f"of {first['context_length']}, stride {first['stride']}.{peers_bits(rows, bits)}{calibration_of(rows)} "
        f"{provenance(rows)}"
    )
    return markdown(columns, cells) + f"\n\n{note}"


def peers_bits(rows: list[dict[str, Any]], bits: dict[int | str, float]) -> str:
    """A sentence on the bits a weight of those peers for whom they are other than `bits`, by group size, says."""
    others = {
        (row["method"].removeprefix("peer:"), row["group_size"]): row["bits_per_weight"]
        for row in rows
        if row["peer_version"] and abs(row["bits_per_weight"] - bits.get(row["group_size"], 0)) > 0.005
    }
    cheapest_first = sorted(others.items(), key=lambda other: (other[0][0], other[1]))
    said = ", ".join(f"{peer} {cost:.2f} in groups of {size}" for (peer, size), cost in cheapest_first)
    return f" Peers that take other bits than the column's: {said}." if said else ""


def calibration_of(rows: list[dict[str, Any]]) -> str:
    """What text the calibrated methods among `rows` looked at, and for how long they were tuned."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        if row["calibration"]:
            text = f"{row['calibration_tokens']:,} tokens of {row['calibration']}'s training text"
            texts.setdefault(text, []).append(row["method"])
    said = "; ".join(f"{', '.join(dict.fromkeys(methods))} saw {text}" for text, methods in texts.items())
    tunings = [row for row in rows if row["tuning_steps"]]
    steps, tokens = (
        " or ".join(f"{number:,}" for number in sorted({row[key] for row in tunings}))
        for key in ("tuning_steps", "tuning_tokens")
    )
    tuned = f"; tuned in {steps} steps on {tokens} tokens of it" if tunings else ""
    seeds = "; ± is half the range over seeds" if len({row["seed"] for row in rows} - {None}) > 1 else ""
    return f" {said}{tuned}{seeds}." if said else ""


Group = dict[tuple[str, str], dict[str, Any]]  # measurements that belong together, by (weights, how)


def decode_groups(what: str, on_cpu: bool) -> dict[str, dict[tuple[Any, ...], Group]]:
    """Of results/decode.json: the measurements of `what` by CPU or by GPU, and in groups of what is to be compared.

    There is a group for each (model, batch, context, embedding of int4, group size), in this order, that has both:
    int4, and something that is not, which belongs to all groups of its model, batch and context.
    """
    rows = [row for row in read("decode") if row["what"] == what and row["gpu"].startswith("cpu") == on_cpu]
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows.sort(key=lambda row: (models.index(row["model"]), row["batch"], row["context"]))
    devices: dict[str, dict[tuple[Any, ...], Group]] = {}
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        groups: dict[tuple[Any, ...], Group] = {}
        floating: dict[tuple[Any, ...], Group] = {}
        for row in (row for row in rows if row["gpu"] == gpu):
            place = (row["model"], row["batch"], row["context"])
            if row["weights"] == "int4":
                group = groups.setdefault((*place, row["embedding"], row["group_size"]), {})
            else:
                group = floating.setdefault(place, {})
            group[row["weights"], row["how"]] = row
        devices[gpu] = {place: floating[place[:3]] | group for place, group in groups.items() if place[:3] in floating}
    return devices


# The columns of decode's tables, in order: weights, how, the column's name.
DECODE_WAYS = (
    ("fp16", "eager", "FP16 eager"),
    ("fp16", "captured", "FP16 captured"),
    ("fp16", "compiled", "FP16 compiled"),
    ("fp32", "eager", "FP32"),
    ("bf16", "eager", "BF16"),
    ("int4", "eager", "int4"),
    ("int4", "captured", "int4 captured"),
    ("int4", "fused", "int4 fused"),
    ("int4", "persistent", "int4 persistent"),
    ("int4", "w4a8", "int4, 8-bit inputs"),
)


def fastest(group: Group, int4: bool) -> dict[str, Any]:
    """The fastest measurement of a group with int4 weights, or with others."""
    rows = [row for (weights, _), row in group.items() if (weights == "int4") == int4]
    return max(rows, key=lambda row: row["tokens_per_second"])


def decode_columns(groups: dict[tuple[Any, ...], Group]) -> list[tuple[str, str, str]]:
    """Those of DECODE_WAYS that have been measured."""
    return [column for column in DECODE_WAYS if any(column[:2] in group for group in groups.values())]


def decode_rates(group: Group, columns: list[tuple[str, str, str]]) -> list[str]:
    """The cells of a group: tokens a second each way."""
    return [f"{group[w, how]['tokens_per_second']:,.0f}" if (w, how) in group else "-" for w, how, _ in columns]


def times_floating(row: dict[str, Any], group: Group) -> str:
    """How many times as fast a measurement is as the fastest of its group in floating point."""
    return f"{row['tokens_per_second'] / fastest(group, int4=False)['tokens_per_second']:.2f}x"


def decode(on_cpu: bool = False) -> str:
    """Tokens a second when writing: a table for each GPU, a line for each model, batch and context."""
    floating = "floating point" if on_cpu else "FP16"
    note = (
        f"Tokens a second, of all sequences together; how many times as fast int4 at its fastest is as {floating} at "
        "its fastest; and the shares of their rooflines, the rate at which a plain copy would move weights and cache. "
        "Random weights in each model's shapes, but for the demo."
    )

    def table(groups: dict[tuple[Any, ...], Group]) -> str:
        """The table of a GPU."""
        columns = decode_columns(groups)
        cells = [
            [
                model,
                str(batch),
                str(context),
                embedding,
                str(group_size),
                *decode_rates(group, columns),
                times_floating(fastest(group, int4=True), group),
                " / ".join(f"{100 * fastest(group, int4)['share_of_roofline']:.0f}%" for int4 in (False, True)),
            ]
            for (model, batch, context, embedding, group_size), group in groups.items()
        ]
        names = [*(name for *_, name in columns), f"x {floating}", f"roofline, {floating} / int4"]
        rows = [row for group in groups.values() for row in group.values()]
        header = ["model", "batch", "context", "embedding", "groups", *names]
        return markdown(header, cells) + f"\n\n{note} {provenance(rows)}"

    return "\n\n".join(table(groups) for groups in decode_groups("decode", on_cpu).values())


def prefill(on_cpu: bool = False) -> str:
    """Tokens a second when reading: a table for each device, a line for each model."""

    def table(groups: dict[tuple[Any, ...], Group]) -> str:
        """The table of a GPU."""
        columns = decode_columns(groups)
        cells = [
            [
                model,
                f"{batch} x {context}",
                embedding,
                str(group_size),
                *decode_rates(group, columns),
                " / ".join(times_floating(row, group) for (weights, _), row in group.items() if weights == "int4"),
            ]
            for (model, batch, context, embedding, group_size), group in groups.items()
        ]
        names = [*(name.removesuffix(" eager") for *_, name in columns), "int4 / floating point"]
        note = f"Tokens a second, {'of prompts, all at once' if on_cpu else 'with the loss of every token'}."
        rows = [row for group in groups.values() for row in group.values()]
        return markdown(["model", "tokens", "embedding", "groups", *names], cells) + f"\n\n{note} {provenance(rows)}"

    return "\n\n".join(table(groups) for groups in decode_groups("prefill", on_cpu).values())


def decode_bytes() -> str:
    """Bytes in memory of each model's weights, and of its int4 ones relative to FP16's, by group size and embedding."""
    rows = [row for row in read("decode") if not row["gpu"].startswith("cpu")]
    fp16 = {row["model"]: row["weight_bytes"] for row in rows if row["weights"] == "fp16"}
    int4 = {(row["model"], row["group_size"], row["embedding"]): row for row in rows if row["weights"] == "int4"}
    embeddings = [name for name in ("fp16", "int8", "int4") if any(name == embedding for *_, embedding in int4)]

    def cell(model: str, group_size: int, embedding: str) -> str:
        """An int4 model's bytes."""
        if (model, group_size, embedding) not in int4:
            return "-"
        row = int4[model, group_size, embedding]
        return f"{row['weight_bytes'] / 1e6:,.1f} MB ({row['weight_bytes'] / fp16[model]:.3f}x)"

    lines = dict.fromkeys((model, group_size) for model, group_size, _ in int4)
    cells = [
        [model, f"{fp16[model] / 1e6:,.1f} MB", str(size), *(cell(model, size, name) for name in embeddings)]
        for model, size in lines
    ]
    note = "All weights in GPU memory: codes, scales, zeros, embeddings, norms and biases (and times FP16's)."
    header = ["model", "FP16", "groups", *(f"int4, embedding {name}" for name in embeddings)]
    return markdown(header, cells) + f"\n\n{note}"


def source(rows: list[dict[str, Any]]) -> str:
    """Of what shape, where and how measurements were taken."""
    return f"{rows[0]['n']} x {rows[0]['k']}, {provenance(rows)}"


def of_any_lesson(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measurements of several lessons, as if by one command, which does not say which."""
    return [{**row, "command": re.sub(r"k\d\d_\w+", "LESSON", row["command"])} for row in rows]


def provenance(rows: list[dict[str, Any]]) -> str:
    """Where, when and how measurements were taken; of several commands the first one's, as a row has its own."""
    first, days = rows[0], sorted({row["date"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    others = " and others" if len({row["command"] for row in rows}) > 1 else ""
    return f"{first['gpu']}, torch {first['torch']}, Triton {first['triton']}, {when}; `{first['command']}`{others}."


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "decode": decode,
    "decode-bytes": decode_bytes,
    "decode-cpu": lambda: decode(on_cpu=True),
    "demo-cpu": lambda: evaluation("eval_demo_cpu"),
    "demo-h200": lambda: evaluation("eval_demo_h200"),
    "demo-baselines": baselines,
    "few-tokens": few_tokens,
    "k01": lambda: bandwidth("k01_quantize"),
    "k02": lambda: bandwidth("k02_dequantize"),
    "ladder": ladder,
    "matmul": matmul,
    "matmul-gpt2": matmul_gpt2,
    "prefill": prefill,
    "prefill-cpu": lambda: prefill(on_cpu=True),
    "quantization": quantization,
    "step-parts": step_parts,
}


def fill(text: str) -> str:
    """Replaces what stands between the comments of each table."""

    def replace(match: re.Match[str]) -> str:
        """The table that a match names, between its comments."""
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end of table -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end of table -->", replace, text, flags=re.DOTALL)


def main() -> None:
    """Writes or checks all READMEs."""
    stale = []
    for path in READMES:
        text = path.read_text()
        if (filled := fill(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled)
    if "--check" in sys.argv and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run: make readme")


if __name__ == "__main__":
    main()
