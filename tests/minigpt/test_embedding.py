"""The packed embedding and output layer: what it computes, what a file of it holds, what it costs."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kernels
from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import gptq_format
from minigpt.quantization.convert import WHOLE_ROW, quantize_model
from minigpt.quantization.embedding import Int8Embedding, quantize_embedding
from minigpt.quantization.rtn import METHODS

TOKENS = torch.arange(40).view(2, 20) % 71
PACKED = ("int8", "int4")


@pytest.fixture
def model():
    model = GPT(GPTConfig(vocab_size=71, n_positions=24, n_embd=48, n_layer=2, n_head=3))
    model.init_weights()
    return model.half().float().eval().requires_grad_(False)


def weight_of(model):
    """The embedding's weight as it counts: float32 [V, C]."""
    weight = model.wte.weight
    if isinstance(model.wte, Int8Embedding):
        return kernels.dequantize_int8(weight, torch.float32)
    return kernels.dequantize(weight, torch.float32)


def save(model, folder, choice, group_size=16):
    """Quantizes all of a model and writes it."""
    list(quantize_model(model, METHODS["mse"], group_size))
    quantize_embedding(model, choice, group_size)
    checkpoint.save(model, folder, quantization=gptq_format.describe("mse", group_size, False, choice))
    return model


@pytest.mark.parametrize("choice", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_computes_what_a_model_with_the_dequantized_weight_does(model, choice, dtype):
    plain = copy.deepcopy(model)
    quantize_embedding(model, choice, 16)
    plain.wte.weight.copy_(weight_of(model))
    plain, model = plain.to(dtype), model.to(dtype)
    assert torch.equal(model.wte(TOKENS), plain.wte(TOKENS)) and model.wte(TOKENS).dtype == dtype
    ours, expected = model(TOKENS), plain(TOKENS)
    assert ours.dtype == dtype and ours.shape == expected.shape
    assert (ours - expected).norm() < {torch.float32: 2e-4, torch.float16: 2e-3}.get(dtype, 2e-2) * expected.norm()


@pytest.mark.parametrize("choice", PACKED)
def test_the_report_says_what_was_done(model, choice):
    before = model.wte.weight.double()
    report = quantize_embedding(model, choice, 16)
    error = weight_of(model).double() - before
    assert (report.name, report.kind, report.weights) == ("wte", "wte", 71 * 48)
    assert report.relative_error == pytest.approx((error.norm() / before.norm()).item(), rel=1e-4)
    assert report.mean_absolute_error == pytest.approx(error.abs().mean().item(), rel=1e-4)
    assert report.stored_bytes == {"int8": 71 * 48 + 71 * 2, "int4": 71 * 24 + 3 * 71 * 2 + 3 * 9 * 4}[choice]


def test_fp16_leaves_the_model_as_it_is(model):
    assert quantize_embedding(model, "fp16", 16) is None
    assert model.lm_head.weight is model.wte.weight


def test_one_weight_is_stored(model):
    """Embedding and output layer share it, in memory, in a file, and in a copy."""
    quantize_embedding(model, "int8", 16)
    assert not model.lm_head.state_dict() and not list(model.lm_head.buffers())
    assert {name for name in model.state_dict() if "wte" in name} == {"wte.codes8", "wte.scales"}
    copied = copy.deepcopy(model)
    copied.wte.codes8.zero_()
    assert not copied.lm_head(torch.ones(1, 48)).any() and model.lm_head(torch.ones(1, 48)).any()


@pytest.mark.parametrize("choice", PACKED)
@pytest.mark.parametrize("group_size", [16, WHOLE_ROW])
def test_round_trip(model, tmp_path, choice, group_size):
    save(model, tmp_path, choice, group_size)
    again = checkpoint.load(tmp_path, torch.float32)
    assert torch.equal(again(TOKENS), model(TOKENS))
    half = checkpoint.load(tmp_path, torch.bfloat16)
    assert half.wte.scales.dtype == torch.float16 and half(TOKENS).dtype == torch.bfloat16
    checkpoint.save(
        half.float(), tmp_path / "again", quantization=gptq_format.describe("mse", group_size, False, choice)
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    for name in ours:
        if "wte" in name:
            assert torch.equal(ours[name], theirs[name])


def test_other_tools_fail_instead_of_going_on_with_random_rows(model, tmp_path):
    quantize_embedding(model, "int8", 16)
    checkpoint.save(model, tmp_path)
    with pytest.raises(Exception, match="(?s)size.*mismatch|mismatch.*size|shape"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("choice", PACKED)
def test_another_model_is_told_apart(model, tmp_path, choice):
    fresh = copy.deepcopy(model)
    other = GPT(model.config)
    other.init_weights()
    save(model, tmp_path, choice)
    assert not checkpoint.holds_another_model(tmp_path, fresh)
    assert checkpoint.holds_another_model(tmp_path, other)


@pytest.mark.parametrize(
    ("choice", "name", "value", "message"),
    [
        ("int8", "codes8", torch.zeros(71, 47, dtype=torch.int8), r"wte.codes8 has shape \[71, 47\], not \[71, 48\]"),
        ("int8", "codes8", torch.zeros(71, 48), "wte.codes8 is torch.float32, not torch.int8"),
        ("int8", "codes8", None, "wte.codes8 is missing"),
        ("int8", "scales", torch.zeros(71), "wte.scales is torch.float32, not torch.float16"),
        ("int8", "scales", torch.full((71,), torch.nan).half(), "wte.scales has values that are NaN"),
        ("int4", "qweight", torch.zeros(6, 70, dtype=torch.int32), r"wte.qweight has shape \[6, 70\]"),
        ("int4", "qzeros", None, "wte.qzeros is missing"),
        ("int4", "codes8", torch.zeros(71, 48, dtype=torch.int8), "wte.codes8 is no tensor"),
    ],
)
def test_broken_files(model, tmp_path, choice, name, value, message):
    save(model, tmp_path, choice)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(f"transformer.wte.{name}", None)
    if value is not None:
        tensors[f"transformer.wte.{name}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"embedding": "int3"}, "meta.embedding is 'int3'; only int8"),
        ({}, r"wte.weight has shape \[0, 48\]"),
        (7, "wte"),
    ],
)
def test_settings_that_do_not_fit_the_file(model, tmp_path, meta, message):
    save(model, tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["meta"] = meta
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors")  # without the copy of config.json in its header
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path, torch.float32)


def test_weights_that_are_not_finite(model):
    model.wte.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="wte has weights that are NaN"):
        quantize_embedding(model, "int8", 16)


def test_on_the_demo_int8_is_a_tenth_of_int4s_error():
    errors = {}
    for choice in PACKED:
        model = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32)
        errors[choice] = quantize_embedding(model, choice, 64).relative_error
    assert errors["int8"] < 0.008 and errors["int8"] < errors["int4"] / 10


@pytest.mark.gpu
@pytest.mark.parametrize("choice", PACKED)
def test_on_a_gpu(model, tmp_path, choice):
    expected = save(model, tmp_path, choice)(TOKENS)
    there = checkpoint.load(tmp_path, torch.float16, "cuda")
    assert (there(TOKENS.cuda()).float().cpu() - expected).abs().max() < 0.02
    assert (there(TOKENS[:1, :1].cuda()).float().cpu() - there(TOKENS.cuda())[:1, :1].float().cpu()).abs().max() < 0.02
    assert torch.equal(there.cpu().float()(TOKENS), expected)
