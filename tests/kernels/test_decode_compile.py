"""Lessons 17 to 21, compiled ahead of time for GPUs that are not here: they fit, and load the weight before they wait.

This file runs itself as a program of its own, because the interpreter, in which the other tests run the kernels, is
chosen for a whole process. Lessons 17, 18, 21 and the output layer of 20 are Gluon, which has no interpreter at all.
"""

import json
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from kernels import Parts, PreparedWeight, Stream
from kernels.k00_reference import quantize_reference
from kernels.prepared import prepare

pytest.importorskip("triton", reason="Triton is for Linux only")

# Bytes of shared memory that a block may use (CUDA C++ programming guide, table of limits).
SHARED_MEMORY = {arch: kilobytes * 1024 for arch, kilobytes in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227))}
SHARED_MEMORY[120] = 99 * 1024
WEIGHT = {"codes_ptr": "i16", "scale_zeros_ptr": "i32"}
POINTED = {torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16"}
JOINED = ((12, 1024), (16, 512), (20, 200), (25, 1024))  # heads, positions: in 8, 4, 2 and 8 parts


def block_m(m):
    """As the launchers choose it."""
    return 1 if m == 1 else 8 if m <= 8 else 16


def lesson_17(dtype, m, n, k):
    from kernels import k17_few_tokens as lesson

    pointers = {"x_ptr": dtype, **WEIGHT, "bias_ptr": dtype, "out_ptr": dtype}
    options = {"HAS_BIAS": True, "GROUP_SIZE": 64, "BLOCK_M": block_m(m), **lesson.launch_options(k)}
    return lesson.few_tokens_kernel, pointers, options


def lesson_17_in_passes(dtype, group_size, n, k):
    from kernels import k17_few_tokens as lesson

    pointers = {"x_ptr": dtype, **WEIGHT, "bias_ptr": dtype, "out_ptr": dtype}
    return lesson.passes_kernel, pointers, {"HAS_BIAS": True, "GROUP_SIZE": group_size, **lesson.pass_options(n, k)}


def lesson_18(way, m, k):
    """way: norm, gelu (norm and GELU) or add."""
    from kernels import k18_fused_layers as lesson

    pointers = {"x_ptr": "fp16", **WEIGHT, "folded_ptr": "fp32", "gamma_ptr": "fp16", "residual_ptr": "fp32"}
    pointers |= {"bias_ptr": "fp16" if way == "add" else "fp32", "sums_ptr": "fp32", "out_ptr": "fp16"}
    options = {"NORM": way != "add", "GELU": way == "gelu", "ADD": way == "add", "GROUP_SIZE": 64}
    options |= {"SPLITS": 0, "BLOCK_L": 128, "logs_ptr": None, "positions_ptr": None}
    options |= {"TILES": 1 << (k // 16 - 1).bit_length(), "BLOCK_M": block_m(m), **lesson.launch_options(k)}
    options["READY"] = lesson.ready_blocks(m, 4 * k, k)
    return lesson.fused_kernel, pointers, options


def lesson_20(m, k):
    from kernels import k20_step_ends as lesson

    pointers = {"x_ptr": "fp16", "codes_ptr": "i8", "scales_ptr": "fp16", "bias_ptr": "fp32", "folded_ptr": "fp32"}
    pointers |= {"sums_ptr": "fp32", "out_ptr": "fp16", "best_ptr": "fp32", "index_ptr": "i32"}
    options = {"TILES": 1 << (k // 16 - 1).bit_length(), "BLOCK_M": block_m(m), **lesson.launch_options(k)}
    return lesson.output_kernel, pointers, options


def as_launched(lesson, name, launch):
    """A kernel, and the pointers and constants that `launch` launches it with. No pointer, None, is a constant."""
    kernel = getattr(lesson, name)
    with mock.patch.object(lesson, name) as stub:
        launch()
    arguments, options = stub.__getitem__.return_value.call_args
    options.pop("launch_pdl", None)  # on a GPU
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    pointers = {name: POINTED[value.dtype] for name, value in given.items() if isinstance(value, torch.Tensor)}
    return kernel, pointers, options | {name: None for name, value in given.items() if value is None}


def attention(batch_size, heads, length, joins, size=64):
    """Lesson 19 as its launchers launch it: its parts joined, or left for the next kernel."""
    from kernels import k19_attention as lesson

    parts = Parts.empty(batch_size, heads, size, length, torch.device("cpu"))
    qkv = torch.zeros(batch_size, 3 * heads * size, dtype=torch.float16)
    k, v = (torch.zeros(batch_size, heads, length, size, dtype=torch.float16) for _ in range(2))
    positions = torch.zeros(batch_size, 1, dtype=torch.int64)
    attend = lesson.attend if joins else lesson.attend_in_parts
    return as_launched(lesson, "attention_kernel", lambda: attend(qkv, k, v, positions, parts))


def joining_projection(heads, length):
    """Lesson 18 as its launcher launches it behind lesson 19, for one token."""
    from kernels import k18_fused_layers as lesson

    c, cpu = 64 * heads, torch.device("cpu")
    weight = prepare(quantize_reference(torch.ones(c, c), 64))
    bias = gamma = torch.zeros(c, dtype=torch.float16)
    parts, stream = Parts.empty(1, heads, 64, length, cpu), Stream.zeros(1, c, cpu)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    return as_launched(lesson, "fused_kernel", lambda: lesson.add_joined(parts, positions, weight, bias, stream, gamma))


def gluon_variants():
    """Arch, tokens, and what the launchers make of GPT-2's layers there: kernel, pointers, options."""
    for m, k in ((1, 768), (8, 768), (16, 768), (1, 1024), (8, 1280), (1, 1600), (8, 1600), (16, 1600), (1, 3072)):
        yield 90, m, k, lesson_17("fp16", m, 4 * k, k)
    for m, k in ((16, 4096), (1, 6400), (8, 6400)):
        yield 90, m, k, lesson_17("fp16", m, 1600, k)
    yield 90, 8, 1600, lesson_17("bf16", 8, 4800, 1600)
    for dtype, group_size, n, k in (
        *(("fp16", 64, 8192, 8192), ("fp16", 128, 8192, 8192), ("fp16", 128, 16384, 4096), ("bf16", 8192, 8192, 8192)),
        *(("fp16", 128, 4096, 8192), ("fp16", 128, 8192, 4096), ("fp16", 128, 1600, 12800)),
        *(("fp16", 192, 8192, 8256), ("fp16", 320, 1600, 12800)),
    ):
        yield 90, 1, k, lesson_17_in_passes(dtype, group_size, n, k)
    for way, m, k in (("norm", 1, 768), ("gelu", 1, 1600), ("add", 8, 1280), ("add", 8, 3072), ("add", 8, 6400)):
        yield 90, m, k, lesson_18(way, m, k)
    for heads, length in JOINED:
        yield 90, 1, 64 * heads, joining_projection(heads, length)
    for m, k in ((1, 768), (1, 1024), (1, 1280), (1, 1600), (8, 1600), (8, 4096)):
        yield 90, m, k, lesson_20(m, k)
    for arch in SHARED_MEMORY:
        yield arch, 1, 6400, lesson_17("fp16", 1, 1600, 6400)
        yield arch, 1, 32768, lesson_17_in_passes("fp16", 64, 8192, 32768)
        yield arch, 8, 1600, lesson_18("gelu", 8, 1600)
        yield arch, 8, 3072, lesson_18("add", 8, 3072)
        yield arch, 1, 6400, lesson_18("add", 1, 6400)
        yield arch, 8, 1600, lesson_20(8, 1600)
    yield 80, 16, 1600, lesson_17("bf16", 16, 4800, 1600)
    yield 86, 8, 6400, lesson_18("add", 8, 6400)


def triton_variants():
    """Kernel, pointers, integers, options: attention, and what the embedding and the choice of a token take."""
    from kernels import k20_step_ends

    joined = ((1, *sizes, False) for sizes in JOINED)
    here = ((1, 12, 2048), (8, 12, 1024), (8, 25, 1024), (1, 25, 128))
    for problem in (*joined, *((*sizes, True) for sizes in here), (1, 5, 128, True, 20)):
        kernel, pointers, options = attention(*problem)
        yield kernel, pointers, ("H", "L"), options
    for bits, wte, scales in ((16, "fp16", "fp16"), (8, "i8", "fp16"), (4, "i16", "i32")):
        pointers = {"tokens_ptr": "i64", "positions_ptr": "i64", "wte_ptr": wte, "wte_scales_ptr": scales}
        pointers |= {"wpe_ptr": "fp16", "gamma_ptr": "fp16", "residual_ptr": "fp32", "scaled_ptr": "fp16"}
        options = {"BITS": bits, "GROUP_SIZE": 64, "TILES": 128, "num_warps": 4}
        yield k20_step_ends.embed_kernel, {**pointers, "sums_ptr": "fp32"}, ("V", "C", "M"), options
    pointers = {"best_ptr": "fp32", "index_ptr": "i32", "tokens_ptr": "i64"}
    yield k20_step_ends.pick_kernel, pointers, ("programs", "M", "N"), {"BLOCK": 4096, "num_warps": 8}


def groups_of(columns, group_size):
    """Of how many groups a warp asks for scales in a pass of lesson 17.

    Where neither cuts the other in two, once each, and else for every block of 64 columns.
    """
    aligned = columns % group_size == 0 or group_size % columns == 0
    return -(-columns // group_size) if aligned else columns // 64


def compile_gluon(arch, m, k, variant):
    """Compiles a Gluon kernel; what it takes, and how it loads the weight's codes."""
    import triton
    from compile_kernels import machine_code, resource_usage
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, pointers, options = variant
    options = {**options, "PDL": arch >= 90}
    if m == 1:
        options["M"] = 1  # an argument of 1 is compiled in
    types = {name: f"*{pointed}" for name, pointed in pointers.items()}
    types |= {"eps": "fp32"} | dict.fromkeys(options, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    # As at run time; GPT-2's vocabulary, the output layer's N, is odd.
    sizes = ("K",) if kernel.__name__ == "output_kernel" else ("N", "K")
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *sizes)}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=options, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": options["num_warps"]})
    ptx = compiled.asm["ptx"]
    before, wait, behind = ptx.partition("griddepcontrol.wait")
    assert bool(wait) == (arch >= 90)
    code = machine_code(compiled.asm["cubin"])
    width = 4 if kernel.__name__ == "output_kernel" else 2  # words that a thread loads of codes at once
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "m": m,
        "k": k,
        "step": options["STEP"],
        # Of the output layer's all are written out, of lesson 17's the last one is.
        "passes": {"output_kernel": options.get("PASSES", 1), "passes_kernel": 2}.get(kernel.__name__, 1),
        "groups": groups_of(options["STEP"] * 64, options.get("GROUP_SIZE", 64)),
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"\bmma\.sync\.aligned\.m16n8k16", ptx)),
        "codes_before": len(re.findall(rf"ld\.global\.v{width}\.b32", before)),
        "codes_behind": len(re.findall(rf"ld\.global\.v{width}\.b32", behind)),
        "scales_before": len(re.findall(r"ld\.global\.b32", before)),
        "order": "".join(re.findall(r"\b(LDG|HMMA)\b", code)),
        "made_before": len(re.findall(r"\bH(?:ADD2|FMA2)\b", code.partition("ACQBULK")[0])),
        "ready": options.get("READY", 0),
    }


def compile_triton(kernel, pointers, integers, options, arch):
    from compile_kernels import compile_for, resource_usage
    from triton.backends.compiler import GPUTarget

    options = {**options, "PDL": arch >= 90}
    floats = [name for name in kernel.arg_names if name == "scale"]
    compiled = compile_for(GPUTarget("cuda", arch, 32), kernel, pointers, integers, options, floats)
    before, _, behind = compiled.asm["ptx"].partition("griddepcontrol.wait")
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "options": options,
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wide_loads_before": len(re.findall(r"ld\.global\.v4\.b32", before)),
        "stores_before": len(re.findall(r"st\.global", before)) if arch >= 90 else 0,
        "wide_loads_behind": len(re.findall(r"ld\.global\.v4\.b32", behind)),
    }


def compile_whole_step(n_embd):
    """Lesson 21 for Hopper: what it takes, and between its waits for numbers, how often it loads codes."""
    import triton
    from compile_kernels import resource_usage
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kernels import k21_whole_step as lesson

    kernel = lesson.whole_step_kernel
    options = lesson.launch_options(n_embd) | {"BLOCK_L": 128, "SPLITS": 8, "GROUP_SIZE": 64}
    pointed = {"cache_ptr": "fp16", "positions_ptr": "i64", "distances_ptr": "i64"}
    pointed |= {name: "i16" for name in kernel.arg_names if name.endswith("codes_ptr")}
    pointed |= {name: "fp32" for name in kernel.arg_names if name.endswith(("bias_ptr", "folded_ptr", "gammas_ptr"))}
    pointed |= {"scaled_ptr": "i16", "halves_ptr": "i16"}
    types = {name: f"*{pointed.get(name, 'i32')}" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"eps": "fp32"} | dict.fromkeys(options, "constexpr")
    divisible = [name for name in kernel.arg_names if name.endswith("_ptr") or name in ("C", "L")]
    source = GluonASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs=options,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["num_warps"]})
    ptx = compiled.asm["ptx"]
    between = re.split(r"(?:ld\.relaxed\.gpu\.global\.v4\.b32[^;]*;\s*)+", ptx)
    return {
        "n_embd": n_embd,
        "steps": [options["STEP"], options["STEP_4"]],
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"\bmma\.sync\.aligned\.m16n8k16", ptx)),
        "codes": [len(re.findall(r"ld\.global\.v2\.b32", part)) for part in between],
        "cache": [len(re.findall(r"ld\.global\.v4\.b32", part)) for part in between],
    }


def is_xl_on_a_small_gpu(result):
    """Eight tokens of 6400 columns, 128 KiB: one that does not fit, and that is not launched."""
    return (result["arch"], result.get("m"), result.get("k")) == (86, 8, 6400)


def test_they_fit_and_spill_nothing(compiled):
    """A few words on the stack are the assembler's own; spilled registers are more."""
    for result in (*compiled["gluon"], *compiled["triton"]):
        assert result["stack"] <= 32, result
        assert result["shared"] <= SHARED_MEMORY[result["arch"]] or is_xl_on_a_small_gpu(result), result


def test_the_front_door_knows_what_fits(compiled, monkeypatch):
    """Lesson 18's tokens must all be in shared memory, and not every GPU has as much."""
    from kernels import can_fuse, common

    monkeypatch.setattr(common, "has_mma", lambda device: True)
    monkeypatch.setattr(common, "shared_memory", lambda device: SHARED_MEMORY[device])
    answers = set()
    for result in [result for result in compiled["gluon"] if result["kernel"] == "fused_kernel"]:
        codes = SimpleNamespace(is_cuda=True, device=result["arch"], shape=(1, result["k"] // 64, 16, 16))
        answer = can_fuse(PreparedWeight(codes, None, None, result["k"], 64), torch.float16, result["m"])
        assert answer == (result["shared"] <= SHARED_MEMORY[result["arch"]]), result
        answers.add(answer)
    assert answers == {True, False}


def test_every_block_goes_through_the_tensor_cores(compiled):
    """A block of 64 columns is four instructions, or eight for 16 tokens; a warp has `step` of them in a pass."""
    for result in compiled["gluon"]:
        assert result["mma"] == result["step"] * result["passes"] * (8 if result["m"] > 8 else 4), result


def test_the_weight_is_asked_for_before_the_wait(compiled):
    """Lessons 17 and 18: all of it. A thread loads a part of two rows of a tile, 8 bytes of codes each, and two scales.

    Lesson 20's output layer: those of its first pass, 16 bytes each.
    """
    for result in [result for result in compiled["gluon"] if result["arch"] >= 90]:
        assert result["codes_before"] == 2 * result["step"], result
        if result["kernel"] != "output_kernel":
            in_passes = result["kernel"] == "passes_kernel"
            scales = 2 * result["groups"] if in_passes else 2 * result["step"]
            later = 2 * result["step"] if in_passes else 0  # the next pass's
            assert result["scales_before"] >= scales and result["codes_behind"] == later, result


def test_the_next_pass_is_asked_for_before_this_one_is_multiplied(compiled):
    """Lesson 17 in passes: in the machine code, where the assembler would rather have it the other way round."""
    results = [result for result in compiled["gluon"] if result["kernel"] == "passes_kernel"]
    assert results
    for result in results:
        loads = 2 * (result["step"] + result["groups"])  # of codes and scales
        # Biases may be loaded among the products.
        assert re.fullmatch(rf"(LDG){{{2 * loads}}}(HMMA(LDG)*){{{8 * result['step']}}}", result["order"]), result


def test_lesson_17s_programs_in_passes_are_many_to_a_multiprocessor(compiled):
    """32 warps with two blocks a pass, 16 with four: 8192 rows, 512 programs, run on 132 multiprocessors at once."""
    results = [r for r in compiled["gluon"] if r["kernel"] == "passes_kernel" and r["arch"] == 90]
    assert {result["step"] for result in results} == {2, 4}
    for result in results:
        assert result["registers"] <= {2: 64, 4: 128}[result["step"]], result


def test_operands_are_ready_before_the_wait(compiled):
    """Lesson 18: of a warp's first blocks, 16 registers each, an instruction or more for each; in the machine code.

    Where there is no wait they would only take registers: 256 threads that have 128 each fit on a multiprocessor twice.
    """
    results = [result for result in compiled["gluon"] if result["ready"]]
    assert {result["ready"] for result in results} == {2, 3, 4}
    for result in results:
        if result["arch"] >= 90:
            assert result["made_before"] >= 16 * result["ready"], result
        else:
            assert result["registers"] <= 128, result


def test_lesson_19_has_its_keys_and_values_before_the_wait(compiled):
    """16 bytes a load; and nothing is stored before the kernel ahead has ended."""
    attention = [r for r in compiled["triton"] if r["kernel"] == "attention_kernel" and r["options"]["D"] == 64]
    for result in attention:
        assert result["wide_loads_before"] >= 16, result
    ways = {(result["options"]["JOIN"], result["options"]["SPLITS"]) for result in attention}
    assert ways == {(False, 2), (False, 4), (False, 8), (True, 1), (True, 16)}
    assert all(result["stores_before"] == 0 for result in compiled["triton"])


def test_lesson_21_is_resident_and_loads_before_it_waits(compiled):
    """Two programs of 128 threads have 65,536 registers and the shared memory between them; codes come 8 bytes a load.

    It waits for numbers in six places: for x, for the query, for the parts of attention, and three times for x.
    """
    for result in compiled["whole_step"]:
        assert result["stack"] <= 32 and result["shared"] <= SHARED_MEMORY[90] // 2 - 1024, result
        step, step_4 = result["steps"]
        assert result["mma"] == 4 * (3 * step + step_4), result
        assert result["codes"] == [2 * step, 0, 0, 2 * step, 2 * step, 2 * step_4, 0], result
        assert result["cache"] == [0, 16, 0, 0, 0, 0, 0], result


if __name__ == "__main__":
    gluon = [compile_gluon(*variant) for variant in gluon_variants()]
    plain = [compile_triton(*variant, arch) for variant in triton_variants() for arch in (80, 90)]
    whole_step = [compile_whole_step(n_embd) for n_embd in (192, 768, 1024, 1280, 1600)]
    print(json.dumps({"gluon": gluon, "triton": plain, "whole_step": whole_step}))
