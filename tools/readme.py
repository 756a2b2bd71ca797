"""Writes the tables of the READMEs anew from the measurements in results/.

    python tools/readme.py            write them
    python tools/readme.py --check    only say, by the exit status, whether they are up to date

A table stands between two comments, <!-- table: NAME --> and <!-- end of table -->; TABLES says how each is made.
"""

import json
import re
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
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
        ]
        for row in rows
    ]
    columns = ["weights", "bits/weight", "bytes", "perplexity", "change", "prefill tokens/s", "decode tokens/s"]
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


def ladder() -> str:
    """The matmul lessons: times FP16 at each number of tokens."""
    lessons = {"k03": "a tiled FP16 matmul", "k04": "int4, the textbook way"}
    files = {"k03": read("k03_matmul"), "k04": [row for row in read("k04_w4a16") if row["group_size"] == 64]}
    tokens = [row["m"] for row in files["k03"]]
    cells = [
        ["torch", "FP16, the vendor's matmul", *(f"{row['fp16_microseconds']:.0f}" for row in files["k03"])],
        *(
            [lesson, idea, *(f"{row['microseconds']:.0f} ({row['times_fp16']:.2f}x)" for row in files[lesson])]
            for lesson, idea in lessons.items()
        ),
    ]
    columns = ["lesson", "idea", *(f"M = {m}" for m in tokens)]
    return markdown(columns, cells) + f"\n\n{source(files['k04'])}"


def source(rows: list[dict[str, Any]]) -> str:
    """Where and how measurements were taken."""
    row = rows[0]
    shape = f"{row['n']} x {row['k']}"
    return f"{shape}, {row['gpu']}, torch {row['torch']}, Triton {row['triton']}, {row['date']}; `{row['command']}`."


TABLES: dict[str, Callable[[], str]] = {
    "demo-cpu": lambda: evaluation("eval_demo_cpu"),
    "demo-h200": lambda: evaluation("eval_demo_h200"),
    "demo-baselines": baselines,
    "k01": lambda: bandwidth("k01_quantize"),
    "k02": lambda: bandwidth("k02_dequantize"),
    "ladder": ladder,
}


def fill(text: str) -> str:
    """Replaces what stands between the comments of each table."""

    def replace(match: re.Match[str]) -> str:
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
