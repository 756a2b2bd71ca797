"""The course's results: how fast is the int4 matmul, and how large the error of int4 weights, shape by shape.

    python -m kernels.bench matmul                  beside torch's fp16 matmul, on a GPU -> results/matmul.json
    python -m kernels.bench matmul --shapes gpt2    the linear layers of GPT-2, from 124M to 1.5B
    python -m kernels.bench quantization            on a normal matrix, anywhere -> results/quantization.json
    python -m kernels.bench plots                   both as pictures, from those files

Times are taken as in the lessons (kernels/common.py): FP16 in the same run, and weights that the cache does not hold.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from kernels import QuantizedWeight, common, plots
from kernels.k00_reference import SYMMETRIC_ZERO, dequantize_reference

Shape = tuple[int, int]  # out_features, in_features
Runner = Callable[[Tensor], Tensor]  # x [M, K] -> [M, N], with a weight of its own

SHAPES = ("512x2048", "2048x2048", "8192x2048", "2048x8192", "8192x8192")
GPT2_WIDTHS = (768, 1024, 1280, 1600)
GPT2_VOCABULARY = 50257

SAMPLE = 64  # tokens and outputs that are compared with float64
MAX_ERROR = 0.05  # 8-bit activations cost about 0.01; a kernel that is wrong is off by about 1


# ---- matmul ----------------------------------------------------------------------------------------------------------


def ours(weight: QuantizedWeight, activation_bits: int) -> Runner:
    """The matmul that programs use, with activations of 16 or 8 bits."""
    prepared = kernels.prepare(weight)
    return lambda x: kernels.matmul(x, prepared, activation_bits=activation_bits)


def unpacked(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """What other people's packers start from: codes uint8 [N, K]; scales fp16, zeros fp16 [N, K/group_size]."""
    codes, scales, zeros = kernels.unpack_weight(weight)
    return codes.to(torch.uint8).contiguous(), scales.contiguous(), zeros.half()


def torch_int4(weight: QuantizedWeight) -> Runner:
    """torch's own int4 matmul ("tinygemm"): bf16 activations, K a multiple of 128, N of 8."""
    codes, scales, zeros = unpacked(weight)
    words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)  # 8 tiles of 16 along K
    # There w = (code - 8) * scale + offset.
    scales_and_offsets = torch.stack([scales, (SYMMETRIC_ZERO - zeros) * scales], dim=-1)  # [N, K/group_size, 2]
    scales_and_offsets = scales_and_offsets.transpose(0, 1).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, words, weight.group_size, scales_and_offsets)


def gemlite(weight: QuantizedWeight) -> Runner:
    """GemLite's Triton kernels (pip install gemlite): fp16 activations, K a multiple of 32."""
    from gemlite.helper import A16Wn

    return A16Wn(device=weight.qweight.device).from_weights(*unpacked(weight), 4, weight.group_size)


# How a weight becomes a matmul, and the dtype of its activations.
MODES: dict[str, tuple[Callable[[QuantizedWeight], Runner], torch.dtype]] = {
    "w4a16": (partial(ours, activation_bits=16), torch.float16),
    "w4a8": (partial(ours, activation_bits=8), torch.float16),
    "peer:torch": (torch_int4, torch.bfloat16),
    "peer:gemlite": (gemlite, torch.float16),
}
OUR_MODES = ("w4a16", "w4a8")


def installed_peers() -> list[str]:
    """The peers among MODES that can be imported here; says so of one that cannot."""
    if find_spec("gemlite"):
        return ["peer:torch", "peer:gemlite"]
    print("gemlite is not installed, and left out")
    return ["peer:torch"]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """While it lasts torch.empty is filled with NaN, so that an output that nobody wrote is noticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic: only the filling is wanted
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def sampled_error(run: Runner, x: Tensor, weight: QuantizedWeight) -> float:
    """The relative error of run(x) against float64, on SAMPLE random tokens and outputs.

    Args:
        run: the matmul; called twice, the first time to compile and tune, then with poisoned memory.
        x: float16 or bfloat16 [M, K].
        weight: of [N, K], what `run` multiplies with.

    Raises:
        ArithmeticError: if the result is not [M, N], not finite everywhere, or further off than MAX_ERROR.
    """
    run(x)
    with poisoned_memory():
        out = run(x)
    if out.shape != (len(x), weight.out_features) or not out.isfinite().all():
        raise ArithmeticError(f"the result {list(out.shape)} has the wrong shape, or numbers that are not finite")
    tokens = torch.randperm(len(x), device=x.device)[:SAMPLE]
    outputs = torch.randperm(weight.out_features, device=x.device)[:SAMPLE]
    w = dequantize_reference(weight, torch.float32)[outputs].double()
    error = common.relative_error(out[tokens][:, outputs], x[tokens].double() @ w.t())
    if error > MAX_ERROR:
        raise ArithmeticError(f"the result is wrong: relative error {error:.1e}")
    return error


def floor_microseconds(m: int, weight: QuantizedWeight, mode: str) -> float:
    """The roofline of a matmul with m tokens: tensor cores do two 8-bit operations in the time of a 16-bit one."""
    n, k = weight.out_features, weight.in_features
    n_bytes = 2 * m * (k + n) + sum(tensor.nbytes for tensor in weight)
    return common.floor_microseconds(n_bytes, 2 * m * n * k / (2 if mode == "w4a8" else 1))


def mode_rows(mode: str, weights: Sequence[QuantizedWeight], inputs: Sequence[Tensor]) -> Iterator[common.Row]:
    """Times one way to multiply with int4 weights: a row for each of `inputs`, fp16 [M, K].

    A peer that raises yields a row with "refused", its reason, in place of times; our own errors are raised.
    """
    prepare, dtype = MODES[mode]
    runs: list[Runner] = []
    for x in inputs:
        row: common.Row = {"m": len(x), "mode": mode}
        x = x.to(dtype)
        try:
            runs = runs or [prepare(weight) for weight in weights]
            row["error"] = sampled_error(runs[0], x, weights[0])
            row["microseconds"] = common.microseconds(lambda run, x: run(x), [(run, x) for run in runs])
            row["share_of_roofline"] = floor_microseconds(len(x), weights[0], mode) / row["microseconds"]
        except Exception as error:
            if mode in OUR_MODES:
                raise
            row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def shape_rows(
    n: int, k: int, tokens: Sequence[int], group_sizes: Sequence[int], modes: Sequence[str]
) -> Iterator[common.Row]:
    """Times all modes with a weight of [n, k], beside FP16, which is timed once for each number of tokens."""
    copies = common.copies_to_fill_cache(n * k // 2)  # enough for int4 is more than enough for FP16
    weights = [common.random_tensor(n, k, seed=seed) for seed in range(copies)]
    inputs = [common.random_tensor(m, k, seed=copies + m) for m in tokens]
    linear = torch.nn.functional.linear
    fp16 = {len(x): common.microseconds(linear, [(x, weight) for weight in weights]) for x in inputs}
    for group_size in group_sizes:
        quantized = [kernels.quantize(weight, group_size) for weight in weights]
        for mode in modes:
            for row in mode_rows(mode, quantized, inputs):
                row |= {"n": n, "k": k, "group_size": group_size, "fp16_microseconds": fp16[row["m"]]}
                if "microseconds" in row:
                    row["times_fp16"] = row["fp16_microseconds"] / row["microseconds"]
                yield row


def fitting(shapes: Sequence[Shape], group_sizes: Sequence[int]) -> dict[Shape, list[int]]:
    """The group sizes that each shape can have; prints what it leaves out."""
    fits: dict[Shape, list[int]] = {}
    for n, k in shapes:
        fits[n, k] = [size for size in group_sizes if size in kernels.group_sizes(k)]
        for size in group_sizes:
            if size not in fits[n, k]:
                print(f"{n} x {k}: skipped group size {size}, which does not cut rows of {k} into groups")
    return fits


def bench_matmul(
    shapes: Sequence[Shape], tokens: Sequence[int], group_sizes: Sequence[int], modes: Sequence[str]
) -> list[common.Row]:
    """Times `modes` on a GPU, for weights of [N, K] in `shapes`, M in `tokens` and all group sizes that divide K.

    Returns:
        One row a cell, with the keys of `common.environment` and: m, n, k, group_size, mode; microseconds,
        fp16_microseconds, times_fp16 (how many times as fast as FP16), error (relative, against float64),
        share_of_roofline; the run's ceilings copy_bandwidth (bytes/s) and matmul_rate (fp16 operations/s). A peer
        that could not has "refused", its reason, in place of its times.
    """
    fits = fitting(shapes, group_sizes)
    run = common.environment() | {"copy_bandwidth": common.copy_bandwidth(), "matmul_rate": common.matmul_rate()}
    rows = []
    with tqdm(total=len(tokens) * len(modes) * sum(map(len, fits.values())), unit="cell") as progress:
        for (n, k), sizes in fits.items():
            progress.set_description(f"{n} x {k}")
            for row in shape_rows(n, k, tokens, sizes, modes):
                rows.append(run | row)
                progress.update()
    return rows


def print_matmul(rows: Sequence[common.Row]) -> None:
    """Prints times FP16, a table for each mode and group size: tokens down, shapes across."""
    for mode, group_size in dict.fromkeys((row["mode"], row["group_size"]) for row in rows):
        chosen = [row for row in rows if (row["mode"], row["group_size"]) == (mode, group_size)]
        table: dict[int, common.Row] = {}
        for row in chosen:
            cell = "refused" if "refused" in row else f"{row['times_fp16']:.2f}x"
            table.setdefault(row["m"], {"M": row["m"]})[f"{row['n']}x{row['k']}"] = cell
        print(f"\n{mode}, group size {group_size}: times FP16")
        common.print_table(list(table.values()))
        for reason in dict.fromkeys(row["refused"] for row in chosen if "refused" in row):
            print(f"refused: {reason}")


# ---- quantization ----------------------------------------------------------------------------------------------------


def plain_absmax(weight: Tensor, group_size: int) -> QuantizedWeight:
    """The rule one writes first: scale = max |w| / 8, codes rounded and clamped to -8..7. float32 [N, K] -> int4.

    Whatever lies beyond 7.5 steps above zero is clamped, the largest weight of every second group among it.
    """
    groups = weight.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / 8).half()  # [N, K/group_size]
    codes = torch.round(groups / scales[..., None].float()).clamp(-8, 7) + 8
    return QuantizedWeight(
        qweight=kernels.pack(codes.int().flatten(1).t()),
        scales=scales.t().contiguous(),
        qzeros=kernels.pack(torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.int32)).t().contiguous(),
    )


METHODS: dict[str, Callable[[Tensor, int], QuantizedWeight]] = {
    "plain absmax": plain_absmax,
    "absmax": partial(kernels.quantize, symmetric=True),
    "minmax": partial(kernels.quantize, symmetric=False),
    "mse symmetric": partial(kernels.quantize, symmetric=True, search=True),
    "mse": partial(kernels.quantize, symmetric=False, search=True),
}
SYMMETRIC_METHODS = {"plain absmax", "absmax", "mse symmetric"}

# Mean absolute errors that the project before this one published for the plain rule, on a normal matrix of its own.
PUBLISHED_MAE = {
    16: 0.0698, 32: 0.0763, 64: 0.0829, 128: 0.0894, 256: 0.0958, 512: 0.1020, 1024: 0.1079, 2048: 0.1136, 4096: 0.1190,
}  # fmt: skip


def bench_quantization(size: int = 4096) -> list[common.Row]:
    """The error that int4 leaves on a [size, size] standard normal matrix, the same one on every machine.

    Returns:
        One row for each method and group size, a power of two from 16 to `size`, with the keys of
        `common.environment` and: method, symmetric, n, k, group_size; mae and mse, mean absolute and mean squared
        error; bits_per_weight and compression, counting codes, scales and zeros; published_mae, of the plain rule.
    """
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(common.DEVICE)
    sizes = [2**i for i in range(4, size.bit_length())]
    cells = [(method, group_size) for method in METHODS for group_size in sizes]
    return [
        {**common.environment(), **quantization_row(weight, method, group_size)}
        for method, group_size in tqdm(cells, unit="cell")
    ]


def quantization_row(weight: Tensor, method: str, group_size: int) -> common.Row:
    """The error and the size of `weight`, float32 [N, K], in int4."""
    quantized = METHODS[method](weight, group_size)
    error = (kernels.dequantize(quantized, torch.float32) - weight).double()
    bits = 8 * sum(tensor.nbytes for tensor in quantized) / weight.numel()
    return {
        "method": method,
        "symmetric": method in SYMMETRIC_METHODS,
        "n": weight.shape[0],
        "k": weight.shape[1],
        "group_size": group_size,
        "mae": error.abs().mean().item(),
        "mse": error.square().mean().item(),
        "bits_per_weight": bits,
        "compression": 16 / bits,
        "published_mae": PUBLISHED_MAE[group_size] if method == "plain absmax" else None,
    }


def print_quantization(rows: Sequence[common.Row]) -> None:
    """Prints mean absolute errors: group sizes down, methods across."""
    table: dict[int, common.Row] = {}
    for row in rows:
        line = table.setdefault(
            row["group_size"],
            {"group size": row["group_size"], "bits": f"{row['bits_per_weight']:.2f}", "published": ""},
        )
        line[row["method"]] = f"{row['mae']:.4f}"
        if row["published_mae"]:
            line["published"] = f"{row['published_mae']:.4f}"
    common.print_table(list(table.values()))


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_shape(word: str) -> list[Shape]:
    """A word of --shapes: NxK, as in 8192x2048, is one shape; gpt2 is all that GPT-2's four sizes have."""
    if word == "gpt2":
        linears = [(n * w, k * w) for w in GPT2_WIDTHS for n, k in ((3, 1), (1, 1), (4, 1), (1, 4))]
        return linears + [(GPT2_VOCABULARY, w) for w in GPT2_WIDTHS]
    try:
        n, k = (positive(number) for number in word.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no shape: NxK as in 8192x2048, or gpt2") from None
    return [(n, k)]


def positive(word: str) -> int:
    """A whole number above zero; anything else raises ValueError."""
    if int(word) < 1:
        raise ValueError(f"{word} is not above zero")
    return int(word)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    matmul = commands.add_parser("matmul", help="time int4 beside fp16, on a GPU")
    matmul.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=[parse_shape(word) for word in SHAPES],
        metavar="NxK",
        help=f"out_features x in_features, or gpt2 (default: {' '.join(SHAPES)})",
    )
    matmul.add_argument("--tokens", nargs="+", type=positive, default=[1, 16, 128, 512, 2048], metavar="M")
    matmul.add_argument("--group-sizes", nargs="+", type=positive, default=[128, 64], metavar="SIZE")
    matmul.add_argument("--modes", nargs="+", choices=OUR_MODES, default=OUR_MODES)
    matmul.add_argument("--peers", action="store_true", help="time torch's int4 matmul too, and gemlite's if installed")
    matmul.add_argument("--json", type=Path, default=Path("results/matmul.json"), metavar="FILE")
    quantization = commands.add_parser("quantization", help="measure the error of int4, with or without a GPU")
    quantization.add_argument("--json", type=Path, default=Path("results/quantization.json"), metavar="FILE")
    drawing = commands.add_parser("plots", help="draw what the other two saved")
    drawing.add_argument(
        "--folder", type=Path, default=Path("results"), help="where their files are (default: results)"
    )
    return parser


def draw(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Draws what is in a folder of results; what keeps it from that is the parser's error."""
    if not find_spec("matplotlib"):
        parser.error("plots need matplotlib: pip install matplotlib")
    try:
        print(f"drew {', '.join(map(str, plots.draw_all(folder)))}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def main() -> None:
    """Measures, prints and saves, or draws. Exit status 2 for what cannot be done here: no GPU, no matplotlib."""
    parser = make_parser()
    args = parser.parse_args()
    if args.command == "plots":
        draw(parser, args.folder)
        return
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not after minutes of measuring
    except OSError as error:
        parser.error(f"--json {args.json}: {error}")
    if args.command == "quantization":
        rows = bench_quantization()
        print_quantization(rows)
        common.save_json(args.json, rows)
    else:
        if common.DEVICE.type != "cuda":
            parser.error("matmul needs a GPU, and torch sees none here; quantization runs everywhere")
        shapes = [shape for word in args.shapes for shape in word]
        modes = [*args.modes, *(installed_peers() if args.peers else [])]
        rows = bench_matmul(shapes, args.tokens, args.group_sizes, modes)
        if not rows:
            parser.error("nothing to measure: no group size fits any of the shapes")
        print_matmul(rows)
        print()
        common.print_ceilings()
        common.save_json(args.json, rows)


if __name__ == "__main__":
    common.run_script(main)
