"""Lessons 17 to 21, and the residual stream between them, against float64.

Lessons 17, 18 and 21 and the output layer of lesson 20 are Gluon, for which there is no interpreter: they need a GPU.
"""

from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

import kernels  # noqa: E402
from kernels import (  # noqa: E402
    Parts,
    Stream,
    common,
    fold_norm,
    fused,
    k17_few_tokens,
    k18_fused_layers,
    k19_attention,
    k20_step_ends,
    k21_whole_step,
)
from kernels.k00_reference import dequantize_reference, quantize_reference  # noqa: E402
from kernels.prepared import prepare  # noqa: E402
from kernels.stream import attend_reference, values  # noqa: E402

DEVICE = common.DEVICE
EPS = 1e-5
REASON = "needs an NVIDIA GPU of sm_80 or newer"
needs_mma = pytest.mark.skipif(not common.has_mma(DEVICE), reason=REASON)
# On a CPU the references run, in plain torch.
mma_or_cpu = pytest.mark.skipif(DEVICE.type == "cuda" and not common.has_mma(DEVICE), reason=REASON)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def numbers(weight):
    """What a weight stands for, in float64."""
    return values(weight).double()


# ---- lesson 17


def few_tokens_problem(m, n, k, group_size, dtype=torch.float16, symmetric=False):
    """x, a weight, a bias, and x @ w^T + bias in float64."""
    packed = quantize_reference(randn(n, k), group_size, symmetric)
    x, bias = randn(m, k, dtype=dtype), randn(n, dtype=dtype)
    return (
        x,
        prepare(packed),
        bias,
        x.double() @ dequantize_reference(packed, torch.float32).double().t() + bias.double(),
    )


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(40, 64, 64), (1, 128, 64), (33, 384, 128), (17, 576, 192), (130, 768, 768), (1000, 1600, 320), (15, 1600, 64),
     (31, 3328, 128), (47, 3392, 64), (2304, 4096, 4096)],
)  # fmt: skip
@pytest.mark.parametrize("m", range(1, 17))
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
def test_few_tokens(canary, m, n, k, group_size, dtype):
    """4 warps up to 52 blocks of 64 columns, 8 from there; the last step and the last tile are only partly used."""
    x, weight, bias, expected = few_tokens_problem(m, n, k, group_size, dtype)
    canary.outputs.clear()
    out = k17_few_tokens.matmul(x, weight, bias)
    canary.check()
    assert out.dtype == dtype and common.relative_error(out, expected) < common.tolerance(dtype)
    assert common.relative_error(k17_few_tokens.matmul(x, weight), expected - bias.double()) < common.tolerance(dtype)
    assert torch.equal(k17_few_tokens.matmul(x, weight, bias), out)


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize("k", [4160, 5120, 6400, 8192])
@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_tokens_of_many_columns(canary, m, k, symmetric):
    x, weight, bias, expected = few_tokens_problem(m, 100, k, 64, symmetric=symmetric)
    canary.outputs.clear()
    out = k17_few_tokens.matmul(x, weight, bias)
    canary.check()
    assert common.relative_error(out, expected) < common.tolerance(torch.float16)
    assert torch.equal(k17_few_tokens.matmul(x, weight, bias), out)


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        *((1, 8256, 64), (47, 8320, 128), (100, 32768, 256), (16200, 4096, 4096), (8201, 8192, 128)),
        *((5121, 7232, 64), (33, 8256, 192), (40, 12800, 320), (4096, 8192, 128), (4240, 4096, 64)),
        *((4300, 8256, 192), (8470, 4160, 320)),
    ],
)
@pytest.mark.parametrize("dtype", common.ACTIVATION_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_token_in_passes(canary, n, k, group_size, dtype, symmetric):
    """8 to 32 blocks of 64 columns a pass; the last pass, and the last tile of rows, are whole or only partly used."""
    assert k17_few_tokens.in_passes(n, k)
    x, weight, bias, expected = few_tokens_problem(1, n, k, group_size, dtype, symmetric=symmetric)
    canary.outputs.clear()
    out = k17_few_tokens.matmul(x, weight, bias)
    canary.check()
    assert common.relative_error(out, expected) < common.tolerance(dtype)
    assert common.relative_error(k17_few_tokens.matmul(x, weight), expected - bias.double()) < common.tolerance(dtype)
    assert torch.equal(k17_few_tokens.matmul(x, weight, bias), out)


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [2, 8, 13])
def test_tokens_do_not_see_each_other(m, value):
    """Neither what is not finite in one, nor what lies in memory before the first and behind the last."""
    x, weight, bias, _ = few_tokens_problem(m, 40, 320, 64)
    clean = k17_few_tokens.matmul(x, weight, bias)
    surrounded = torch.full((m + 2, 320), value, dtype=x.dtype, device=DEVICE)
    surrounded[1:-1] = x
    assert torch.equal(k17_few_tokens.matmul(surrounded[1:-1], weight, bias), clean)
    x[1, 300] = value
    out = k17_few_tokens.matmul(x, weight, bias)
    assert not torch.isfinite(out[1]).any()
    others = [row for row in range(m) if row != 1]
    assert torch.equal(out[others], clean[others])


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-4, 4000.0])
def test_few_tokens_small_and_large(scale):
    packed = quantize_reference(randn(24, 256) * 0.01, 64)
    x = (randn(3, 256) * scale).half()
    expected = x.double() @ dequantize_reference(packed, torch.float32).double().t()
    error = common.relative_error(k17_few_tokens.matmul(x, prepare(packed)), expected)
    assert error < (3e-2 if scale < 1 else common.tolerance(torch.float16))  # 1e-4's output has few fp16 digits itself


@needs_mma
@pytest.mark.gpu
def test_few_tokens_with_strides_and_of_any_shape():
    x, weight, bias, expected = few_tokens_problem(6, 24, 128, 64)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    for each in (strided, strided.view(2, 3, 128)):
        out = k17_few_tokens.matmul(each, weight, bias)
        assert out.shape == (*each.shape[:-1], 24)
        assert common.relative_error(out.view(6, 24), expected) < common.tolerance(torch.float16)


@needs_mma
@pytest.mark.gpu
def test_few_tokens_at_an_odd_address():
    x, weight, bias, _ = few_tokens_problem(3, 24, 128, 64)
    shifted = torch.empty(3 * 128 + 1, dtype=torch.float16, device=DEVICE)[1:].view(3, 128)
    shifted.copy_(x)
    assert torch.equal(k17_few_tokens.matmul(shifted, weight, bias), k17_few_tokens.matmul(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 64).half()}, r"\[1, 64\].*in_features 128"),
        ({"x": torch.zeros(1, 128)}, "float32"),
        ({"bias": torch.zeros(23)}, r"\[23\].*\[24\]"),
        ({"group_size": 32}, "group_size is 32"),
        ({}, "needs an NVIDIA GPU of sm_80"),
        ({"x": torch.zeros(17, 128).half()}, "1 to 16 tokens"),
        ({"x": torch.zeros(0, 128).half()}, "1 to 16 tokens"),
    ],
)
def test_few_tokens_names_what_does_not_fit(monkeypatch, change, message):
    if "tokens" in message:
        monkeypatch.setattr(common, "has_mma", lambda device: True)
    elif not change:
        monkeypatch.setattr(common, "has_mma", lambda device: False)
    weight = prepare(quantize_reference(randn(24, 128), change.pop("group_size", 64)))
    arguments = {"x": torch.zeros(1, 128).half(), "weight": weight, **change}
    with pytest.raises(ValueError, match=message):
        k17_few_tokens.matmul(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


# ---- the stream, and LayerNorm taken apart


def layer_norm(x, gamma, beta):
    return torch.nn.functional.layer_norm(x.double(), gamma.shape, gamma.double(), beta.double(), EPS)


WEIGHTS = {
    "fp16": lambda w: w.half(),
    "int8": kernels.quantize_int8,
    "int4": lambda w: prepare(quantize_reference(w, 64)),
}


def normed_problem(m, n, k, form="int4", mean=0.5, dtype=torch.float16):
    """A stream of x, its norm's weight and bias, a weight in some form, the layer's bias."""
    gamma, beta, bias = 1 + 0.3 * randn(k), randn(k), randn(n)
    weight = WEIGHTS[form](randn(n, k) / k**0.5)
    stream = Stream.zeros(m, k, DEVICE)
    stream.write(2 * randn(m, k) + mean, gamma)
    return stream, gamma.to(dtype), beta.to(dtype), weight, bias.to(dtype)


@pytest.mark.parametrize(("m", "c"), [(1, 16), (3, 80), (8, 1600)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_write(m, c, dtype):
    stream = Stream.zeros(m, c, DEVICE)
    kept = stream._asdict()
    for _ in range(2):
        x, gamma = randn(m, c, dtype=dtype) + 3, randn(c, dtype=dtype)
        stream.write(x, gamma)
        assert torch.equal(stream.residual, x.float())
        assert common.relative_error(stream.scaled, x.double() * gamma.double()) < common.tolerance(torch.float16)
        for tile in range(c // 16):
            part = x[:, 16 * tile : 16 * tile + 16].double()
            assert torch.allclose(stream.sums[tile, :, 0].double(), part.sum(1), rtol=1e-5, atol=1e-5)
            assert torch.allclose(stream.sums[tile, :, 1].double(), part.square().sum(1), rtol=1e-5)
    assert stream.scaled.dtype == torch.float16
    assert all(getattr(stream, name) is tensor for name, tensor in kept.items())  # in place: a graph may hold them


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fold_norm(form, dtype):
    _, gamma, beta, weight, bias = normed_problem(1, 33, 320, form, dtype=dtype)
    for each in (bias, None):
        norm = fold_norm(weight, gamma, beta, each)
        expected = numbers(weight) @ beta.double() + (0 if each is None else each.double())
        assert norm.folded.dtype == norm.bias.dtype == torch.float32
        assert common.relative_error(norm.folded, numbers(weight) @ gamma.double()) < 1e-5
        assert common.relative_error(norm.bias, expected) < 1e-5


@mma_or_cpu
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 64), (2, 48, 192), (3, 1000, 768), (8, 130, 1600), (5, 7, 1280)])
def test_norm_and_layer(canary, form, m, n, k):
    stream, gamma, beta, weight, _ = normed_problem(m, n, k, form)
    expected = layer_norm(stream.residual, gamma, beta) @ numbers(weight).t()
    stream.write(stream.residual, gamma)
    norm = fold_norm(weight, gamma, beta)
    canary.outputs.clear()
    out = kernels.score(stream, weight, norm, EPS)
    if DEVICE.type == "cuda" and form != "fp16":
        canary.check()
    assert out.dtype == torch.float16 and out.shape == (m, n)
    assert common.relative_error(out, expected) < 1.5 * common.tolerance(torch.float16)
    assert torch.equal(kernels.score(stream, weight, norm, EPS), out)
    assert torch.equal(kernels.best_tokens(stream, weight, norm, EPS), out.argmax(1, keepdim=True))


@mma_or_cpu
@pytest.mark.parametrize("form", WEIGHTS)
def test_large_means_and_outliers(form):
    """gamma x is rounded before the mean is taken off it: an error that is the larger, the larger the mean."""
    _, gamma, beta, weight, _ = normed_problem(4, 40, 768, form)
    x = randn(4, 768)
    x[1] += 20
    x[2] -= 5
    x[3, [5, 400]] = torch.tensor([300.0, -2000.0], device=DEVICE)  # GPT-2's first token has such
    stream = Stream.zeros(4, 768, DEVICE)
    stream.write(x, gamma)
    out = kernels.score(stream, weight, fold_norm(weight, gamma, beta), EPS)
    expected = layer_norm(x, gamma, beta) @ numbers(weight).t()
    for row, limit in enumerate((1, 20, 5, 2)):
        assert common.relative_error(out[row], expected[row]) < limit * common.tolerance(torch.float16)


@mma_or_cpu
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_stream_without_variance_is_finite(form):
    """There the mean of the squares less the square of the mean may come out below 0."""
    _, gamma, beta, weight, _ = normed_problem(3, 40, 768, form)
    stream = Stream.zeros(8, 768, DEVICE)
    x = torch.tensor([0.0, 100.3, 77.7, -33.1, 1 / 3, 12.34, 47.11, 99.9], device=DEVICE)
    stream.write(x[:, None].expand(8, 768), gamma)
    assert torch.isfinite(kernels.score(stream, weight, fold_norm(weight, gamma, beta), EPS)).all()


@mma_or_cpu
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_large_stream_does_not_overflow(form):
    """What is multiplied is not normalised yet: gamma x fits fp16, its products with w need not."""
    stream, gamma, beta, weight, _ = normed_problem(3, 40, 768, form)
    weight = WEIGHTS[form](randn(40, 768))
    x = 2000 * randn(3, 768)
    stream.write(x, gamma)
    out = kernels.score(stream, weight, fold_norm(weight, gamma, beta), EPS)
    assert common.relative_error(out, layer_norm(x, gamma, beta) @ numbers(weight).t()) < 2e-3


# ---- lesson 18, or its reference


@mma_or_cpu
@pytest.mark.parametrize(
    ("m", "c", "inner"), [(1, 64, 192), (3, 192, 128), (8, 768, 3072), (2, 1600, 6400), (5, 320, 64)]
)
def test_a_blocks_way(canary, m, c, inner):
    """Norm, layer, GELU, layer, sum, norm, layer: each against float64 from what the one before has left."""
    stream, gamma, beta, first, bias = normed_problem(m, inner, c)
    second, bias_2 = WEIGHTS["int4"](randn(c, inner) / inner**0.5), randn(c).half()
    gamma_2, beta_2 = 1 + 0.3 * randn(c), randn(c)
    stream.write(stream.residual, gamma)
    x = stream.residual.double()
    limit = 1.5 * common.tolerance(torch.float16)
    norm, norm_2 = fold_norm(first, gamma, beta, bias), fold_norm(first, gamma_2, beta_2)

    canary.outputs.clear()
    hidden = kernels.normed_matmul(stream, first, norm, EPS, gelu=True)
    if DEVICE.type == "cuda":
        canary.check()
    expected = layer_norm(x, gamma, beta) @ numbers(first).t() + bias.double()
    expected = torch.nn.functional.gelu(expected, approximate="tanh")
    assert hidden.dtype == torch.float16 and common.relative_error(hidden, expected) < limit

    kernels.add_matmul(hidden, second, bias_2, stream, gamma_2)
    x += hidden.double() @ numbers(second).t() + bias_2.double()
    assert common.relative_error(stream.residual, x) < 1e-4
    again = Stream.zeros(m, c, DEVICE)
    again.write(stream.residual, gamma_2)  # what its readers want is made of what was stored
    for ours, reference in zip(stream, again, strict=True):
        assert torch.allclose(ours.float(), reference.float(), rtol=2e-3, atol=1e-3)
    assert common.relative_error(stream.sums, again.sums) < 1e-5

    out = kernels.normed_matmul(stream, first, norm_2, EPS)
    assert common.relative_error(out, layer_norm(x, gamma_2, beta_2) @ numbers(first).t()) < limit


@mma_or_cpu
def test_gelu_of_large_numbers():
    """exp overflows for very negative ones, and they become 0 all the same."""
    stream, gamma, beta, weight, _ = normed_problem(2, 8, 64)
    bias = torch.tensor([-60000.0, -300.0, -20.0, -5.0, 0.0, 20.0, 300.0, 60000.0], device=DEVICE)
    expected = layer_norm(stream.residual, gamma, beta) @ numbers(weight).t() + bias.double()
    expected = torch.nn.functional.gelu(expected, approximate="tanh")
    out = kernels.normed_matmul(stream, weight, fold_norm(weight, gamma, beta, bias), EPS, gelu=True)
    assert torch.allclose(out.double(), expected, rtol=5e-3, atol=1e-2)


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_streams_do_not_see_each_other(form, value):
    stream, gamma, beta, weight, _ = normed_problem(5, 1000, 320, form)
    norm = fold_norm(weight, gamma, beta)
    clean, x = kernels.score(stream, weight, norm, EPS), stream.residual.clone()
    x[2, 100] = value
    stream.write(x, gamma)
    out = kernels.score(stream, weight, norm, EPS)
    assert not torch.isfinite(out[2]).any()
    stream.write(clean.new_zeros(x.shape), gamma)
    x[2] = 0
    stream.write(x, gamma)
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], kernels.score(stream, weight, norm, EPS)[others])


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sums_do_not_see_each_other(value):
    stream, gamma, _, weight, bias = normed_problem(5, 320, 128)
    stream = Stream.zeros(5, 320, DEVICE)
    x, gamma = randn(5, 128, dtype=torch.float16), randn(320)
    k18_fused_layers.add_matmul(x, weight, bias, stream, gamma)
    dirty, others = Stream.zeros(5, 320, DEVICE), [0, 1, 3, 4]
    x[2, 100] = value
    k18_fused_layers.add_matmul(x, weight, bias, dirty, gamma)
    assert not torch.isfinite(dirty.residual[2]).any()
    assert torch.equal(dirty.residual[others], stream.residual[others])
    assert torch.equal(dirty.scaled[others], stream.scaled[others])
    assert torch.equal(dirty.sums[:, others], stream.sums[:, others])


# ---- lesson 19


def attention(qkv, k, v, positions):
    """One head at a time, in float64, with the cache as it was before: -> [B, C]."""
    batch_size, heads, _, size = k.shape
    new = qkv.double().view(batch_size, 3, heads, size)
    out = []
    for b, position in enumerate(positions.flatten().tolist()):
        for h in range(heads):
            keys = torch.cat([k[b, h, :position].double(), new[b, 1, h][None]])
            weights = torch.softmax(keys @ new[b, 0, h] / size**0.5, 0)
            out.append(weights @ torch.cat([v[b, h, :position].double(), new[b, 2, h][None]]))
    return torch.stack(out).view(batch_size, heads * size)


@pytest.mark.parametrize("attend", [k19_attention.attend, attend_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("heads", "size", "length", "positions"),
    [
        (3, 64, 300, [0, 299, 128]),
        (2, 20, 130, [[129], [127]]),
        (1, 7, 45, [44]),
        (5, 33, 128, [0, 127, 1, 64]),
        (2, 3, 513, [512, 257, 0]),
        (1, 1, 1, [0]),
        (2, 100, 257, [256, 129]),
    ],
)
def test_attention(canary, attend, heads, size, length, positions):
    """Whatever lies in the cache behind a token's position, and in the scratch; it writes a row and nothing else."""
    positions = torch.tensor(positions, device=DEVICE)
    b = len(positions)
    k, v = (randn(b, heads, length, size, dtype=torch.float16) for _ in range(2))
    for row, position in enumerate(positions.flatten().tolist()):
        k[row, :, position:], v[row, :, position:] = torch.nan, torch.inf  # not written yet
    if attend is attend_reference:  # a mask does not hide what is not finite
        k.nan_to_num_(1.0), v.clamp_(max=9.0)
    parts = Parts.empty(b, heads, size, length, DEVICE)
    scratch = list(canary.outputs)
    for turn in range(3):  # backwards, so that fewer programs have something to do each time
        qkv = 3 * randn(b, 3 * heads * size, dtype=torch.float16)
        expected = attention(qkv, k, v, positions)
        after = k.clone(), v.clone()
        rows = torch.arange(b, device=DEVICE)
        for cache, new in zip(after, qkv.view(b, 3, heads, size).unbind(1)[1:], strict=True):
            cache[rows, :, positions.flatten()] = new
        canary.outputs.clear()
        out = attend(qkv, k, v, positions, *([parts] if attend is k19_attention.attend else []))
        if attend is k19_attention.attend:
            canary.check()
        assert out.dtype == torch.float16
        assert common.relative_error(out, expected) < common.tolerance(torch.float16) * 2
        assert torch.equal(k.view(torch.int16), after[0].view(torch.int16))  # as bits: there are NaNs
        assert torch.equal(v.view(torch.int16), after[1].view(torch.int16))
        assert parts.arrived.count_nonzero() == 0, turn
        positions = positions - torch.minimum(positions, torch.tensor(70, device=DEVICE))
    for buffer in scratch:
        assert buffer[: canary.MARGIN].isnan().all() and buffer[-canary.MARGIN :].isnan().all()


def joined(parts, position):
    """What the parts of one sequence say together, float64 [1, C]: by the definition of a weighted mean."""
    splits = max(1, -(-position // 128))
    outs, logs = parts.outs[:, :, :splits].double(), parts.logs[:, :, :splits].double()
    weights = torch.exp2(logs - logs.amax(2, keepdim=True))[..., None]
    return ((outs * weights).sum(2) / weights.sum(2)).flatten(1)


@pytest.mark.parametrize("position", [0, 1, 128, 129, 700, 1023])
def test_attention_left_in_parts(position):
    k, v = (randn(1, 12, 1024, 64, dtype=torch.float16) for _ in range(2))
    k[:, :, position:], v[:, :, position:] = torch.nan, torch.inf
    parts = Parts.empty(1, 12, 64, 1024, DEVICE)
    parts.outs.fill_(torch.nan), parts.logs.fill_(torch.inf)
    qkv, positions = randn(1, 3 * 768, dtype=torch.float16), torch.tensor([[position]], device=DEVICE)
    expected = attention(qkv, k, v, positions)
    k19_attention.attend_in_parts(qkv, k, v, positions, parts)
    assert common.relative_error(joined(parts, position), expected) < common.tolerance(torch.float16)
    assert not k[:, :, position].isnan().any() and parts.arrived.count_nonzero() == 0


@pytest.mark.parametrize(
    ("batch_size", "length", "size", "joins"),
    [
        *((1, length, 64, joins) for length, joins in ((128, False), (129, True), (1024, True), (1025, False))),
        (8, 1024, 64, False),
        (1, 1024, 32, False),
    ],
)
def test_whose_attention_the_projection_joins(monkeypatch, batch_size, length, size, joins):
    """A single sequence's, in two to eight parts, with heads of a block of columns."""
    lessons = mock.MagicMock()
    monkeypatch.setattr(fused, "_lesson", lambda _: lessons)
    parts = Parts.empty(batch_size, 2, size, length, DEVICE)
    qkv, k = mock.Mock(is_cuda=True), torch.empty(batch_size, 2, length, size)
    fused.attend_and_add(qkv, k, k, None, parts, None, None, None, None)
    names = ["attend_in_parts", "add_joined"] if joins else ["attend", "add_matmul"]
    assert [name for name, _, _ in lessons.method_calls] == names


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "length"), [(12, 1024), (16, 512), (20, 1000), (25, 1024), (3, 200), (25, 129)])
def test_a_projection_joins_the_parts_of_attention(canary, heads, length):
    """Whatever lies in the parts that are not used."""
    c = 64 * heads
    weight = prepare(quantize_reference(randn(c, c) / c**0.5, 64))
    bias, gamma = randn(c, dtype=torch.float16), 1 + randn(c, dtype=torch.float16) / 10
    k, v = (randn(1, heads, length, 64, dtype=torch.float16) for _ in range(2))
    for position in (0, length // 3, length - 1):
        canary.outputs.clear()
        parts = Parts.empty(1, heads, 64, length, DEVICE)
        scratch = list(canary.outputs)
        parts.outs.fill_(torch.nan), parts.logs.fill_(torch.inf)
        stream = Stream.zeros(1, c, DEVICE)
        stream.write(randn(1, c), gamma)
        before = stream.residual.double()
        qkv, positions = randn(1, 3 * c, dtype=torch.float16), torch.tensor([position], device=DEVICE)
        expected = before + attention(qkv, k, v, positions) @ numbers(weight).t() + bias.double()
        kernels.attend_and_add(qkv, k, v, positions, parts, weight, bias, stream, gamma)
        assert common.relative_error(stream.residual - before, expected - before) < 2 * common.tolerance(torch.float16)
        assert common.relative_error(stream.scaled, expected * gamma.double()) < common.tolerance(torch.float16)
        tiles = expected.view(-1, 16)
        sums = torch.stack([tiles.sum(1), tiles.square().sum(1)], 1)[:, None]
        assert common.relative_error(stream.sums, sums) < 2 * common.tolerance(torch.float16)
        for buffer in scratch:
            assert buffer[: canary.MARGIN].isnan().all() and buffer[-canary.MARGIN :].isnan().all()


def test_attention_to_one_token_alone():
    """A score far above the others: their weights are 0, and the sum is that token's value; nothing overflows."""
    k, v = randn(1, 1, 300, 16, dtype=torch.float16) / 10, randn(1, 1, 300, 16, dtype=torch.float16)
    for best in (5, 200, 299):
        k[0, 0, best] = 100.0
        qkv = torch.cat([torch.full((1, 16), 200.0, device=DEVICE), randn(1, 32) / 10], 1).half()
        position = torch.tensor([299], device=DEVICE)
        if best == 299:
            qkv[0, 16:32] = 100.0
        out = k19_attention.attend(qkv, k, v, position, Parts.empty(1, 1, 16, 300, DEVICE))
        assert torch.equal(out[0], v[0, 0, best])
        k[0, 0, best] = 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_attention_is_the_same_whoever_comes_last(batch_size):
    """The last program to finish adds up, and another one each time: in the same order all the same."""
    k, v = (randn(batch_size, 25, 1024, 64, dtype=torch.float16) for _ in range(2))
    qkv = randn(batch_size, 3 * 1600, dtype=torch.float16)
    positions = torch.randint(500, 1024, (batch_size, 1), device=DEVICE)
    parts = Parts.empty(batch_size, 25, 64, 1024, DEVICE)
    expected = attention(qkv, k, v, positions)
    first = k19_attention.attend(qkv, k, v, positions, parts)
    assert common.relative_error(first, expected) < common.tolerance(torch.float16)
    for _ in range(200):
        assert torch.equal(k19_attention.attend(qkv, k, v, positions, parts), first)
    assert parts.arrived.count_nonzero() == 0


# ---- lesson 20


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize(("m", "vocab", "c"), [(1, 17, 64), (3, 50, 192), (8, 33, 320)])
@pytest.mark.parametrize("embed", [k20_step_ends.embed, kernels.embed], ids=["kernel", "front door"])
def test_embed(canary, embed, form, m, vocab, c):
    wte, wpe, gamma = WEIGHTS[form](randn(vocab, c)), randn(20, c, dtype=torch.float16), randn(c)
    tokens = torch.randint(vocab, (m, 1), device=DEVICE)
    tokens[-1] = vocab - 1
    positions = torch.randint(20, (m, 1), device=DEVICE)
    positions[0] = 19
    canary.outputs.clear()
    stream = Stream(
        torch.empty((m, c), dtype=torch.float32, device=DEVICE),
        torch.empty((m, c), dtype=torch.float16, device=DEVICE),
        torch.empty((c // 16, m, 2), dtype=torch.float32, device=DEVICE),
    )
    watched = list(canary.outputs)
    embed(tokens, positions, wte, wpe, gamma, stream)
    canary.outputs[:] = watched
    canary.check()
    expected = Stream.zeros(m, c, DEVICE)
    expected.write(numbers(wte)[tokens[:, 0]].float() + wpe[positions[:, 0]].float(), gamma)
    for ours, reference, limit in zip(stream, expected, (1e-6, 1e-3, 1e-5), strict=True):
        assert common.relative_error(ours, reference) < limit


def pick(best, index):
    """The kernel alone: the tokens, int64 [M]."""
    programs, m = best.shape
    tokens = torch.full((m,), -7, device=DEVICE)
    block = triton.next_power_of_2(programs)
    k20_step_ends.pick_kernel[(m,)](
        best, index, tokens, programs, m, 16 * programs, BLOCK=block, num_warps=8, **common.early_launch()
    )
    return tokens


def one_best_each(scores):
    """What the output layer leaves of scores [M, V], V a multiple of 16: the best of each 16, the first to have it."""
    tiles = scores.view(len(scores), -1, 16)
    best, within = tiles.max(2).values, tiles.argmax(2)
    index = within + 16 * torch.arange(tiles.shape[1], device=DEVICE)
    return best.t().contiguous(), index.int().t().contiguous()


@pytest.mark.parametrize(("m", "programs"), [(1, 1), (3, 7), (8, 100), (2, 3142)])
def test_pick(m, programs):
    scores = randn(m, 16 * programs)
    assert torch.equal(pick(*one_best_each(scores)), scores.argmax(1))
    rounded = scores.round().clamp(max=1)  # many are the best
    first = (rounded == rounded.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(pick(*one_best_each(rounded)), first)
    scores[:] = -torch.inf
    assert pick(*one_best_each(scores)).tolist() == [0] * m
    scores[:, -1] = -60000.0
    assert pick(*one_best_each(scores)).tolist() == [16 * programs - 1] * m


def test_pick_without_a_best_is_a_token():
    """Scores that are all NaN, a model's that has overflowed: any token will do, but it must be one."""
    best = torch.full((3, 1), torch.nan, device=DEVICE)
    index = torch.full((3, 1), 2**31 - 1, dtype=torch.int32, device=DEVICE)  # the output layer finds none either
    assert 0 <= pick(best, index).item() < 48


@needs_mma
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 50257, 768), (8, 50257, 1600), (3, 33, 64), (2, 16, 1280), (7, 1001, 192)]
)
def test_output_layer_and_its_best_tokens(canary, m, n, k):
    stream, gamma, beta, weight, _ = normed_problem(m, n, k, "int8")
    stream.write(stream.residual, gamma)
    norm = fold_norm(weight, gamma, beta)
    canary.outputs.clear()
    logits, tokens = k20_step_ends.score_and_pick(stream, weight, norm, EPS)
    canary.check()
    expected = layer_norm(stream.residual, gamma, beta) @ numbers(weight).t()
    assert common.relative_error(logits, expected) < 1.5 * common.tolerance(torch.float16)
    assert torch.equal(k20_step_ends.score(stream, weight, norm, EPS), logits)
    best = logits.amax(1, keepdim=True)
    assert torch.equal(tokens, (logits == best).int().argmax(1, keepdim=True))  # of equals the first


@needs_mma
@pytest.mark.gpu
def test_of_equal_rows_the_first_is_picked():
    stream, gamma, beta, weight, _ = normed_problem(4, 500, 128, "int8")
    norm = fold_norm(weight, gamma, beta)
    _, tokens = k20_step_ends.score_and_pick(stream, weight, norm, EPS)
    best = tokens[0].item()
    rows = torch.arange(500, device=DEVICE)
    rows[[499, 498, 3, 19]] = best
    same = kernels.Int8Weight(weight.codes[rows], weight.scales[rows])
    _, tokens = k20_step_ends.score_and_pick(stream, same, fold_norm(same, gamma, beta), EPS)
    assert tokens[0].item() == min(3, best)


# ---- lesson 21


@mma_or_cpu
@pytest.mark.parametrize(("c", "length", "at"), [(64, 100, (0, 99)), (192, 300, (130, 7, 299, 128, 129))])
def test_all_blocks(c, length, at):
    """On a GPU the kernel, which must find its mail cleared whatever was attended to before; else the five parts."""
    layers = k21_whole_step.random_layers(3, c)
    k, v = ([randn(1, c // 64, length, 64, dtype=torch.float16) for _ in range(3)] for _ in range(2))
    mail, stream = kernels.mail_for(k, v), Stream.zeros(1, c, DEVICE)
    for position in at:
        positions = torch.tensor([[position]], device=DEVICE)
        stream.write(randn(1, c), layers.gammas[0])
        k64, v64 = ([tensor.double() for tensor in tensors] for tensors in (k, v))
        x = stream.residual.double()
        expected = k21_whole_step.all_blocks_reference(x, layers, k64, v64, positions, EPS)
        kernels.all_blocks(stream, layers, k, v, positions, mail, EPS)
        rewritten = Stream.zeros(1, c, DEVICE)
        rewritten.write(stream.residual, layers.gammas[-1])
        for ours, reference in zip((*stream, *k, *v), (expected, *rewritten[1:], *k64, *v64), strict=True):
            assert common.relative_error(ours, reference) < 3 * common.tolerance(torch.float16)
