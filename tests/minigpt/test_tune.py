"""Tuning an int4 model towards the FP one it was made from."""

import copy
import math

import pytest
import torch

import kernels
from minigpt import checkpoint, data
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import gptq_format, tune
from minigpt.quantization.convert import quantize_model
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.rtn import METHODS
from minigpt.tokenizer import encode, tokenizer_for

VOCABULARY = 71
GROUP_SIZE = 16


@pytest.fixture
def reference():
    """A random model with weights large enough that its predictions differ from place to place."""
    model = GPT(GPTConfig(vocab_size=VOCABULARY, n_positions=24, n_embd=48, n_layer=2, n_head=3))
    model.init_weights()
    for name, parameter in model.named_parameters():
        parameter.data *= 1 if "ln_" in name else 5
    return model.eval()


def quantized(reference, method="mse"):
    model = copy.deepcopy(reference)
    list(quantize_model(model, METHODS[method], GROUP_SIZE))
    return model


@pytest.fixture
def demo_text():
    """int64 [36, 64] and [8, 64], of modules that the demo was not trained on."""
    tokenizer = tokenizer_for(checkpoint.DEMO_FOLDER, 4096)
    return [
        torch.tensor(encode(tokenizer, data.load_text("demo", split)[:40000])[: n * 64]).view(n, 64)
        for split, n in (("validation", 36), ("test", 8))
    ]


def text(n, length=24):
    return torch.randint(VOCABULARY, (n, length))


@torch.no_grad()
def divergence(model, reference, tokens):
    """Mean KL(reference || model) in float64, from its definition."""
    p, q = (each(tokens).double().softmax(-1) for each in (reference, model))
    return (p * (p.log() - q.log())).sum(-1).mean().item()


def int4_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}


@pytest.mark.parametrize("method", METHODS)
def test_predictions_come_closer_on_other_text(reference, method):
    model, tokens = quantized(reference, method), text(16)
    before = divergence(model, reference, tokens)
    report = tune.tune(model, reference, text(72), steps=60)
    assert divergence(model, reference, tokens) < 0.7 * before
    assert report.kl_after < 0.7 * report.kl_before and report.best_step > 0
    assert report.kl_before == pytest.approx(before, rel=0.3)


def test_a_trained_model(demo_text):
    """A few steps on a little of the demo's validation text, judged on its test text."""
    reference = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32).eval()
    model = copy.deepcopy(reference)
    list(quantize_model(model, METHODS["mse"], 128))
    training, other = demo_text
    before = divergence(model, reference, other)
    tune.tune(model, reference, training, steps=8, batch_size=4)
    assert divergence(model, reference, other) < 0.95 * before


def test_the_format_stays_untouched(reference, tmp_path, monkeypatch):
    """With positions so near their cells' edges that many codes change."""
    monkeypatch.setattr(tune, "EDGE", 0.499)
    monkeypatch.setattr(tune, "code_rate", lambda steps: tune.CODE_RATE)
    model = quantized(reference)
    before = {name: layer.weight for name, layer in int4_layers(model).items()}
    embeddings = {name: model.get_parameter(name).clone() for name in ("wte.weight", "wpe.weight")}
    report = tune.tune(model, reference, text(40), steps=30)
    changed = weights = 0
    for name, layer in int4_layers(model).items():
        for tensor, old in zip(layer.weight, before[name], strict=True):
            assert tensor.dtype == old.dtype and tensor.shape == old.shape and tensor.is_contiguous()
        assert torch.equal(layer.qzeros, before[name].qzeros)
        assert torch.isfinite(layer.scales).all() and layer.bias.dtype == torch.float16
        codes, old = (kernels.unpack(words, layer.in_features) for words in (layer.qweight, before[name].qweight))
        assert codes.min() >= 0 and codes.max() <= 15
        changed, weights = changed + (codes != old).sum().item(), weights + codes.numel()
    assert len(before) == len(int4_layers(model)) == 8
    assert report.codes_changed == pytest.approx(changed / weights) and 0.001 < report.codes_changed < 0.5
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in embeddings.items())
    assert model.lm_head.weight is model.wte.weight
    checkpoint.save(model, tmp_path / "int4", quantization=gptq_format.describe("tune", GROUP_SIZE, False))
    tokens = text(4)
    assert divergence(checkpoint.load(tmp_path / "int4", torch.float32), model, tokens) < 1e-5


def test_a_tunable_layer_starts_and_ends_as_the_int4_layer():
    """Bit for bit, also with clipped weights, negative scales and out_features that are no multiple of 8."""
    weight = torch.randn(37, 64).double().pow(3).float()
    for method in METHODS.values():
        layer = Int4Linear(method(weight, 32), torch.randn(37).half())
        tunable = tune.TunableInt4Linear(layer, weight)
        for tensor, old in zip(tunable.to_int4().weight, layer.weight, strict=True):
            assert torch.equal(tensor, old)
        x = torch.randn(5, 64)
        expected = torch.nn.functional.linear(x, kernels.dequantize(layer.weight, torch.float32), layer.bias.float())
        assert torch.allclose(tunable(x), expected, atol=1e-4)


def test_positions_start_where_the_weights_lie():
    """Where the FP weight itself lies, unless that is near the edge of its code's cell or beyond it."""
    weight = torch.randn(24, 64)
    tunable = tune.TunableInt4Linear(Int4Linear(METHODS["minmax"](weight, 32), torch.zeros(24)), weight)
    lies = (tunable.position - tunable.zeros[..., None]) * tunable.start_scales[..., None]
    inside = (tunable.position - tunable.codes()).abs() < tune.EDGE - 1e-3
    assert inside.float().mean() > 0.85
    assert torch.allclose(lies.flatten(1)[inside.flatten(1)], weight[inside.flatten(1)], atol=1e-5)


def test_the_gradient_is_that_of_the_divergence(reference):
    """Biases and LayerNorms, which nothing rounds, against plain autograd; scales against the dequantized weight's."""
    model, tokens = quantized(reference), text(3)
    layers = tune.make_tunable(model, reference)
    tune.differentiate(model, reference, tokens)
    assert all(parameter.grad is None for parameter in reference.parameters())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    q, p = model(tokens).log_softmax(-1), reference(tokens).detach().log_softmax(-1)
    ((p.exp() * (p - q)).sum() / tokens.numel()).backward()
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == tuned and not any(name.startswith(("wte", "wpe")) for name in tuned)
    for name in tuned:
        assert torch.allclose(gradients[name], model.get_parameter(name).grad, rtol=1e-3, atol=1e-7), name
    layer = layers["h.0.mlp.c_fc"]
    ratio = layer.position.grad / layer.scales()[..., None]  # of the weight's gradient, which a scale's adds up
    expected = (ratio * (layer.codes() - layer.zeros[..., None])).sum(-1) * layer.start_scales
    assert torch.allclose(layer.stretch.grad, expected, rtol=1e-3, atol=1e-7)


def test_noise_alone_does_not_undo_what_was_rounded_the_other_way(reference):
    """With gradients that are nothing but noise, next to no code changes, whatever the number of steps."""
    for steps in (100, 4000):
        position = torch.nn.Parameter(torch.full((1000,), 7 + tune.EDGE))
        optimizer = torch.optim.Adam([position], lr=tune.code_rate(steps), betas=tune.BETAS, eps=tune.EPSILON)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, steps=steps: tune.rate(step, steps))
        for _ in range(steps):
            position.grad = torch.randn(1000)
            optimizer.step()
            schedule.step()
        assert (position.round() != 7).float().mean() < 0.1


def test_it_never_ends_worse(reference, monkeypatch):
    """With absurd step sizes nothing but the start is worth keeping, and that is what is kept."""
    monkeypatch.setattr(tune, "SCALE_RATE", 1e3)
    monkeypatch.setattr(tune, "OFFSET_RATE", 1e3)
    model = quantized(reference)
    before = copy.deepcopy(model)
    report = tune.tune(model, reference, text(16), steps=4)
    assert report.best_step == 0 and report.kl_after == report.kl_before and report.codes_changed == 0
    kept = model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())


def test_an_fp_model_stays_where_it_is(reference):
    """The FP control: what is nearest to itself already is not tuned away, so tuning cannot teach it the text."""
    model = copy.deepcopy(reference)
    report = tune.tune(model, reference, text(16), steps=8)
    assert report.best_step == 0 and report.kl_before < 1e-9
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_the_same_seed_gives_the_same_model(reference):
    windows = text(24)
    models = [quantized(reference) for _ in range(3)]
    reports = [tune.tune(model, reference, windows, 10, 4, seed) for model, seed in zip(models, (5, 5, 6), strict=True)]
    assert reports[0] == reports[1] != reports[2]
    first, second = (model.state_dict() for model in models[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_divergence_that_is_not_finite_is_an_error_and_leaves_the_int4_model(reference, monkeypatch, when):
    model = quantized(reference)
    before = {name: layer.weight for name, layer in int4_layers(model).items()}
    if when == "before":
        model.h[1].ln_2.weight.data[3] = math.nan
    else:
        monkeypatch.setattr(tune, "OFFSET_RATE", math.inf)
    with pytest.raises(UserError, match="became nan while tuning"):
        tune.tune(model, reference, text(16), steps=4)
    for name, layer in int4_layers(model).items():
        assert all(torch.equal(*pair) for pair in zip(layer.weight, before[name], strict=True))


def test_one_window_is_not_enough(reference):
    with pytest.raises(ValueError, match="tuning needs at least 2 windows.* there is 1"):
        tune.tune(quantized(reference), reference, text(1))


def test_no_steps(reference):
    with pytest.raises(UserError, match="--steps is 0, it must be at least 1"):
        tune.tune(quantized(reference), reference, text(8), steps=0)


def test_the_gradient_in_bfloat16_points_the_same_way(reference, monkeypatch):
    """As on a GPU: rounding the blocks' products to three digits neither cuts the graph nor turns the gradient."""
    model, tokens = quantized(reference), text(3)
    layers = tune.make_tunable(model, reference)
    gradients = []
    for enabled in (False, True):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        monkeypatch.setattr(tune, "in_bfloat16", lambda device, autocast=autocast: autocast)
        model.zero_grad()
        tune.differentiate(model, reference, tokens)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    exact, rounded = gradients
    assert exact.keys() == rounded.keys() and all(grad.dtype == torch.float32 for grad in rounded.values())
    for name in [f"{layer}.{part}" for layer in layers for part in ("position", "stretch")]:
        assert not torch.equal(exact[name], rounded[name])
        assert torch.cosine_similarity(exact[name].flatten(), rounded[name].flatten(), dim=0) > 0.98, name


def test_every_window_is_read_before_any_comes_again():
    windows = torch.arange(6)[:, None] * torch.ones(1, 3, dtype=torch.int64)
    batches = list(tune.draw(windows, 5, 4, seed=1))
    read = torch.cat(batches)[:, 0]
    assert [batch.shape for batch in batches] == [(4, 3)] * 5
    assert all(sorted(part.tolist()) == list(range(6)) for part in read[:18].split(6))


@pytest.mark.gpu
def test_on_a_gpu(reference):
    model, reference, tokens = quantized(reference).cuda(), reference.cuda(), text(16).cuda()
    before = divergence(model, reference, tokens)
    tune.tune(model, reference, text(72).cuda(), steps=60)
    assert divergence(model, reference, tokens) < 0.8 * before
    assert all(layer.codes is not None for layer in int4_layers(model).values())
