"""Lessons 9, 10, 12, 13, 15 and 22, compiled ahead of time for GPUs that are not here.

This file runs itself as a program of its own, because the interpreter, in which the other tests run the kernels, is
chosen for a whole process.
"""

import json
import re

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

NVIDIA = (75, 80, 86, 89, 90, 100, 120)
AMD = ("gfx942",)
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper


def plain_variants(arch):
    """The kernels that run on any GPU, with the sizes and options that their launchers use there."""
    from kernels import k09_split_k, k10_gemv, k13_w4a8, k16_int8_rows

    nvidia = arch not in AMD
    extras = {"HAS_BIAS": True, "ASM": nvidia, "PDL": nvidia and arch >= 90}
    weight = {"codes_ptr": "i16", "scale_zeros_ptr": "i32"}
    for dtype in ("fp16", "bf16") if nvidia and arch >= 80 else ("fp16",):
        for m, n, k, group_size in ((16, 2048, 2048, 128), (16, 8192, 1600, 32), (128, 8192, 8192, 64)):
            options = {**extras, **k09_split_k.launch_options(m, n, k, group_size)}
            options |= {"GROUP_SIZE": group_size, "GROUP_M": 8, "EVEN_K": k % 64 == 0}
            out = "fp32" if options["SPLIT_K"] > 1 else dtype
            pointers = {"x_ptr": dtype, **weight, "bias_ptr": dtype, "out_ptr": out}
            yield k09_split_k.split_k_kernel, pointers, ("M", "N", "K", "blocks"), options
        for n, k, group_size in ((8192, 8192, 128), (2048, 8192, 64), (768, 768, 32)):
            options = {**extras, **k10_gemv.launch_options(n, k), "GROUP_SIZE": group_size, "BF16": dtype == "bf16"}
            pointers = {
                "x_ptr": "i32",
                "codes_ptr": "i32",
                "scale_zeros_ptr": "i32",
                "bias_ptr": dtype,
                "out_ptr": dtype,
            }
            yield k10_gemv.gemv_kernel, pointers, ("N", "K", "blocks"), options
        pointers = {"x_ptr": dtype, "codes_ptr": "i8", "scales_ptr": "fp16", "out_ptr": dtype}
        pdl = {"PDL": extras["PDL"]}
        for k in (768, 1600):
            yield k16_int8_rows.one_token_kernel, pointers, ("N", "K"), {**k16_int8_rows.launch_options(1, k), **pdl}
        options = {**k16_int8_rows.launch_options(8, 768), **pdl}
        yield k16_int8_rows.few_tokens_kernel, pointers, ("M", "N", "K"), options
        if arch != 75:  # its tensor cores multiply 8-bit numbers in a way that Triton does not know
            options = {**extras, **k13_w4a8.launch_options(512, 128), "GROUP_SIZE": 128, "GROUP_M": 8}
            pointers = {"x8_ptr": "i8", "token_scales_ptr": "fp32", "codes_ptr": "i8", "scale_zeros_ptr": "i32"}
            pointers |= {"row_scales_ptr": "fp32", "bias_ptr": dtype, "out_ptr": dtype}
            yield k13_w4a8.w4a8_kernel, pointers, ("M", "N", "blocks"), options


def hopper_variants():
    """The Gluon kernels: kernel, what tiles the copy engine reads (x's first), other pointers, options."""
    from kernels import k12_hopper, k15_w4a8_hopper, k22_two_rings

    extras = {"HAS_BIAS": True, "BLOCK_N": 128, "GROUP_M": 8}
    for dtype in ("fp16", "bf16"):
        for height, split, stages in ((256, 1, 4), (128, 2, 8), (64, 4, 8)):
            pointers = {"codes_ptr": "i16", "scale_zeros_ptr": "i32", "bias_ptr": dtype}
            pointers["out_ptr"] = "fp32" if split > 1 else dtype
            options = {**extras, "GROUP_SIZE": 128, "SPLIT_K": split, "STAGES": stages, "num_warps": 8}
            yield k12_hopper.hopper_kernel, {"x_desc": (dtype, [height, 64])}, pointers, options
        shapes = ((16, 8192, 2048), (128, 2048, 2048), (64, 2048, 8192), (512, 2048, 2048), (512, 8192, 2048))
        one_ring = ((16, 8192, 8192), (32, 8192, 8192), (512, 2048, 8192))
        for m, n, k in (*shapes, *one_ring):
            options = {"HAS_BIAS": True, "GROUP_SIZE": 128, "num_warps": 4}
            options |= k22_two_rings.launch_options(m, n, k, options["GROUP_SIZE"])
            wide, split = options.pop("WIDE"), options["SPLIT_K"]
            tiles = {
                "x_desc": (dtype, [wide, options.pop("BLOCK_M"), 64]),
                "codes_desc": ("i16", [wide, 4, 256]),
                "words_desc": ("i32", [k22_two_rings.groups_of(wide, options["GROUP_SIZE"]), 64]),
            }
            pointers = {"bias_ptr": dtype, "out_ptr": "fp32" if split > 1 else dtype}
            yield k22_two_rings.two_rings_kernel, tiles, pointers, options
    for height, stages in ((256, 4), (128, 8), (64, 8)):
        pointers = {"token_scales_ptr": "fp32", "codes_ptr": "i16", "scale_zeros_ptr": "i32", "row_scales_ptr": "fp32"}
        pointers |= {"bias_ptr": "fp16", "out_ptr": "fp16"}
        options = {**extras, "GROUP_SIZE": 64, "STAGES": stages, "num_warps": 4}
        yield k15_w4a8_hopper.w4a8_hopper_kernel, {"x_desc": ("i8", [height, 64])}, pointers, options


def compile_for_hopper(kernel, tiles, pointers, options):
    from compile_kernels import compile_gluon, machine_code, resource_usage

    compiled = compile_gluon(kernel, tiles, pointers, ("M", "N", "blocks"), options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "tiles": tiles,
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "left_in_registers": len(re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, \{", ptx)),
        "left_in_shared_memory": len(re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, %", ptx)),
        "waits_with_one_in_flight": len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+1", ptx)),
        "waits_for_every_product": len(re.findall(r"DEPBAR\.LE gsb0, 0x0", machine_code(compiled.asm["cubin"]))),
        "copies_by_the_copy_engine": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    }


def compile_plain(kernel, pointers, integers, options, arch):
    from compile_kernels import compile_for, compile_kernel
    from triton.backends.compiler import GPUTarget

    if arch not in AMD:
        return compile_kernel(kernel, pointers, integers, options, arch)
    compiled = compile_for(GPUTarget("hip", arch, 64), kernel, pointers, integers, options)
    return {"kernel": kernel.__name__, "arch": arch, "bytes": len(compiled.kernel)}


def test_every_gpu_gets_its_kernels(compiled):
    for arch in (*NVIDIA, *AMD):
        kernels = {result["kernel"] for result in compiled["plain"] if result["arch"] == arch}
        everywhere = {"split_k_kernel", "gemv_kernel", "one_token_kernel", "few_tokens_kernel"}
        assert kernels == everywhere | ({"w4a8_kernel"} if arch != 75 else set())


def test_nothing_spills(compiled):
    """A few words on the stack are the assembler's own; spilled registers are more."""
    for result in compiled["plain"]:
        assert result.get("stack", 0) <= 32, result
    for result in compiled["hopper"]:
        assert result["stack"] <= 32 and result["shared"] <= SHARED_MEMORY, result


def test_the_weight_goes_to_the_tensor_cores_from_registers(compiled):
    for result in compiled["hopper"]:
        assert result["left_in_registers"] > 0 and result["left_in_shared_memory"] == 0, result
        assert result["copies_by_the_copy_engine"] > 0, result


def test_lessons_12_and_22_wait_for_the_product_before_the_last(compiled):
    """The assembler, too, lets it be so: where it sees a danger, it adds a wait behind every product."""
    for result in compiled["hopper"]:
        async_loop = result["kernel"] in ("hopper_kernel", "two_rings_kernel")
        assert (result["waits_with_one_in_flight"] > 0) == async_loop, result
        if async_loop:
            # One behind the loop, of each of two warpgroups at most.
            assert result["waits_for_every_product"] <= 2, result


def test_lesson_22_has_a_multiprocessor_to_itself_where_it_may(compiled):
    """With 128 tokens: 128 programs' rings leave no room for a second one, those of 256 programs do."""
    results = [result for result in compiled["hopper"] if result["kernel"] == "two_rings_kernel"]
    shared = {result["shared"] for result in results if result["tiles"]["x_desc"][1][1] == 128}
    half = (228 - 2) * 1024 // 2  # of an H100's, of which each program takes 1 KB more
    assert min(shared) <= half < max(shared)


if __name__ == "__main__":
    plain = [compile_plain(*variant, arch) for arch in (*NVIDIA, *AMD) for variant in plain_variants(arch)]
    print(json.dumps({"plain": plain, "hopper": [compile_for_hopper(*variant) for variant in hopper_variants()]}))
