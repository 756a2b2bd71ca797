"""How fast GPT-2 writes and reads: FP16 and int4 in one run, each in every way there is.

    python -m minigpt.bench decode          all four sizes on a GPU, the demo on a CPU -> results/decode.json
    python -m minigpt.bench decode --models gpt2 --batch-sizes 1 --contexts 128
    python -m minigpt.bench profile         where the time of a decode step goes -> results/profile.json
    python -m minigpt.bench plots           both as pictures, from those files

GPT-2's four sizes get random weights: how fast a model is does not depend on them. The demo, or a checkpoint given by
its path, is loaded. Int4 is made in memory, by absmax. Every measurement is merged into the file at once.

The protocol. decode: greedy, the choice of the token included, a static cache as long as the context and filled with
random numbers, at the context's last 16 positions (`evaluate.step_rate`). prefill: the largest batch, as long as the
model reads; on a GPU with the loss of every token (`evaluate.scoring_rate`), replayed from a graph, and for int4 once
more with linear layers that may round inputs to 8 bits (w4a8); on a CPU as prompts are read (`evaluate.prefill_rate`),
since int4 weights score a text in float32 there. Medians. Before it is timed, a step's logits are compared with those
of the plain model on the same weights, and its choice with the best of them. The roofline is the time in which a copy
on the same device, in the same run, moves as many bytes as a step must read: all weights but the position embedding's,
and the cache.
"""

import argparse
import datetime
import gc
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt import bench_plots, checkpoint, evaluate
from minigpt.arguments import at_least_1, path
from minigpt.config import PRESETS, GPTConfig
from minigpt.decode import COMPILER_TUNING, DecodeStep, How, StepLogits, compiled_logits, greedy_way, model_logits
from minigpt.device import add_device_argument, arithmetic_dtype, check_device, describe_device, versions
from minigpt.errors import UserError, run_script
from minigpt.files import Row, add_row, check_file, read_rows, write_json
from minigpt.model import GPT, KVCache
from minigpt.quantization.convert import check_fits, fitting_group_sizes, quantize_model
from minigpt.quantization.embedding import CHOICES, quantize_embedding
from minigpt.quantization.fused_decode import fused_step
from minigpt.quantization.linear import Int4Weight, set_activation_bits
from minigpt.quantization.persistent_step import persistent_step
from minigpt.quantization.rtn import METHODS
from minigpt.step_profile import format_profile, profile_step
from minigpt.table import format_bytes, format_table

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONTEXTS = (128, 512, 1024)
GROUP_SIZES = (128, 64, 32, 16)  # the first that fits the model is the default

SECONDS = 0.3  # a measurement takes about as long, and the first call before it
LAST_POSITIONS = 16  # of the context, where decoding is timed
MAX_ERROR = 0.05  # of a step's logits; rounding leaves less than 0.01, a kernel that is wrong is off by about 1

# What distinguishes a measurement from all others: one that repeats another takes its place.
IDENTITY = ("gpu", "model", "what", "batch", "context", "weights", "arithmetic", "group_size", "embedding", "how")


class Subject(NamedTuple):
    """A model to measure, and what a measurement says of it: weights, embedding, group_size, ..."""

    model: GPT
    labels: Row


def prefill_ways(weights: str, device: str) -> dict[str, int]:
    """How a text can be read there, and how many bits linear layers' inputs then have. w4a8: captured, and with 8."""
    if not device.startswith("cuda"):
        return {"eager": 16}
    return {"captured": 16, "w4a8": 8} if weights == "int4" else {"captured": 16}


def ways(weights: str, device: str) -> tuple[str, ...]:
    """How a decode step can be computed there, see `minigpt.decode.How`; fused: by kernels made for it; persistent: all
    blocks by one kernel."""
    if not device.startswith("cuda"):
        return ("eager",)
    return ("captured", "fused", "persistent") if weights == "int4" else ("eager", "captured", "compiled")


# ---- models ----------------------------------------------------------------------------------------------------------


def is_random(name: str) -> bool:
    """Whether a model of this name gets random weights: those that this project has the shapes of only."""
    return name in PRESETS and name != "demo"


def config_of(name: str) -> GPTConfig:
    """A model's shape.

    Raises:
        UserError: there is no such model, or it is int4 already.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = checkpoint.resolve(name)
    if checkpoint.is_int4(path):
        raise UserError(f"{name} is an int4 checkpoint: give the fp one it was made from")
    return checkpoint.load(path, torch.float16).config


def make_model(name: str, dtype: torch.dtype, device: str) -> GPT:
    """A model in evaluation mode, loaded or random."""
    if not is_random(name):
        return checkpoint.load(checkpoint.resolve(name), dtype, device)
    with torch.device(device):
        model = GPT(PRESETS[name])
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model.to(dtype).eval().requires_grad_(False)


def float_dtypes(device: str) -> list[torch.dtype]:
    """What int4 is compared with: on a CPU, bf16 has half the bytes, but not every CPU is fast at it."""
    return [torch.float16] if device.startswith("cuda") else [torch.float32, torch.bfloat16]


def subjects(
    name: str, dtypes: Sequence[torch.dtype], group_size: int, embeddings: Sequence[str], device: str
) -> Iterator[Subject]:
    """A model in floating point and in int4, one after the other; let each go before the next is made."""
    for dtype in dtypes:
        short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        yield make_subject(name, dtype, device, {"weights": short, "group_size": None, "embedding": short})
    for embedding in embeddings:
        labels = {"weights": "int4", "group_size": group_size, "embedding": embedding}
        yield make_subject(name, arithmetic_dtype(device), device, labels)


def make_subject(name: str, dtype: torch.dtype, device: str, labels: Row) -> Subject:
    """A model, quantized where the labels say so."""
    model = make_model(name, dtype, device)
    if labels["weights"] == "int4":
        for _ in quantize_model(model, METHODS["absmax"], labels["group_size"]):
            pass
        quantize_embedding(model, labels["embedding"], labels["group_size"])
    random = {"random_weights": is_random(name), "arithmetic": str(dtype).removeprefix("torch.")}
    return Subject(model, {"model": name, **labels, **random, "weight_bytes": weight_bytes(model)})


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes in memory of all parameters and buffers; what is shared (the output layer's weight) counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def default_group_size(config: GPTConfig, asked: int | None) -> int:
    """The group size that was asked for, or the first of GROUP_SIZES that fits.

    Raises:
        UserError: it does not fit, or none does.
    """
    with torch.device("meta"):
        model = GPT(config)
    if asked is None:
        fitting = fitting_group_sizes(model)
        return next(size for size in GROUP_SIZES if size in fitting)
    check_fits(model, asked)
    return asked


# ---- decode and prefill ----------------------------------------------------------------------------------------------


def random_cache(model: GPT, batch_size: int, length: int) -> KVCache:
    """A cache full of standard normal numbers, the same for the same shape and device."""
    weight = model.wpe.weight
    generator = torch.Generator(weight.device).manual_seed(1)
    cache = KVCache(model.config, batch_size, length, weight.dtype, weight.device)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    return cache


def step_for(how: str, model: GPT, batch_size: int, tuning: Sequence[str]) -> StepLogits | None:
    """The computation of a step; None if it is not possible for this model and batch."""
    if how == "fused":
        return fused_step(model, batch_size)
    if how == "persistent":
        return persistent_step(model, batch_size)
    plain = model_logits(model)
    return compiled_logits(plain, tuning) if how == "compiled" else plain


def check_step(step_logits: StepLogits, model: GPT, tokens: Tensor, positions: Tensor, cache: KVCache) -> None:
    """Raises RuntimeError unless a step has about the logits of the model itself, and chooses one of the best."""
    expected = model_logits(model)(tokens, positions, cache).double()  # [B, V]
    error = ((step_logits(tokens, positions, cache).double() - expected).norm() / expected.norm()).item()
    if not error < MAX_ERROR:
        raise RuntimeError(f"a step's logits are off by {error:.3g} of their size")
    way, choose = greedy_way(step_logits)
    chosen = expected.gather(1, choose(way(tokens, positions, cache)))  # [B, 1]
    if not (chosen > expected.amax(1, keepdim=True) - MAX_ERROR * expected.std(1, keepdim=True)).all():
        raise RuntimeError("a step does not choose the best token")


@torch.inference_mode()
def time_decode(step_logits: StepLogits, model: GPT, batch_size: int, context: int, how: str, dynamic: bool) -> float:
    """Tokens a second, those of all sequences.

    Args:
        step_logits: what computes a step.
        model: whose step it is.
        batch_size: sequences at once.
        context: the length of the cache; the last tokens that fit are decoded.
        how: eager, or else captured in a graph.
        dynamic: caches of other lengths will come, and the step should not be compiled anew for them.
    """
    cache = random_cache(model, batch_size, context)
    if dynamic:
        for tensor in (*cache.k, *cache.v):
            torch._dynamo.mark_dynamic(tensor, 2)
    device = model.wpe.weight.device
    tokens = torch.arange(batch_size, device=device)[:, None] % model.config.vocab_size  # [B, 1]
    positions = torch.full((batch_size, 1), context - 1, device=device)
    check_step(step_logits, model, tokens, positions, cache)
    launched: How = "eager" if how == "eager" else "captured"
    step = DecodeStep(*greedy_way(step_logits), cache, tokens, positions, launched)
    return evaluate.step_rate(step, max(0, context - LAST_POSITIONS), context, SECONDS)


def roofline(model: GPT, batch_size: int, context: int, bandwidth: float) -> float:
    """Tokens a second at which a step's weights and cache, each read once, move at `bandwidth` bytes a second."""
    config = model.config
    cache_bytes = 2 * config.n_layer * batch_size * context * config.n_embd * model.wpe.weight.element_size()
    idle = model.wpe.weight.nbytes + sum(layer.idle_bytes for layer in model.modules() if isinstance(layer, Int4Weight))
    return batch_size * bandwidth / (weight_bytes(model) - idle + cache_bytes)


def measure(
    subject: Subject, hows: Sequence[str], args: argparse.Namespace, contexts: Sequence[int], bandwidth: float
) -> Iterator[Row]:
    """Yields the measurements of a model: decode by batch, way and context, then prefill."""
    model, labels = subject
    for batch_size in args.batch_sizes:
        for how in hows:
            step_logits = step_for(how, model, batch_size, args.tuning)
            if step_logits is None:
                print(f"{labels['model']}, {labels['weights']}, batch {batch_size}: not served by {how}", flush=True)
                continue
            dynamic = len(contexts) > 1 and min(contexts) > 1  # a length of 1 is never dynamic
            for context in sorted(contexts, reverse=True):
                rate = time_decode(step_logits, model, batch_size, context, how, dynamic)
                limit = roofline(model, batch_size, context, bandwidth)
                yield {
                    **labels,
                    **{"what": "decode", "batch": batch_size, "context": context, "how": how},
                    **{"tokens_per_second": rate, "roofline_tokens_per_second": limit},
                    **{"share_of_roofline": rate / limit, "copy_bytes_per_second": bandwidth},
                }
            step_logits = None
    batch_size, length = max(args.batch_sizes), model.config.n_positions
    tokens = torch.arange(batch_size * length, device=args.device) % model.config.vocab_size
    for how, bits in prefill_ways(labels["weights"], args.device).items():
        set_activation_bits(model, bits)
        if how == "eager":
            rate = evaluate.prefill_rate(model, tokens, length, SECONDS, batch_size)
        else:
            rate = evaluate.scoring_rate(model, tokens, length, batch_size, SECONDS)
        yield {
            **labels,
            **{"what": "prefill", "batch": batch_size, "context": length, "how": how, "tokens_per_second": rate},
        }


def bench_decode(args: argparse.Namespace) -> list[Row]:
    """Measures all that was asked for; each measurement is saved when it is taken."""
    on_gpu = args.device.startswith("cuda")
    args.models = args.models or (list(GPT2) if on_gpu else ["demo"])
    args.batch_sizes = args.batch_sizes or ([1, 8] if on_gpu else [1])
    allowed = list(dict.fromkeys((*ways("fp16", args.device), *ways("int4", args.device))))
    for how in args.how or ():
        if how not in allowed:
            raise UserError(f"--how {how} is not possible on {args.device}; possible: {', '.join(allowed)}")
    plan = []
    for name in args.models:
        config = config_of(name)
        too_long = [context for context in args.contexts or () if context > config.n_positions]
        if too_long:
            raise UserError(
                f"--contexts {too_long[0]} is more than {name} reads: its n_positions is {config.n_positions}"
            )
        contexts = args.contexts or [context for context in CONTEXTS if context <= config.n_positions]
        plan.append((name, default_group_size(config, args.group_size), contexts or [config.n_positions]))
    read_rows("--json", args.json, IDENTITY)  # or it is no file of such measurements
    bandwidth = evaluate.copy_bandwidth(torch.device(args.device))
    print(f"{describe_device(args.device)}: {bandwidth / 1e9:,.0f} GB/s copied", flush=True)
    measured = []
    with tqdm(desc="measuring", unit="rate", file=sys.stderr, leave=False) as bar:
        for name, group_size, contexts in plan:
            if is_random(name):
                print(f"{name}: random weights", flush=True)
            for subject in subjects(name, float_dtypes(args.device), group_size, args.embedding, args.device):
                hows = [how for how in ways(subject.labels["weights"], args.device) if how in (args.how or allowed)]
                for row in measure(subject, hows, args, contexts, bandwidth):
                    measured.append(environment(args.device) | row)
                    add_row("--json", args.json, measured[-1], IDENTITY)
                    bar.set_postfix_str(
                        f"{name} {row['weights']} {row['how']} {row['tokens_per_second']:,.0f} tokens/s"
                    )
                    bar.update()
                del subject
                let_go()
    return measured


def let_go() -> None:
    """Frees the memory of models that are no longer used, compiled ones too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(device: str) -> Row:
    """Where a measurement was taken: GPU (or CPU), versions, date, command."""
    return {
        "gpu": describe_device(device),
        **versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m minigpt.bench " + shlex.join(sys.argv[1:]),
    }


def format_rates(rows: Sequence[Row]) -> str:
    """A table of measurements, a line each."""
    cells = [
        [
            row["model"],
            row["what"],
            str(row["batch"]),
            str(row["context"]),
            row["weights"],
            row["embedding"],
            row["how"],
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['share_of_roofline']:.0f}%" if "share_of_roofline" in row else "",
            format_bytes(row["weight_bytes"]),
        ]
        for row in rows
    ]
    columns = ["model", "what", "batch", "context", "weights", "embedding", "how", "tokens/s", "roofline", "bytes"]
    return format_table(columns, cells)


# ---- profile ---------------------------------------------------------------------------------------------------------


def bench_profile(args: argparse.Namespace) -> list[Row]:
    """Where a decode step's time goes, in floating point and in int4, part by part."""
    read_rows("--json", args.json, ("part", "microseconds"))  # or it is another command's file
    config = config_of(args.model)
    if not 1 <= args.context <= config.n_positions:
        raise UserError(f"--context is {args.context}, it must be from 1 to {config.n_positions}")
    group_size = default_group_size(config, args.group_size)
    measured = []
    for subject in subjects(args.model, [arithmetic_dtype(args.device)], group_size, args.embedding, args.device):
        for how in ways(subject.labels["weights"], args.device):
            if how in ("compiled", "persistent"):  # their parts cannot be told apart
                continue
            step_logits = step_for(how, subject.model, args.batch_size, tuning=())
            if step_logits is None:
                continue
            parts = profile_step(
                subject.model, step_logits, random_cache(subject.model, args.batch_size, args.context), how
            )
            row = environment(args.device) | subject.labels
            row |= {"batch": args.batch_size, "context": args.context, "how": how}
            measured += [row | {"part": part, "microseconds": time} for part, time in parts.items()]
        del subject, step_logits
        let_go()
    return measured


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    decode = commands.add_parser("decode", help="tokens a second: decode and prefill")
    known = f"{', '.join(PRESETS)}, or the path of a checkpoint"
    decode.add_argument("--models", nargs="+", metavar="MODEL", help=f"{known} (default: GPT-2's four; on a CPU: demo)")
    decode.add_argument("--batch-sizes", nargs="+", type=at_least_1, metavar="B", help="(default: 1 8; on a CPU: 1)")
    default = " ".join(map(str, CONTEXTS))
    decode.add_argument(
        "--contexts",
        nargs="+",
        type=at_least_1,
        metavar="T",
        help=f"(default: those of {default} that the model reads)",
    )
    decode.add_argument(
        "--how",
        nargs="+",
        choices=("eager", "captured", "compiled", "fused", "persistent"),
        help="(default: all that are possible)",
    )
    decode.add_argument(
        "--tuning",
        nargs="*",
        choices=COMPILER_TUNING,
        default=COMPILER_TUNING[:1],
        help=f"what the compiler does beyond its defaults, for long (default: {COMPILER_TUNING[0]})",
    )
    profile = commands.add_parser("profile", help="where a decode step's time goes")
    on_gpu = torch.cuda.is_available()
    profile.add_argument("--model", default="gpt2" if on_gpu else "demo", help=f"{known} (default here: %(default)s)")
    profile.add_argument("--batch-size", type=at_least_1, default=1, metavar="B", help="(default: 1)")
    profile.add_argument("--context", type=at_least_1, default=512, metavar="T", help="(default: 512)")
    for command, name in ((decode, "decode"), (profile, "profile")):
        command.add_argument("--group-size", type=at_least_1, help="(default: the largest that fits, up to 128)")
        command.add_argument(
            "--embedding",
            nargs="+",
            choices=CHOICES,
            default=CHOICES[:1],
            help=f"of int4 models (default: {CHOICES[0]})",
        )
        command.add_argument(
            "--json", type=path, default=Path(f"results/{name}.json"), metavar="FILE", help="(default: %(default)s)"
        )
        add_device_argument(command)
    plots = commands.add_parser("plots", help="draw what the other two saved; needs matplotlib")
    plots.add_argument("--folder", type=Path, default=Path("results"), help="where their files are (default: results)")
    args = parser.parse_args()
    if args.command != "plots":
        check_device(args.device)
        check_file("--json", args.json)
    return args


def main() -> None:
    """Measures, prints and saves, or draws."""
    args = parse_args()
    if args.command == "decode":
        print("\n" + format_rates(bench_decode(args)))
        print(f"\n{args.json}")
    elif args.command == "profile":
        rows = bench_profile(args)
        write_json(args.json, rows)
        print(format_profile(rows))
        print(f"\n{args.json}")
    else:
        print(f"drew {', '.join(map(str, bench_plots.draw_all(args.folder)))}")


if __name__ == "__main__":
    run_script(main)
