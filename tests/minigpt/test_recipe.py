"""Recipes: their names, and that the passes are put together rightly."""

import argparse
import copy

import pytest
import torch

import kernels
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import awq, recipe, tune
from minigpt.quantization.calibration import Calibration
from minigpt.quantization.convert import quantize_model
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.methods import METHODS
from minigpt.quantization.recipe import Recipe, quantize, read_recipe

GROUP_SIZE = 16


@pytest.fixture
def model():
    """A random model in which some channels are far larger than others, so that awq has something to do."""
    model = GPT(GPTConfig(vocab_size=71, n_positions=24, n_embd=48, n_layer=2, n_head=3))
    model.init_weights()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter).exp() if "ln_" in name else parameter.data * 5
    return model.eval()


@pytest.fixture
def calibration():
    windows = torch.randint(71, (24, 24))
    return Calibration("text", windows[:9], windows, seed=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mse", Recipe("mse")),
        ("awq+absmax", Recipe("absmax", awq=True)),
        ("gptq+tune", Recipe("gptq", tune=True)),
        ("awq+quantease+tune", Recipe("quantease", awq=True, tune=True)),
    ],
)
def test_names(text, expected):
    assert read_recipe(text) == expected and str(expected) == text
    assert expected.calibrated == (text != "mse") and expected.symmetric == ("absmax" in text)


def test_tune_alone_is_a_recipe_that_tunes():
    assert read_recipe("tune").tune and read_recipe(str(read_recipe("tune"))) == read_recipe("tune")


@pytest.mark.parametrize("text", ["magic", "awq", "mse+awq", "tune+mse", "awq+tune", ""])
def test_names_of_nothing(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is none of absmax".replace("+", r"\+")):
        read_recipe(text)


@pytest.mark.parametrize("name", ["absmax", "quantease", "awq+minmax", "awq+gptaq"])
def test_it_does_what_its_parts_do(model, calibration, name):
    """Against the parts one by one; reports and notes are theirs."""
    expected = copy.deepcopy(model)
    how = read_recipe(name)
    if how.awq:
        scaled = awq.scale(expected, calibration.windows, METHODS["minmax" if "minmax" in name else "mse"], GROUP_SIZE)
        assert any(report.alpha > 0 for report in scaled)
    watched = calibration.windows if how.method in ("quantease", "gptaq") else None
    expected_reports = list(quantize_model(expected, METHODS[how.method], GROUP_SIZE, watched))
    reports, notes = quantize(model, how, GROUP_SIZE, calibration)
    assert reports == expected_reports and len(reports) == 8
    assert [note for note in notes if "scaling" in note] == ([awq.describe(scaled)] if how.awq else [])
    for (key, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["gptq+tune", "awq+mse+tune"])
def test_tuning_comes_last(model, calibration, name, monkeypatch):
    """From the codes of the method, towards the model that they belong to, on text beyond what layers were watched on.

    With awq that model has other weights than the one before, and computes the same.
    """
    before, tokens = copy.deepcopy(model), calibration.windows
    seen = {}

    def watched(model, reference, windows, steps, seed):
        assert torch.equal(windows, calibration.tuning_windows) and (steps, seed) == (100, calibration.seed)
        assert (reference(tokens) - before(tokens)).abs().max() < 1e-4 * before(tokens).abs().max()
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
        for name, layer in layers.items():
            weight = reference.get_parameter(f"{name}.weight")
            assert (kernels.dequantize(layer.weight, torch.float32) - weight).norm() < 0.2 * weight.norm()
        assert len(layers) == 8
        seen["report"] = original(model, reference, windows, steps, seed=seed)
        seen["reference"] = reference
        return seen["report"]

    original = tune.tune
    monkeypatch.setattr(recipe.tune, "tune", watched)
    reports, notes = quantize(model, read_recipe(name), GROUP_SIZE, calibration, steps=100)
    assert seen["report"].codes_changed > 0 and notes[-1] == seen["report"].describe()
    for report in reports:  # of the codes as they are now
        weight = seen["reference"].get_parameter(f"{report.name}.weight")
        error = kernels.dequantize(model.get_submodule(report.name).weight, torch.float32) - weight
        assert report.relative_error == pytest.approx((error.norm() / weight.norm()).item())


def test_bad_input(model, calibration):
    with pytest.raises(ValueError, match=r"yaqa\+tune needs calibration text"):
        quantize(model, read_recipe("tune"), GROUP_SIZE)
    for name in ("mse", "awq+mse"):
        with pytest.raises(UserError, match="--group-size 32 does not fit"):
            quantize(model, read_recipe(name), 32, calibration)
