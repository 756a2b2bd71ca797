"""Lesson 23: its tiles against float64 and lesson 15, and what they compile to.

This file runs itself as a program of its own, because the interpreter, in which the other tests run the kernels, is
chosen for a whole process.
"""

import json
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from kernels import common, k15_w4a8_hopper, k23_w4a8_rings  # noqa: E402
from kernels.k00_reference import dequantize_reference, quantize_reference  # noqa: E402
from kernels.prepared import prepare  # noqa: E402

REGISTERS = 65536  # of a multiprocessor on Hopper
SHARED_MEMORY = 228 * 1024  # bytes of it, of which a program takes 1 KB more than it asks for
VARIANT = ("dtype", "rows", "tokens", "split", "group_size")


def variants():
    """Every tile, whole and as a part of K, in both dtypes, with groups as long as a block, as a step, and odd ones."""
    for rows, tokens in k23_w4a8_rings.TILES:
        yield "fp16", rows, tokens, 1, 64
        yield "bf16", rows, tokens, 1, 128
        yield "fp16", rows, tokens, 1, 192
        if tokens <= 64:
            yield "fp16", rows, tokens, 2, 128


def compile_tile(dtype, rows, tokens, split, group_size):
    from compile_kernels import compile_gluon, machine_code, resource_usage

    stages, slots, _ = k23_w4a8_rings.TILES[rows, tokens]
    tiles = {
        "x_desc": ("i8", [tokens, 128]),
        "codes_desc": ("i16", [k23_w4a8_rings.WIDE.value, rows // 16, 256]),
        "words_desc": ("i32", [k23_w4a8_rings.groups_of(group_size), rows]),
    }
    pointers = {"token_scales_ptr": "fp32", "row_scales_ptr": "fp32", "bias_ptr": dtype}
    pointers["out_ptr"] = "fp32" if split > 1 else dtype
    options = {"HAS_BIAS": split == 1, "GROUP_SIZE": group_size, "SPLIT_K": split, "STAGES": stages, "SLOTS": slots}
    options["num_warps"] = 4
    compiled = compile_gluon(k23_w4a8_rings.w4a8_rings_kernel, tiles, pointers, ("M", "N", "blocks"), options)
    code = machine_code(compiled.asm["cubin"])
    return {
        **dict(zip(VARIANT, (dtype, rows, tokens, split, group_size), strict=True)),
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "threads": int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"]).group(1)),
        "products": len(re.findall(r"IGMMA", code)),
        "waits_with_one_in_flight": len(re.findall(r"DEPBAR\.LE gsb0, 0x1", code)),
        "waits_for_every_product": len(re.findall(r"DEPBAR\.LE gsb0, 0x0", code)),
    }


def test_nothing_spills(compiled):
    for result in compiled:
        assert result["stack"] <= 32 and result["shared"] <= SHARED_MEMORY - 1024, result


def test_products_are_waited_for_one_behind(compiled):
    """But for the last one, by each of two warpgroups; with 256 tokens for the last of each step, too."""
    for result in compiled:
        assert result["products"] > 0 and result["waits_with_one_in_flight"] > 0, result
        assert result["waits_for_every_product"] == (4 if result["tokens"] == 256 else 2), result


def test_one_program_a_multiprocessor(compiled):
    """Two would find room on one, and leave another idle, where there are no more programs than multiprocessors."""
    for result in compiled:
        by_registers = REGISTERS // (result["registers"] * result["threads"])
        by_memory = SHARED_MEMORY // (result["shared"] + 1024)
        assert min(by_registers, by_memory) == 1, result


def problem(m, n, k, group_size, dtype=torch.float16):
    packed = quantize_reference(torch.randn(n, k, device=common.DEVICE), group_size)
    x = torch.randn(m, k, device=common.DEVICE).to(dtype)
    return x, prepare(packed), x.double() @ dequantize_reference(packed, torch.float32).double().t()


def test_every_shape_has_options():
    for m in (1, 16, 64, 129, 512, 2048, 10000):
        for n in (1, 64, 512, 4160, 8192, 50257):
            for k, count in ((64, 132), (2048, 132), (8192, 114), (16384, 132), (16640, 132), (20480, 78)):
                options = k23_w4a8_rings.launch_options(m, n, k, count)
                assert options["SPLIT_K"] * 2048 <= max(k, 2048)
                assert options["BLOCK_M"] <= max(16, 2 * m - 1)
                rounds = -(-k // 512)
                part = -(-rounds // options["SPLIT_K"])
                assert (options["SPLIT_K"] - 1) * part < rounds, "the last program would have nothing to do"


@pytest.mark.parametrize("tile", list(k23_w4a8_rings.TILES))
def test_rings(tile):
    """A stage is free again when the warpgroup that had it has begun its next step, so there must be others."""
    stages, slots, _ = k23_w4a8_rings.TILES[tile]
    assert slots >= stages
    if tile[0] == 64:  # the warpgroups share K
        assert stages > 2 and stages % 2 == slots % 2 == 0


@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (1, 8192, 8192, (64, 16, 1)),
        (16, 2048, 8192, (64, 16, 4)),
        (64, 2048, 8192, (64, 64, 4)),
        (128, 512, 2048, (64, 16, 1)),
        (128, 2048, 2048, (64, 32, 1)),
        (128, 2048, 8192, (64, 64, 2)),
        (128, 8192, 8192, (64, 128, 1)),
        (256, 8192, 2048, (128, 128, 1)),
        (512, 512, 2048, (64, 32, 1)),
        (512, 3072, 768, (128, 128, 1)),
        (512, 2048, 8192, (64, 128, 1)),
        (512, 8192, 2048, (128, 256, 1)),
        (1024, 2048, 2048, (128, 128, 1)),
        (1024, 1280, 1280, (128, 128, 1)),  # 80 programs; of 64 rows 160 would take two rounds
        (1024, 768, 3072, (64, 128, 1)),
        (2048, 512, 2048, (64, 128, 1)),
        (2048, 2048, 2048, (128, 256, 1)),
        (2048, 2304, 768, (128, 128, 1)),  # three rounds rather than two of twice as much
    ],
)
def test_tiles(m, n, k, tile):
    """Those that the lesson's measured times are of: rows and tokens of a program, programs that share K."""
    options = k23_w4a8_rings.launch_options(m, n, k)
    assert (options["ROWS"], options["BLOCK_M"], options["SPLIT_K"]) == tile


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tile", "split"),
    [(tile, split) for tile in k23_w4a8_rings.TILES for split in (1, 2) if tile[1] <= 64 or split == 1],
)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"), [(300, 200, 1600, 320), (70, 264, 1536, 192), (5, 72, 4096, 64)]
)
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_every_tile(canary, monkeypatch, tile, split, m, n, k, group_size, dtype):
    if not common.is_hopper(common.DEVICE):
        pytest.skip("needs a Hopper GPU (H100, H200)")
    x, weight, expected = problem(m, n, k, group_size, dtype)
    stages, slots, _ = k23_w4a8_rings.TILES[tile]
    options = {"ROWS": tile[0], "BLOCK_M": tile[1], "SPLIT_K": split, "STAGES": stages, "SLOTS": slots}
    monkeypatch.setattr(k23_w4a8_rings, "launch_options", lambda *_: options)
    canary.outputs.clear()
    first, second = k23_w4a8_rings.matmul(x, weight), k23_w4a8_rings.matmul(x, weight)
    canary.check()
    assert torch.equal(first, second)
    assert common.relative_error(first, expected) < k23_w4a8_rings.TOLERANCE
    if split == 1:  # exact sums, scaled in the same order
        assert torch.equal(first, k15_w4a8_hopper.matmul(x, weight))


if __name__ == "__main__":
    print(json.dumps([compile_tile(*variant) for variant in variants()]))
