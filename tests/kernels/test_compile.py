"""Every kernel, compiled ahead of time for GPUs that are not here: it fits them, spills nothing, uses tensor cores."""

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

PROGRAM = "compile_kernels.py"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use (CUDA C++ programming guide, table of limits)


def test_all_kernels_are_compiled_for_both(compiled):
    names = {"quantize_kernel", "dequantize_kernel", "matmul_kernel", "w4a16_kernel"}
    assert {(result["kernel"], result["arch"]) for result in compiled} == {(n, a) for n in names for a in (80, 90)}


def test_they_fit_in_shared_memory(compiled):
    for result in compiled:
        assert result["shared"] <= SHARED_MEMORY[result["arch"]], result


def test_nothing_spills(compiled):
    """But for two known cases: searching huge groups in registers, and lesson 3's largest tiles on an A100.

    Some assemblers keep a word or two on the stack for other reasons; spilled registers are more.
    """
    for result in compiled:
        huge_search = result["options"].get("SEARCH_STEPS", 1) > 1 and result["options"]["GROUP_SIZE"] >= 4096
        big_tile = result["kernel"] == "matmul_kernel" and result["options"]["BLOCK_N"] == 256 and result["arch"] == 80
        assert result["stack"] <= 16 or huge_search or big_tile, result


def test_tensor_cores_are_used(compiled):
    """wgmma on Hopper where the tile is 64 rows or taller, which is what it takes; mma elsewhere."""
    for result in compiled:
        if result["kernel"] in ("matmul_kernel", "w4a16_kernel"):
            assert result["wgmma"] == (result["arch"] == 90 and result["options"]["BLOCK_M"] >= 64), result
            assert result["wgmma"] or result["mma"], result
