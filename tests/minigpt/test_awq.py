"""Activation-aware scaling: the function stays, the rounding error shrinks."""

import copy

import pytest
import torch

import kernels
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import awq
from minigpt.quantization.convert import WHOLE_ROW
from minigpt.quantization.rtn import METHODS

VOCABULARY = 71


@pytest.fixture
def model():
    """A random model in which some channels are far larger than others, as in trained ones."""
    model = GPT(GPTConfig(vocab_size=VOCABULARY, n_positions=24, n_embd=48, n_layer=2, n_head=3))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            parameter.data = torch.randn_like(parameter).exp()  # some inputs of the next layer are large
        elif name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
        else:
            parameter.data *= 5
    return model.eval().requires_grad_(False)


def text(n, length=24):
    return torch.randint(VOCABULARY, (n, length))


@pytest.mark.parametrize("kind", awq.SCALED)
def test_folding_is_exact(model, kind):
    """To float64's precision, whatever the factors."""
    model.double()
    before, tokens = copy.deepcopy(model), text(3)
    for block in model.h:
        awq.fold(block, kind, torch.randn(48, dtype=torch.float64).exp())
    assert not torch.equal(model.h[0].get_submodule(kind).weight, before.h[0].get_submodule(kind).weight)
    assert (model(tokens) - before(tokens)).abs().max() < 1e-12 * before(tokens).abs().max()


@pytest.mark.parametrize(("method", "group_size"), [("mse", 16), ("absmax", 48), ("minmax", WHOLE_ROW)])
def test_the_function_stays_the_same(model, method, group_size):
    before, tokens = copy.deepcopy(model), text(3)
    reports = awq.scale(model, text(11, 17), METHODS[method], group_size)
    assert any(report.alpha > 0 for report in reports)
    assert (model(tokens) - before(tokens)).abs().max() < 1e-4 * before(tokens).abs().max()


def test_reported_errors_are_those_of_the_layers_outputs(model):
    """Against inputs caught by hooks and multiplied out in float64, with the original and with the scaled weights.

    Not for c_attn: when its search is over, some of its rows are scaled once more, for c_proj.
    """
    before, windows = copy.deepcopy(model), text(11)
    reports = awq.scale(model, windows, METHODS["mse"], 48)
    assert [report.name for report in reports] == [f"h.{i}.{kind}" for i in range(2) for kind in awq.SCALED]
    for report in reports:
        for each, expected in ((before, report.error_before), (model, report.error_after)):
            layer, inputs = each.get_submodule(report.name), []
            hook = layer.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0].double()))
            each(windows)
            hook.remove()
            rounded = kernels.dequantize(METHODS["mse"](layer.weight, 48), torch.float32)
            error = inputs[0] @ (rounded - layer.weight).double().t()
            output = inputs[0] @ layer.weight.double().t()
            if "c_attn" not in report.name:
                assert (error.square().sum() / output.square().sum()).item() == pytest.approx(expected, rel=0.01)


def test_large_inputs_are_rounded_more_finely(model):
    """Of a layer that a few inputs dominate, the output's error shrinks by a good part."""
    model.h[0].ln_1.weight[:] = 0.05
    model.h[0].ln_1.weight[::16] = 5.0
    reports = awq.scale(model, text(11), METHODS["absmax"], 16)
    assert reports[0].name == "h.0.attn.c_attn" and reports[0].alpha > 0.2
    assert reports[0].error_after < 0.8 * reports[0].error_before
    assert all(report.error_after <= report.error_before for report in reports)


def test_dead_inputs_do_no_harm(model):
    model.h[0].ln_1.weight[3] = model.h[0].ln_1.bias[3] = 0.0
    before, tokens = copy.deepcopy(model), text(3)
    awq.scale(model, text(5), METHODS["minmax"], 16)
    assert torch.allclose(model(tokens), before(tokens), atol=1e-4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_inputs_that_are_not_finite_are_named(model):
    model.h[1].ln_2.bias[3] = float("inf")
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc has weights or inputs that are NaN or infinite"):
        awq.scale(model, text(5), METHODS["minmax"], 16)


def test_group_sizes_that_do_not_fit(model):
    with pytest.raises(UserError, match="--group-size 32 .*possible: 16, 48, row"):
        awq.scale(model, text(5), METHODS["minmax"], 32)
