"""The harness that all lessons share: compare with float64, time on a GPU, set a time beside its floor.

How a time is taken here: the launches are captured in a CUDA graph, so that no Python runs between them; they walk
through enough copies of the weight that the L2 cache cannot hold them, as a real model's layers do; the graph is
replayed, and the median replay counts. Every lesson times its baseline in the same run.

Before each measurement the GPU rests for a fifth of a second. What large products draw, 700 watts and more, makes an
H200 lower its clock rate, from 1.98 to 1.5 GHz and less, and what comes right behind them is measured at that rate; it
shows most where int4 waits for its own instructions, and FP16 for memory. Lesson 22, 16 tokens of 8192 x 8192, behind
products of 2048 tokens (results/attempts.json): at once 16.4 and 16.6 microseconds, after 0.05 seconds 13.6 and 14.1,
after 0.1 13.0 and 13.9, after 0.2 and 0.5 13.0; FP16 34.8, 33.8, 33.5 and 33.4. (Lessons
1, 2 and 14, measured before the rest came, have no large products.)
"""

import argparse
import datetime
import functools
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.int8 import Int8Weight
from kernels.k00_reference import QuantizedWeight, dequantize_reference, quantize_reference
from kernels.prepared import PreparedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU: Triton's interpreter

ON_NVIDIA = torch.cuda.is_available() and torch.version.cuda is not None  # where inline PTX assembly runs

REST = 0.2  # seconds before a measurement: see above

H200 = 132  # multiprocessors: of what launch options were measured on

# The interpreter gets bfloat16 arithmetic wrong without saying so; a GPU does not.
ACTIVATION_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]

Check = tuple[str, bool | None]  # what was compared, whether it agreed; None: it could not be compared here
Row = dict[str, Any]  # one measurement


@functools.cache
def early_launch() -> dict[str, bool]:
    """What to launch a kernel with that may start before the one ahead has ended (lesson 9): possible from Hopper on.

    PDL tells the kernel, launch_pdl the launch. Cached, as is `is_hopper`: every launch asks.

    What such a kernel reads before its `gdc_wait` must have been written long before: weights, prepared when the model
    was loaded. The wait is what makes the writes of the kernels ahead visible for certain.
    """
    possible = ON_NVIDIA and torch.cuda.get_device_capability(DEVICE)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if possible else {"PDL": False}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` has wgmma, for lessons 12, 15, 22, 23: Hopper only, as wgmma came with it and went with it."""
    return ON_NVIDIA and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def has_mma(device: torch.device) -> bool:
    """Whether `device` can run lessons 17, 18 and 20: an NVIDIA GPU whose tensor cores know mma.sync with bf16."""
    return ON_NVIDIA and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has: an H200 132, as an H100 has, but as a PCIe card 114. Cached, as above.

    In the interpreter as many as an H200, so that lessons choose alike.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H200


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on a GPU may use."""
    index = torch.cuda.current_device() if device.index is None else device.index
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["max_shared_mem"]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is one for kernels' constants as well, and takes 4 microseconds of each launch."""
    return -(-a // b)


def check_operands(
    x: Tensor, weight: QuantizedWeight | PreparedWeight | Int8Weight, bias: Tensor | None = None
) -> None:
    """Raises ValueError unless x is float16 or bfloat16 [..., in_features] and bias, if any, [out_features]."""
    n, k = weight.out_features, weight.in_features
    if x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, its last dimension must be the weight's in_features {k}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, it must be float16 or bfloat16")
    if bias is not None and list(bias.shape) != [n]:
        raise ValueError(f"bias has shape {list(bias.shape)}, it must be [{n}], the weight's out_features")


def check_hopper(x: Tensor) -> None:
    """Raises ValueError unless x is on a GPU with wgmma."""
    if not is_hopper(x.device):
        raise ValueError(f"x is on {x.device}, this kernel needs a Hopper GPU (H100, H200)")


def check_group_size(weight: PreparedWeight, unit: int) -> None:
    """Raises ValueError unless the weight's group size is a multiple of `unit`."""
    if weight.group_size % unit:
        raise ValueError(f"group_size is {weight.group_size}, this kernel takes multiples of {unit}")


def aligned_tokens(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], one row after another, from a boundary of 16 bytes on: a copy only where it must be.

    Asynchronous copies to shared memory, by threads (cp.async) or by the copy engine (TMA), want that.
    """
    x_2d = x.reshape(-1, x.shape[-1]).contiguous()
    return x_2d.clone() if x_2d.data_ptr() % 16 else x_2d


def random_tensor(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """Standard normal numbers [*shape] on DEVICE; the same numbers for the same seed and device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference| in float64 (Frobenius norms); infinite if anything is not finite."""
    error = (out.double() - reference.double()).norm() / reference.double().norm()
    return error.item() if torch.isfinite(error) else math.inf


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that a matmul in `dtype` with fp32 accumulation stays under: its result is rounded once."""
    return {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def copies_to_fill_cache(n_bytes: int) -> int:
    """How many buffers of n_bytes are needed so that walking through them finds none in the L2 cache."""
    return max(2, math.ceil(3 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / n_bytes))


def microseconds(function: Callable[..., object], arguments: Sequence[tuple[Any, ...]], rest: float = REST) -> float:
    """Median time of one call, in microseconds, over replays of a CUDA graph that calls `function` in turn.

    Args:
        function: launches work on the GPU.
        arguments: what it is called with: the same work on different copies of its data.
        rest: seconds to wait first, for the clock rate; less where a rough answer will do.
    """
    torch.cuda.synchronize()
    sleep(rest)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for args in arguments:
            function(*args)  # compiles what needs compiling, before the capture
        one_round = triton.testing.do_bench(lambda: [function(*args) for args in arguments], warmup=1, rep=5)
    torch.cuda.synchronize()
    # A millisecond's work a replay: less, and the events' own resolution shows; more, and the clock rate may fall.
    rounds = max(1, round(1.0 / one_round))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for args in arguments:
                function(*args)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(arguments)))
    return sorted(times)[len(times) // 2]


@functools.cache
def copy_bandwidth() -> float:
    """The memory ceiling: bytes read plus bytes written per second by a large device-to-device copy."""
    source = random_tensor(2**29)  # 1 GiB
    target = torch.empty_like(source)
    # Not in a graph: there a copy is left to the copy engine, which reaches two thirds of what a kernel does.
    time = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")  # milliseconds
    return 2 * source.nbytes / (time * 1e-3)


@functools.cache
def matmul_rate() -> float:
    """The arithmetic ceiling: operations per second of a large fp16 matrix product on random data."""
    a, b = random_tensor(8192, 8192, seed=1), random_tensor(8192, 8192, seed=2)
    time = triton.testing.do_bench(lambda: torch.matmul(a, b), return_mode="median")  # milliseconds
    return 2 * 8192**3 / (time * 1e-3)


def floor_microseconds(n_bytes: float, operations: float = 0.0) -> float:
    """The roofline: no kernel that moves n_bytes and does `operations` is faster on this GPU."""
    return 1e6 * max(n_bytes / copy_bandwidth(), operations / matmul_rate())


def check_matmul(
    matmul: Callable[[Tensor, Any], Tensor],
    prepare: Callable[[QuantizedWeight], Any],
    shapes: Sequence[tuple[int, int, int, int]],
    limit: float | None = None,
) -> Iterator[Check]:
    """Compares an int4 matmul with float64, which multiplies by the same int4 weight.

    Args:
        matmul: takes x [M, K] and what `prepare` returns.
        prepare: makes from the file's format what `matmul` reads.
        shapes: M, N, K, group size of each case; all are tried symmetric and not, in every dtype.
        limit: the relative error that is allowed, if it is not `tolerance`.
    """
    for m, n, k, group_size in shapes:
        for symmetric in (True, False):
            packed = quantize_reference(random_tensor(n, k, seed=1), group_size, symmetric)
            w = dequantize_reference(packed, torch.float32).double()
            for dtype in ACTIVATION_DTYPES:
                x = random_tensor(m, k, dtype=dtype, seed=2)
                error = relative_error(matmul(x, prepare(packed)), x.double() @ w.t())
                what = f"{m} x {n} x {k}, {group_size=}, {symmetric=}, {dtype}, relative error {error:.1e}"
                yield what, error < (limit or tolerance(dtype))


def bench_matmul(
    matmul: Callable[[Tensor, Any], Tensor],
    prepare: Callable[[QuantizedWeight], Any],
    tokens: Sequence[int] = (1, 16, 128, 512, 2048),
) -> list[Row]:
    """Times an int4 matmul on a square 8192-wide layer, group sizes 64 and 128, beside torch's own fp16 matmul.

    Args:
        matmul, prepare: as for `check_matmul`.
        tokens: the values of M.
    """
    n = k = 8192
    weights = [random_tensor(n, k, seed=seed) for seed in range(6)]  # 36 MB each in int4: past any L2 cache
    inputs = [random_tensor(m, k, seed=9) for m in tokens]
    fp16 = [microseconds(torch.nn.functional.linear, [(x, w) for w in weights]) for x in inputs]
    rows = []
    for group_size in (64, 128):
        packed = [quantize_reference(w, group_size) for w in weights]
        weight_bytes = sum(tensor.nbytes for tensor in packed[0])
        prepared = [prepare(p) for p in packed]
        for x, fp16_time in zip(inputs, fp16, strict=True):
            time = microseconds(matmul, [(x, p) for p in prepared])
            sizes = {"m": len(x), "n": n, "k": k, "group_size": group_size}
            rows.append(matmul_row(sizes, weight_bytes, time, fp16_time))
    return rows


def bench_layers(
    matmul: Callable[[Tensor, Any], Tensor],
    prepare: Callable[[QuantizedWeight], Any],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    group_size: int,
) -> list[Row]:
    """Times an int4 matmul on several layers beside torch's own fp16 matmul, each with weights past the L2 cache.

    Args:
        matmul, prepare: as for `check_matmul`.
        shapes: (N, K) of each layer.
        tokens: the values of M.
        group_size: divides each K.
    """
    rows = []
    for n, k in shapes:
        weights = [random_tensor(n, k, seed=seed) for seed in range(copies_to_fill_cache(n * k // 2))]
        packed = [quantize_reference(w, group_size) for w in weights]
        prepared = [prepare(p) for p in packed]
        weight_bytes = sum(tensor.nbytes for tensor in packed[0])
        for m in tokens:
            x = random_tensor(m, k, seed=9)
            fp16_time = microseconds(torch.nn.functional.linear, [(x, w) for w in weights])
            time = microseconds(matmul, [(x, p) for p in prepared])
            sizes = {"m": m, "n": n, "k": k, "group_size": group_size}
            rows.append(matmul_row(sizes, weight_bytes, time, fp16_time))
    return rows


def matmul_row(sizes: Row, weight_bytes: int, time: float, fp16_time: float) -> Row:
    """One measurement of a matmul: `sizes` with at least m, n, k; the bytes of the weight; microseconds."""
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    floor = floor_microseconds(2 * (m * k + m * n) + weight_bytes, 2 * m * n * k)
    return {
        **sizes,
        "microseconds": time,
        "fp16_microseconds": fp16_time,
        "times_fp16": fp16_time / time,
        "share_of_roofline": floor / time,
    }


def environment() -> Row:
    """Where a measurement was taken: GPU, versions, date, command."""
    return {
        "gpu": torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command_line(),
    }


def command_line() -> str:
    """The command that started this program, as one would type it in the project's folder."""
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {main_spec.name}" if main_spec else Path(sys.argv[0]).name
    return " ".join(["python", program, *sys.argv[1:]])


def print_table(rows: Sequence[Row]) -> None:
    """Prints measurements as an aligned table; the first row's keys are the columns."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def print_ceilings() -> None:
    """Prints what no kernel of this run can pass."""
    print(f"ceilings of this run: {copy_bandwidth() / 1e9:.0f} GB/s copied, {matmul_rate() / 1e12:.0f} TFLOP/s fp16")


def run_lesson(check: Callable[[], Iterator[Check]], bench: Callable[[], list[Row]]) -> None:
    """The command line of a lesson: --check compares with the reference, --bench measures, --json saves that.

    Exit status: 1 if a check failed, 2 if --bench is asked for without a GPU.
    """
    lesson = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=lesson, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the reference (the default)")
    parser.add_argument("--bench", action="store_true", help="measure on this machine's GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the measurements")
    args = parser.parse_args()
    if args.json and not args.bench:
        parser.error("--json saves what --bench measures: give both")
    if args.bench and DEVICE.type != "cuda":
        parser.error("--bench needs a GPU, and torch sees none here; --check does what it can without")
    run_script(lambda: _run_lesson(args, check, bench))


def run_script(main: Callable[[], None]) -> None:
    """Runs a command line's `main`, and ends in a line what can go wrong outside of it.

    Exit status: 2 for a failing disk, 130 for Ctrl-C, 141 where nobody reads the output any more (`| head`).
    """
    try:
        main()
        sys.stdout.flush()  # here, where nobody reading it is noticed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more while it exits
        sys.exit(141)
    except OSError as error:  # the disk is full, a folder is not writable
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _run_lesson(args: argparse.Namespace, check: Callable[[], Iterator[Check]], bench: Callable[[], list[Row]]) -> None:
    if args.check or not args.bench:
        where = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "Triton's interpreter"
        results = []
        for what, agrees in check():
            print(f"{'skip' if agrees is None else 'ok  ' if agrees else 'FAIL'}  {what}")
            results.append(agrees)
        failed, skipped = results.count(False), results.count(None)
        summary = f"{failed} FAILED" if failed else f"{skipped} skipped" if skipped else "all agree"
        print(f"{summary} ({where})")
        if failed:
            sys.exit(1)
    if args.bench:
        rows = bench()
        print_table(rows)
        print_ceilings()
        if args.json:
            save_json(args.json, [{**environment(), **row} for row in rows])


def save_json(path: Path, content: object) -> None:
    """Writes JSON whole or not at all: to a file beside `path` first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp-write")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
