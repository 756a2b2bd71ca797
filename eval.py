"""Says honestly what int4 did to a model: perplexity, tokens per second and bytes, beside FP16.

    python eval.py                                   GPT-2 124M and what quantize.py made of it, on WikiText-2
    python eval.py demo                              the model that ships with this project, on text that does too
    python eval.py gpt2 --stride 512                 the stride of most published figures
    python eval.py gpt2 --activation-bits 8          int4 layers may round their inputs to 8 bits when they read a text
    python eval.py my-gpt2/ --quantized my-int4/ other-int4/ --dataset my_text.txt --json out.json

One table, a row for FP16 and one for each int4 checkpoint, all measured in the same run in the same way. An int4 model
is also held against FP16, token by token: KL is how far its predictions are from FP16's, in nats a token, top-1 how
often both hold the same token most probable (`minigpt/evaluate.py`).
"""

import argparse
import dataclasses
import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from minigpt import arguments, checkpoint, data, evaluate
from minigpt.decode import How, StepLogits
from minigpt.device import add_device_argument, arithmetic_dtype, check_device, describe_device
from minigpt.errors import UserError, run_script
from minigpt.files import check_file, write_json
from minigpt.model import GPT
from minigpt.quantization.convert import bits_per_weight
from minigpt.quantization.fused_decode import fused_step
from minigpt.quantization.linear import describe_path, set_activation_bits
from minigpt.table import format_bytes, format_table
from minigpt.tokenizer import encode, tokenizer_for


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a model with one kind of weights."""

    weights: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    tokens_scored: int
    kl: float | None
    top1: float | None
    scoring_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_how: str
    peak_memory_bytes: int | None
    device: str
    int4_path: str
    made_how: str | None


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known = ", ".join(checkpoint.PRETRAINED)
    parser.add_argument(
        "model", nargs="?", default="gpt2", help=f"{known}, or the path of a checkpoint (default: gpt2)"
    )
    parser.add_argument(
        "--quantized",
        nargs="+",
        type=arguments.path,
        metavar="PATH",
        help="int4 checkpoints (default: what quantize.py wrote)",
    )
    parser.add_argument(
        "--dataset",
        help="wikitext-2, wikitext-103, demo, a text file or a folder (default: wikitext-2; for demo: demo)",
    )
    parser.add_argument("--context-length", type=int, help="tokens in a window (default: as many as the model reads)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: the context length)")
    parser.add_argument("--batch-size", type=arguments.at_least_1, default=8, help="windows at once (default: 8)")
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=(16, 8),
        default=16,
        help="of int4 layers' inputs when reading (perplexity, scoring, prefill), not when decoding (default: 16)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="decode FP16 by torch.compile, on a GPU (a minute or so)"
    )
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help="save protocol and rows")
    add_device_argument(parser)
    args = parser.parse_args()
    check_device(args.device)
    if args.compile and not args.device.startswith("cuda"):
        raise UserError(f"--compile is for a GPU, and --device is {args.device}")
    if args.dataset is None:
        args.dataset = data.default_text(args.model)
    if args.json:
        check_file("--json", args.json)
    checkpoint.check_known(args.model)
    if args.model not in checkpoint.PRETRAINED and checkpoint.is_int4(Path(args.model)):
        raise UserError(
            f"{args.model} is an int4 checkpoint: give the fp one it was made from, and this as --quantized"
        )
    if args.quantized is None:
        args.quantized = [checkpoint.default_int4_folder(args.model)]
        if not args.quantized[0].exists():
            raise UserError(f"no int4 checkpoint at {args.quantized[0]}; make it with: python quantize.py {args.model}")
    for path in args.quantized:
        if not path.exists():
            raise UserError(f"--quantized {path}: no such folder")
        checkpoint.check_int4(path)
    return args


def load_fp16(path: Path, device: str) -> GPT:
    """Loads a checkpoint with all its weights rounded to fp16, to compute in the dtype that the device serves well."""
    return checkpoint.load(path, torch.float16).to(device=device, dtype=arithmetic_dtype(device))


def decode_way(model: GPT, weights: str, args: argparse.Namespace) -> tuple[How, StepLogits | None]:
    """The fastest way to decode: int4 by fused kernels where they serve it, FP16 compiled if that is asked for."""
    if weights == "fp16":
        return ("compiled" if args.compile else "captured"), None
    return "captured", fused_step(model, batch_size=1)


def measure(
    path: Path, fp16_path: Path, tokens: torch.Tensor, protocol: dict[str, Any], args: argparse.Namespace
) -> Row:
    """Loads a checkpoint, measures it, and lets it go."""
    model = load_fp16(path, args.device)
    bits = bits_per_weight(model)
    weights = "fp16" if bits == 16.0 else f"int4 {path}"
    if dataclasses.asdict(model.config) != protocol["shape"]:
        raise UserError(f"--quantized {path} has another shape than {args.model}: it was made from another model")
    how, step_logits = decode_way(model, weights, args)
    memory = evaluate.PeakMemory(torch.device(args.device))
    window = min(protocol["context_length"], len(tokens))
    decode = evaluate.decode_rate(
        model, tokens, protocol["decode_prompt_tokens"], protocol["decode_new_tokens"], how=how, step_logits=step_logits
    )
    set_activation_bits(model, args.activation_bits)
    scoring = evaluate.scoring_rate(model, tokens, window, args.batch_size)
    prefill = evaluate.prefill_rate(model, tokens, protocol["prefill_tokens"])
    peak = memory.read()  # of this model alone: its reference comes after
    score = evaluate.perplexity(
        model,
        tokens,
        protocol["context_length"],
        protocol["stride"],
        args.batch_size,
        f"{weights}: perplexity",
        reference=None if path == fp16_path else load_fp16(fp16_path, args.device),
    )
    return Row(
        weights=weights,
        bits_per_weight=bits,
        bytes=2 * sum(p.numel() for p in model.parameters()) if bits == 16.0 else checkpoint.file_bytes(path),
        perplexity=score.perplexity,
        tokens_scored=score.tokens_scored,
        kl=score.kl,
        top1=score.top1,
        scoring_tokens_per_second=scoring,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        decode_how="eager" if not args.device.startswith("cuda") else "fused" if step_logits else how,
        peak_memory_bytes=peak,
        device=protocol["device"],
        int4_path=describe_path(model),
        made_how=None if bits == 16.0 else checkpoint.made_how(path),
    )


def make_protocol(args: argparse.Namespace, model: GPT, n_tokens: int) -> dict[str, Any]:
    """All that one needs to take the same numbers again."""
    if model.config.n_positions < 4:
        raise UserError(
            f"{args.model} reads {model.config.n_positions} tokens; timing it needs n_positions of 4 or more"
        )
    context_length, stride = evaluate.window_sizes(model, args.context_length, args.stride)
    prompt = min(32, n_tokens, model.config.n_positions // 4)
    return {
        "model": args.model,
        "shape": dataclasses.asdict(model.config),
        "dataset": args.dataset,
        "tokens": n_tokens,
        "context_length": context_length,
        "stride": stride,
        "batch_size": args.batch_size,
        "prefill_tokens": min(context_length, n_tokens),
        "decode_prompt_tokens": prompt,
        "decode_new_tokens": min(128, model.config.n_positions - prompt),
        "arithmetic": str(arithmetic_dtype(args.device)).removeprefix("torch."),
        "activation_bits": args.activation_bits,
        "device": describe_device(args.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python eval.py " + shlex.join(sys.argv[1:]),
    }


def describe_protocol(protocol: dict[str, Any]) -> str:
    """The protocol in three lines, for the table's head."""
    p = protocol
    rounded = "" if p["activation_bits"] == 16 else "; when reading, int4 layers may round inputs to 8 bits"
    return (
        f"{p['model']} on {p['dataset']}: {p['tokens']:,} tokens, windows of {p['context_length']}, "
        f"stride {p['stride']}; bits a weight of the linear layers, KL in nats a token\n"
        f"tokens/s: scoring, batch {p['batch_size']}; prefill, {p['prefill_tokens']} at once; decode, batch 1, greedy, "
        f"KV cache, up to {p['decode_new_tokens']} after {p['decode_prompt_tokens']}; medians\n"
        f"{p['device']}, arithmetic in {p['arithmetic']}, torch {p['torch']}, Python {p['python']}{rounded}"
    )


def format_rows(rows: list[Row]) -> str:
    """The table; changes of perplexity and ratios are to the first row."""
    first = rows[0]
    cells = [
        [
            row.weights.removeprefix("int4 "),  # its path remains
            f"{row.bits_per_weight:.2f}",
            format_bytes(row.bytes),
            f"{row.perplexity:.3f}",
            "" if row is first else f"{100 * (row.perplexity / first.perplexity - 1):+.2f}%",
            "" if row.kl is None else f"{row.kl:.4f}",
            "" if row.top1 is None else f"{100 * row.top1:.1f}%",
            f"{row.scoring_tokens_per_second:,.0f}",
            f"{row.prefill_tokens_per_second:,.0f}",
            f"{row.decode_tokens_per_second:,.1f}",
            "unknown" if row.peak_memory_bytes is None else format_bytes(row.peak_memory_bytes),
        ]
        for row in rows
    ]
    columns = ["weights", "bits", "bytes", "perplexity", "change", "KL", "top-1"]
    columns += ["scoring", "prefill", "decode", "memory"]
    return format_table(columns, cells)


def describe_how(rows: list[Row]) -> str:
    """How int4 weights were made, how tokens were decoded, and what multiplied int4 weights."""
    made = [f"{row.weights.removeprefix('int4 ')}: {row.made_how}\n" for row in rows if row.made_how]
    ways = dict.fromkeys(f"{row.weights.split()[0]} {row.decode_how}" for row in rows)
    paths = dict.fromkeys(row.int4_path for row in rows if row.int4_path)
    return f"{''.join(made)}decode: {', '.join(ways)}; int4 path: {', '.join(paths)}"


def main() -> None:
    """Measures FP16 and each int4 checkpoint, and prints the table."""
    args = parse_args()
    path = checkpoint.resolve(args.model)
    model = checkpoint.load(path, torch.float16)
    default = checkpoint.default_int4_folder(args.model)
    if default in args.quantized and checkpoint.holds_another_model(default, model):  # named alike, or trained since
        raise UserError(
            f"{default} was made from another model; make it anew: python quantize.py {args.model} --output {default}"
        )
    tokenizer = tokenizer_for(checkpoint.checkpoint_folder(path), model.config.vocab_size)
    tokens = torch.tensor(encode(tokenizer, data.load_text(args.dataset)), device=args.device)
    protocol = make_protocol(args, model, len(tokens))
    del model
    print(describe_protocol(protocol) + "\n", flush=True)
    rows = [measure(each, path, tokens, protocol, args) for each in (path, *args.quantized)]
    print(format_rows(rows))
    print(describe_how(rows))
    if args.json:
        content = {"protocol": protocol, "rows": [dataclasses.asdict(row) for row in rows]}
        write_json(args.json, content)


if __name__ == "__main__":
    run_script(main)
