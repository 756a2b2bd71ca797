"""The kernels that programs use, lessons 9, 10, 12, 13, 15, 22, 23, against float64; and the layout that they read."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

from kernels import common, k09_split_k, k10_gemv, k12_hopper, k13_w4a8, k15_w4a8_hopper, k22_two_rings, k23_w4a8_rings  # noqa: E402
from kernels.activations import quantize_activations  # noqa: E402
from kernels.k00_reference import dequantize_reference, quantize_reference, unpack  # noqa: E402
from kernels.parts import add_up  # noqa: E402
from kernels.prepared import prepare, restore  # noqa: E402

# (n, k, group size): odd n, k that is no multiple of 64 or 128, every kind of group: shorter than a slice's block,
# as long as a step, cutting blocks in the middle, whole rows.
SHAPES = [
    *((9, max(512, 2 * group_size), group_size) for group_size in (16, 32, 64, 128, 256, 1024)),
    (3, 1600, 64),
    (40, 1600, 1600),
    (33, 384, 96),
    (8, 176, 176),
    (1, 16, 16),
    (70, 80, 80),
]
HOPPER = [
    pytest.param(lesson, marks=pytest.mark.gpu)
    for lesson in (k12_hopper, k15_w4a8_hopper, k22_two_rings, k23_w4a8_rings)
]
needs_hopper = pytest.mark.skipif(not common.is_hopper(common.DEVICE), reason="needs a Hopper GPU (H100, H200)")


def tolerance(lesson, dtype):
    """What a lesson's relative error stays under: with 8-bit activations its own, else what `dtype` allows."""
    return getattr(lesson, "TOLERANCE", None) or common.tolerance(dtype)


def problem(m, n, k, group_size, symmetric=False, dtype=torch.float16):
    """x, the prepared weight, a bias, and x @ w^T + bias in float64."""
    packed = quantize_reference(torch.randn(n, k, device=common.DEVICE), group_size, symmetric)
    x = torch.randn(m, k, device=common.DEVICE).to(dtype)
    bias = torch.randn(n, device=common.DEVICE).to(dtype)
    expected = x.double() @ dequantize_reference(packed, torch.float32).double().t() + bias.double()
    return x, prepare(packed), bias, expected


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_prepare_and_back(n, k, group_size, symmetric):
    packed = quantize_reference(torch.randn(n, k), group_size, symmetric)
    prepared = prepare(packed)
    assert (prepared.out_features, prepared.in_features, prepared.group_size) == (n, k, group_size)
    assert all(torch.equal(back, there) for back, there in zip(restore(prepared), packed, strict=True))


def test_prepared_codes_lie_where_the_picture_says():
    packed = quantize_reference(torch.randn(40, 192), 64)
    codes = prepare(packed).codes
    levels = dequantize_reference(packed, torch.float32) / packed.scales.repeat_interleave(64, 0).t().float()
    for n, k in [(0, 0), (17, 64), (39, 191), (5, 100), (31, 47)]:
        block, column = divmod(k, 64)
        nibble, half_word = divmod(column, 16)
        zero = (int(prepare(packed).scale_zeros[block, n]) >> 16) & 0xFFFF
        code = (int(codes[n // 16, block, n % 16, half_word]) >> (4 * nibble)) & 0xF
        assert code - (zero - 0x6400) == round(levels[n, k].item())  # 0x6400: fp16's 1024, and steps of 1 from there


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("m", [1, 19])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_split_k(canary, m, n, k, group_size, symmetric, dtype):
    x, weight, bias, expected = problem(m, n, k, group_size, symmetric, dtype)
    canary.outputs.clear()
    out = k09_split_k.matmul(x, weight, bias)
    canary.check()
    assert common.relative_error(out, expected) < common.tolerance(dtype)


@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_split_k_gives_the_same_bits_every_time(canary, split):
    """Eight parts of five steps leave some without any: they must add zeros, not what lies in memory."""
    x, weight, bias, expected = problem(5, 40, 320, 64)
    options = {**k09_split_k.launch_options(5, 40, 320, 64), "SPLIT_K": split}
    first, second = (k09_split_k.matmul(x, weight, bias, options) for _ in range(2))
    assert torch.equal(first, second)
    assert common.relative_error(first, expected) < common.tolerance(torch.float16)


@pytest.mark.parametrize(("m", "n", "k"), [(2, 512, 2048), (16, 8192, 8192), (200, 2048, 8192), (4096, 768, 768)])
def test_candidates_begin_with_the_default_and_differ(m, n, k):
    candidates = k09_split_k.candidates(m, n, k, 128)
    assert candidates[0] == k09_split_k.launch_options(m, n, k, 128)
    assert len({tuple(sorted(options.items())) for options in candidates}) == len(candidates) >= 3


@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (5, 8192, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_gemv(canary, n, k, group_size, symmetric, dtype):
    x, weight, bias, expected = problem(1, n, k, group_size, symmetric, dtype)
    canary.outputs.clear()
    out = k10_gemv.matmul(x, weight, bias)
    canary.check()
    assert common.relative_error(out, expected) < common.tolerance(dtype)


@pytest.mark.parametrize("scale", [1e-4, 4000.0])
@pytest.mark.parametrize("lesson", [k09_split_k, k10_gemv])
def test_small_and_large_activations(lesson, scale):
    """fp16 holds numbers from 6e-8 to 65504; products of codes and activations may leave that, the sums must not."""
    packed = quantize_reference(torch.randn(24, 256, device=common.DEVICE) * 0.01, 64)
    x = (torch.randn(1, 256, device=common.DEVICE) * scale).half()
    expected = x.double() @ dequantize_reference(packed, torch.float32).double().t()
    error = common.relative_error(lesson.matmul(x, prepare(packed)), expected)
    assert error < (3e-2 if scale < 1 else common.tolerance(torch.float16))  # 1e-4's output has few fp16 digits itself


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("m", [1, 19])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_w4a8(canary, m, n, k, group_size, dtype):
    x, weight, bias, expected = problem(m, n, k, group_size, dtype=dtype)
    canary.outputs.clear()
    out = k13_w4a8.matmul(x, weight, bias)
    canary.check()
    error = (out.double() - expected).norm() / (expected - bias.double()).norm()
    assert error < 1.5 * k13_w4a8.TOLERANCE  # short rows average over less


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_row_scales(n, k, group_size, symmetric):
    """Of each row the largest magnitude that any of the 16 codes would have in any of its groups, / 127."""
    w = torch.randn(n, k) * torch.logspace(-3, 1, n)[:, None] + torch.randn(n, 1)
    packed = quantize_reference(w, group_size, symmetric)
    packed.scales[:, n // 2] = 0
    steps = torch.arange(16.0).double() - unpack(packed.qzeros.t(), n).t().double()[..., None]  # [groups, N, 16]
    expected = (steps * packed.scales.double()[..., None]).abs().amax((0, 2)) / 127
    row_scales = prepare(packed).row_scales
    assert row_scales.dtype == torch.float32 and row_scales[n // 2] == 0
    assert torch.allclose(row_scales.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group_size", [32, 128])
def test_w4a8_of_rows_of_zeros(group_size):
    packed = quantize_reference(torch.randn(9, 256, device=common.DEVICE), group_size)
    packed.scales[:, ::4] = 0
    out = k13_w4a8.matmul(torch.randn(3, 256, device=common.DEVICE).half(), prepare(packed))
    assert (out[:, ::4] == 0).all() and out[:, 1].all()


@pytest.mark.parametrize(("m", "k"), [(5, 320), (3, 176), (1, 64)])
def test_quantize_activations(m, k):
    x = torch.randn(m, k, device=common.DEVICE).half()
    x[0] = 0
    x8, token_scales = quantize_activations(x)
    # Back to the order of columns: position 32 s + 2 j + p of a block holds column 16 (2 p + s) + j.
    s, j, p = (torch.arange(64) // 32, torch.arange(64) % 32 // 2, torch.arange(64) % 2)
    columns = torch.empty_like(x8.view(m, -1, 64))
    columns[:, :, 16 * (2 * p + s) + j] = x8.view(m, -1, 64)
    columns = columns.reshape(m, -1)
    assert (columns[0] == 0).all() and (columns[:, k:] == 0).all()
    assert torch.allclose(token_scales, x.float().abs().amax(1) / 127, rtol=1e-6)
    assert ((columns[:, :k] * token_scales[:, None] - x.float()).abs() <= 0.5001 * token_scales[:, None]).all()


@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 33), (40, 300)])
def test_add_up(canary, parts, m, n):
    terms = torch.randn(parts, m, n, device=common.DEVICE)
    bias = torch.randn(n, device=common.DEVICE)
    out = torch.empty(m, n, dtype=torch.float16, device=common.DEVICE)
    add_up(terms, bias, out)
    assert common.relative_error(out, terms.double().sum(0) + bias.double()) < common.tolerance(torch.float16)
    add_up(terms, None, out)
    assert common.relative_error(out, terms.double().sum(0)) < common.tolerance(torch.float16)


@needs_hopper
@pytest.mark.parametrize("lesson", HOPPER)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(9, 512, 64), (3, 1600, 64), (40, 1600, 1600), (33, 384, 128), (300, 4096, 4096)]
)
@pytest.mark.parametrize("m", [1, 19, 70, 300])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_on_hopper(canary, lesson, m, n, k, group_size, symmetric, dtype):
    x, weight, bias, expected = problem(m, n, k, group_size, symmetric, dtype)
    canary.outputs.clear()
    out = lesson.matmul(x, weight, bias)
    canary.check()
    error = (out.double() - expected).norm() / (expected - bias.double()).norm()
    assert error < 1.5 * tolerance(lesson, dtype)


@needs_hopper
@pytest.mark.parametrize("lesson", HOPPER)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(2048, 2048, 2048), (512, 2048, 8192), (128, 8192, 8192), (1000, 12800, 1600)]
)
def test_every_tile_height_on_hopper(canary, lesson, m, n, k):
    x, weight, bias, expected = problem(m, n, k, 64)
    canary.outputs.clear()
    first, second = lesson.matmul(x, weight, bias), lesson.matmul(x, weight, bias)
    canary.check()
    assert torch.equal(first, second)
    assert common.relative_error(first, expected) < tolerance(lesson, torch.float16)


@pytest.mark.parametrize(
    ("m", "n", "k", "options"),
    [
        (16, 8192, 2048, (16, 1, 2)),
        (16, 8192, 8192, (16, 1, 2)),
        (16, 2048, 8192, (16, 4, 2)),
        (17, 8192, 2048, (32, 1, 2)),
        (64, 2048, 8192, (64, 4, 1)),
        (64, 8192, 8192, (64, 1, 2)),
        (16, 2048, 2048, (16, 4, 2)),
        (32, 1600, 1600, (32, 4, 2)),
        (64, 768, 3072, (64, 6, 1)),
        (128, 512, 2048, (64, 4, 2)),
        (128, 768, 768, (16, 1, 2)),
        (128, 1600, 6400, (128, 5, 1)),
        (128, 2048, 8192, (128, 4, 1)),
        (128, 2048, 2048, (32, 1, 2)),
        (512, 512, 2048, (32, 1, 2)),
        (128, 8192, 8192, (128, 1, 1)),
        (256, 2048, 8192, (128, 2, 1)),
        (512, 2048, 2048, (128, 1, 1)),
    ],
)
def test_tiles_of_two_rings(m, n, k, options):
    """Those that the lesson's measured times are of: tokens a program, programs and warpgroups that share K."""
    chosen = k22_two_rings.launch_options(m, n, k, 128)
    assert (chosen["BLOCK_M"], chosen["SPLIT_K"], chosen["SHARES"]) == options


@pytest.mark.parametrize(("multiprocessors", "height", "split"), [(132, 128, 4), (114, 128, 3), (78, 64, 1)])
def test_programs_of_two_rings_that_have_a_multiprocessor_each(multiprocessors, height, split):
    """An H100 as a PCIe card has fewer, and 128 programs would take two rounds."""
    chosen = k22_two_rings.launch_options(128, 2048, 8192, 128, multiprocessors)
    assert (chosen["BLOCK_M"], chosen["SPLIT_K"]) == (height, split)
    alone = k22_two_rings.launch_options(128, 8192, 2048, 128, multiprocessors)
    assert ((alone["WIDE"], alone["STAGES"], alone["SLOTS"]) == k22_two_rings.ALONE) == (multiprocessors >= 128)


@pytest.mark.parametrize("group_size", [64, 128, 192, 320, 512, 1024])
def test_two_rings_has_options_for_every_shape(group_size):
    for m in (1, 9, 16, 17, 33, 65, 129, 1000):
        for n in (1, 64, 2048, 4160, 8256, 50257):
            for k in (64, 2048, 4096, 16384):
                chosen = k22_two_rings.launch_options(m, n, k, group_size)
                assert chosen["SLOTS"] == 0 or chosen["STAGES"] <= chosen["SLOTS"]
                columns = 64 * chosen["WIDE"]
                steps = -(-k // columns)
                rounds = chosen["SHARES"] * (2 if chosen["WIDE"] == 1 else 1)  # steps in the kernel's loop's body
                part = -(-steps // (chosen["SPLIT_K"] * rounds)) * rounds
                assert (chosen["SPLIT_K"] - 1) * part < steps, "the last program would have nothing to do"
                assert columns % group_size == 0 or group_size % columns == 0, "a step would cut a group"


def test_rings_of_two_warpgroups_are_even():
    """Else a slot would change hands, and its new reader mistake the last round's delivery for its own."""
    rings = [ring for (shares, _), ring in k22_two_rings.RINGS.items() if shares == 2]
    for _, stages, slots in (*rings, k22_two_rings.SHORT):
        assert stages % 2 == 0 and slots % 2 == 0


OF_EVERY_RING = [  # M, N, K, group size
    (16, 8195, 2048, 64),
    (16, 2048, 8192, 1024),
    (16, 4160, 6144, 128),
    (16, 8192, 6400, 320),
    (5, 16448, 256, 64),
    (20, 2048, 4096, 64),
    (32, 8192, 512, 64),
    (32, 8256, 960, 320),
    (32, 8256, 192, 64),
    (100, 2048, 2048, 512),
    (50, 1024, 2048, 512),
    (64, 2048, 8192, 64),
    (128, 2048, 8192, 128),
    (128, 8192, 1920, 192),
    (256, 8192, 2048, 128),
    (512, 2048, 8192, 128),
]


def test_those_are_of_every_ring():
    chosen = [k22_two_rings.launch_options(*problem) for problem in OF_EVERY_RING]
    rings = {(options["WIDE"], options["STAGES"], options["SLOTS"]) for options in chosen}
    alone = {k22_two_rings.ALONE, k22_two_rings.ALONE_LONG}
    assert rings >= {*k22_two_rings.RINGS.values(), k22_two_rings.SHORT} | alone


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "group_size"), OF_EVERY_RING)
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_two_rings_with_every_ring(canary, m, n, k, group_size, dtype):
    x, weight, bias, expected = problem(m, n, k, group_size, dtype=dtype)
    canary.outputs.clear()
    first, second = k22_two_rings.matmul(x, weight, bias), k22_two_rings.matmul(x, weight, bias)
    canary.check()
    assert torch.equal(first, second)
    assert common.relative_error(first, expected) < common.tolerance(dtype)


@pytest.mark.parametrize(
    "lesson", [k09_split_k, k10_gemv, k12_hopper, k13_w4a8, k15_w4a8_hopper, k22_two_rings, k23_w4a8_rings]
)
def test_launchers_name_what_does_not_fit(lesson):
    x, weight, bias, _ = problem(1, 24, 128, 32)
    with pytest.raises(ValueError, match="in_features 128"):
        lesson.matmul(x[:, :64], weight)
    with pytest.raises(ValueError, match="float32"):
        lesson.matmul(x.float(), weight)
    with pytest.raises(ValueError, match=r"bias has shape \[23\]"):
        lesson.matmul(x, weight, bias[:23])
    if lesson is k10_gemv:
        with pytest.raises(ValueError, match="one token"):
            lesson.matmul(x.expand(2, 128), weight)
    if lesson in (k12_hopper, k15_w4a8_hopper, k22_two_rings, k23_w4a8_rings):
        with pytest.raises(ValueError, match="group_size is 32"):
            lesson.matmul(x, weight)


@pytest.mark.parametrize("lesson", [k09_split_k, k13_w4a8])
def test_no_tokens_and_odd_addresses(lesson):
    x, weight, bias, expected = problem(3, 24, 128, 32)
    assert lesson.matmul(x[:0], weight, bias).shape == (0, 24)
    shifted = torch.empty(3 * 128 + 1, dtype=torch.float16, device=common.DEVICE)[1:].view(3, 128)
    shifted.copy_(x)
    assert torch.equal(lesson.matmul(shifted, weight, bias), lesson.matmul(x, weight, bias))
