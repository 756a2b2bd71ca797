"""Lessons 5 to 8 and 11: against float64, and what the compiler makes of them for GPUs that are not here.

For the latter this file runs itself as a program of its own, because the interpreter, in which the other tests run the
kernels, is chosen for a whole process.
"""

import json
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

from kernels import (  # noqa: E402
    common,
    k05_unpack,
    k06_layout,
    k07_weight_left,
    k08_pipeline,
    k11_dequantize_gemm,
)
from kernels.k00_reference import dequantize_reference, quantize_reference  # noqa: E402

FUSED = [k05_unpack, k06_layout, k07_weight_left, k08_pipeline]
# (n, k, group size): sizes that are no powers of two, odd n, a last block of 64 that is only partly used.
SHAPES = [
    *((9, max(512, 2 * group_size), group_size) for group_size in (16, 32, 64, 128, 256, 512, 1024)),
    (3, 4096, 4096),
    (3, 1600, 64),
    (40, 1600, 1600),
    (33, 384, 96),
    (8, 176, 176),
    (5, 208, 16),
    (1, 16, 16),
    (70, 80, 80),
    (130, 96, 32),
]


def arguments(m, n, k, group_size, symmetric, dtype):
    """x, the packed weight, and their product in float64."""
    packed = quantize_reference(torch.randn(n, k, device=common.DEVICE), group_size, symmetric)
    x = torch.randn(m, k, device=common.DEVICE).to(dtype)
    return x, packed, x.double() @ dequantize_reference(packed, torch.float32).double().t()


@pytest.mark.parametrize("lesson", [*FUSED, k11_dequantize_gemm])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("m", [1, 19])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_matmul_against_float64(canary, lesson, m, n, k, group_size, symmetric, dtype):
    x, packed, expected = arguments(m, n, k, group_size, symmetric, dtype)
    weight = lesson.prepare(packed)
    canary.outputs.clear()
    out = lesson.matmul(x, weight)
    canary.check()
    assert out.dtype == dtype
    assert common.relative_error(out, expected) < common.tolerance(dtype)


@pytest.mark.parametrize("lesson", FUSED)
@pytest.mark.parametrize("m", [40, 600])  # the other block sizes
@pytest.mark.parametrize("group_size", [32, 128])
def test_more_tokens(canary, lesson, m, group_size):
    x, packed, expected = arguments(m, 130, 128, group_size, False, torch.float16)
    weight = lesson.prepare(packed)
    canary.outputs.clear()
    out = lesson.matmul(x.view(2, m // 2, 128), weight)
    canary.check()
    assert out.shape == (2, m // 2, 130)
    assert common.relative_error(out.view(m, 130), expected) < common.tolerance(torch.float16)


@pytest.mark.parametrize("lesson", [*FUSED, k11_dequantize_gemm])
def test_nothing_behind_the_end_of_k_is_read(lesson):
    """x lies between infinities; K = 80 is no multiple of a step."""
    x, packed, expected = arguments(3, 24, 80, 16, False, torch.float16)
    surrounded = torch.full((5, 80), torch.inf, dtype=x.dtype, device=x.device)
    surrounded[1:4] = x
    assert common.relative_error(lesson.matmul(surrounded[1:4], lesson.prepare(packed)), expected) < 1e-3


@pytest.mark.parametrize("lesson", [*FUSED, k11_dequantize_gemm])
def test_x_with_strides(lesson):
    x, packed, expected = arguments(6, 24, 64, 32, False, torch.float16)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert common.relative_error(lesson.matmul(strided, lesson.prepare(packed)), expected) < 1e-3


@pytest.mark.parametrize("lesson", FUSED)
@pytest.mark.parametrize(("magnitude", "x_magnitude"), [(2e4, 1 / 64), (1e-7, 256.0), (0.0, 1.0)])
def test_extreme_scales(lesson, magnitude, x_magnitude):
    """The largest and the smallest scales of the format: the weights are near fp16's largest, or are not normal."""
    weight = torch.randn(16, 64, device=common.DEVICE) * magnitude
    packed = quantize_reference(weight, 32)
    x = (torch.randn(5, 64, device=common.DEVICE) * x_magnitude).half()
    expected = x.double() @ dequantize_reference(packed, torch.float32).double().t()
    out = lesson.matmul(x, lesson.prepare(packed))
    if magnitude:
        assert common.relative_error(out, expected) < common.tolerance(torch.float16)
    else:
        assert out.count_nonzero() == 0


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_stages_change_no_bit(num_stages):
    x, packed, _ = arguments(19, 40, 256, 64, False, torch.float16)
    weight = k08_pipeline.prepare(packed)
    assert torch.equal(k08_pipeline.matmul(x, weight, num_stages), k08_pipeline.matmul(x, weight))


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_gives_the_references_bits(canary, n, k, group_size, symmetric):
    _, packed, _ = arguments(1, n, k, group_size, symmetric, torch.float16)
    weight = k11_dequantize_gemm.prepare(packed)
    canary.outputs.clear()
    for dtype in [*common.ACTIVATION_DTYPES, torch.float32]:
        assert torch.equal(k11_dequantize_gemm.dequantize(weight, dtype), dequantize_reference(packed, dtype))
    canary.check()


@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_bias(dtype):
    x, packed, expected = arguments(3, 40, 96, 32, False, dtype)
    bias = torch.randn(40, device=x.device).to(dtype)
    out = k11_dequantize_gemm.matmul(x, k11_dequantize_gemm.prepare(packed), bias)
    assert common.relative_error(out, expected + bias.double()) < common.tolerance(dtype)


@pytest.mark.parametrize("lesson", [*FUSED, k11_dequantize_gemm])
def test_what_does_not_fit_is_named(lesson):
    x, packed, _ = arguments(2, 8, 64, 32, False, torch.float16)
    weight = lesson.prepare(packed)
    with pytest.raises(ValueError, match=r"\[2, 32\].*in_features 64"):
        lesson.matmul(x[:, :32], weight)
    with pytest.raises(ValueError, match="float32"):
        lesson.matmul(x.float(), weight)


def test_what_does_not_fit_dequantize_is_named():
    x, packed, _ = arguments(2, 8, 64, 32, False, torch.float16)
    weight = k11_dequantize_gemm.prepare(packed)
    with pytest.raises(ValueError, match="int8"):
        k11_dequantize_gemm.dequantize(weight, torch.int8)
    with pytest.raises(ValueError, match=r"\[7\].*\[8\]"):
        k11_dequantize_gemm.matmul(x, weight, x.new_zeros(7))
    with pytest.raises(ValueError, match="float32"):
        k11_dequantize_gemm.matmul(x, weight, torch.zeros(8, device=x.device))


# ---- what the compiler makes of them

LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may use


def variants():
    """The kernels with the dtypes, sizes and options that their launchers use."""
    packed = {"qweight_ptr": "i32", "scales_ptr": "fp16", "qzeros_ptr": "i32"}
    prepared = {"codes_ptr": "i16", "scale_zeros_ptr": "i32"}
    ladder = [
        (k05_unpack.unpack_kernel, k05_unpack.launch_options, packed, ("M", "N", "K")),
        (k06_layout.layout_kernel, k06_layout.launch_options, prepared, ("M", "N", "K", "blocks")),
        (k07_weight_left.weight_left_kernel, k07_weight_left.launch_options, prepared, ("M", "N", "K", "blocks")),
        (k08_pipeline.pipeline_kernel, k08_pipeline.launch_options, prepared, ("M", "N", "K", "blocks")),
    ]
    for dtype, group_size in (("fp16", 32), ("fp16", 64), ("fp16", 128), ("bf16", 64), ("bf16", 1600)):
        for m in (1, 128, 2048):
            for kernel, launch_options, weight, integers in ladder:
                options = {"GROUP_SIZE": group_size, "ASM": True, **launch_options(m, group_size)}
                yield kernel, {"x_ptr": dtype, **weight, "out_ptr": dtype}, integers, options
        for num_stages in (1, 5):  # what lesson 8's benchmark asks for
            options = {"GROUP_SIZE": group_size, "ASM": True, **k08_pipeline.launch_options(2048, group_size)}
            options["NUM_STAGES"] = num_stages
            pointers = {"x_ptr": dtype, **prepared, "out_ptr": dtype}
            yield k08_pipeline.pipeline_kernel, pointers, ("M", "N", "K", "blocks"), options
        options = {"GROUP_SIZE": group_size, **k11_dequantize_gemm.launch_options()}
        kernel = k11_dequantize_gemm.dequantize_prepared_kernel
        yield kernel, {**prepared, "codes_ptr": "i32", "w_ptr": dtype}, ("N", "K", "blocks"), options


def compile_variant(kernel, dtypes, integers, options, arch):
    """Compiles a kernel as it is launched; how much it takes, and which way its operands go."""
    from compile_kernels import compile_for, resource_usage

    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    compiled = compile_for(target, kernel, dtypes, integers, options)
    loop = compiled.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": dtypes.get("x_ptr", dtypes.get("w_ptr")),
        "options": options,
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": bool(re.search(r"wgmma\.mma_async|\bmma\.sync", ptx)),
        "wgmma_left_in_registers": bool(re.search(r"wgmma\.mma_async[^{]*\{[^}]*\}, \{", ptx)),
        "wgmma_left_in_shared_memory": bool(re.search(r"wgmma\.mma_async[^{]*\{[^}]*\}, %", ptx)),
        "tiles_stored_in_loop": len(re.findall(r"ttg\.local_alloc %", loop)),
        "async_copies_in_loop": len(re.findall(r"ttg\.async_copy_global_to_local", loop)),
        "widest_store": max([int(n) for n in re.findall(r"st\.global\.v(\d)\.b32", ptx)], default=1),
        "widest_load": max([int(n) for n in re.findall(r"ld\.global\.v(\d)\.b32", ptx)], default=1),
    }


def of(compiled, kernel, arch):
    return [result for result in compiled if result["kernel"] == kernel and result["arch"] == arch]


def test_they_fit_and_spill_nothing(compiled):
    """Some assemblers keep a word or two on the stack for other reasons; spilled registers are more."""
    assert len(compiled) == 2 * 5 * (3 * 4 + 2 + 1)
    for result in compiled:
        assert result["shared"] <= LIMITS[result["arch"]], result
        assert result["stack"] <= 16, result


def test_tensor_cores_are_used(compiled):
    for result in compiled:
        assert result["tensor_cores"] == (result["kernel"] != "dequantize_prepared_kernel"), result


def test_only_on_the_left_the_weight_stays_in_registers(compiled):
    """Lesson 7. On Hopper the right operand must lie in shared memory; the left one need not."""
    right, left = of(compiled, "layout_kernel", 90), of(compiled, "weight_left_kernel", 90)
    for result in [r for r in right if r["options"]["BLOCK_M"] >= 64]:
        assert result["wgmma_left_in_shared_memory"] and not result["wgmma_left_in_registers"], result
        assert result["tiles_stored_in_loop"] == 4, result
    for result in left:
        assert result["wgmma_left_in_registers"] and not result["wgmma_left_in_shared_memory"], result
        assert result["tiles_stored_in_loop"] == 0, result


def test_what_can_fly(compiled):
    """Lesson 8: codes, four slices of x, and scale and zero in one word are copied ahead; lesson 5's x is not."""
    for result in of(compiled, "pipeline_kernel", 80) + of(compiled, "pipeline_kernel", 90):
        rows = 1 if result["options"]["GROUP_SIZE"] % result["options"]["BLOCK_K"] == 0 else 4
        expected = 0 if result["options"]["NUM_STAGES"] == 1 else 1 + 4 + rows
        assert result["async_copies_in_loop"] == expected, result
    for result in of(compiled, "unpack_kernel", 90):
        assert result["async_copies_in_loop"] < 8, result


def test_dequantizing_is_wide_and_turns_nothing(compiled):
    """Lesson 11: 16 bytes a load and a store, and no shared memory, but for the scales where a block has several."""
    for result in of(compiled, "dequantize_prepared_kernel", 80) + of(compiled, "dequantize_prepared_kernel", 90):
        assert (result["widest_load"], result["widest_store"]) == (4, 4), result
        scales = 0 if result["options"]["GROUP_SIZE"] % 64 == 0 else 4 * 4 * 32 * 4  # four words a block of 32 rows
        assert result["shared"] <= scales, result


if __name__ == "__main__":
    print(json.dumps([compile_variant(*variant, arch) for variant in variants() for arch in (80, 90)]))
