"""Fisher information against the divergence that it foretells."""

import pytest
import torch

from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization.convert import block_linears
from minigpt.quantization.fisher import fisher

LENGTH, WIDTH = 5, 16


@pytest.fixture
def model():
    """A small random model with weights large enough that its predictions differ from place to place."""
    model = GPT(GPTConfig(vocab_size=19, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2))
    model.init_weights()
    for name, parameter in model.named_parameters():
        parameter.data *= 1 if "ln_" in name else 8
    return model.eval()


@torch.no_grad()
def divergence(model, tokens, layer, change):
    """KL(p || p') in float64, summed over a window and averaged over which of its tokens sees the layer changed."""
    model, change = model.double(), change.double()
    log_p = model(tokens[None])[0].log_softmax(-1)
    total = 0.0
    for position in range(LENGTH):

        def add(_, __, output, position=position):
            output[:, position] += change
            return output

        hook = layer.register_forward_hook(add)
        log_q = model(tokens[None])[0].log_softmax(-1)
        hook.remove()
        total += (log_p.exp() * (log_p - log_q)).sum().item() / LENGTH
    model.float()
    return total


def test_it_foretells_what_a_change_of_a_layers_outputs_does_to_predictions(model):
    layers = dict(block_linears(model))
    tokens = torch.randint(19, (LENGTH,))
    informations = fisher(model, layers, tokens.repeat(1500, 1))
    assert list(informations) == list(layers) and len(layers) == 8
    for name, information in informations.items():
        layer = layers[name]
        assert information.dtype == torch.float32 and information.shape == (layer.out_features,) * 2
        spread, directions = torch.linalg.eigh(information)
        for direction in (directions[:, -1], torch.randn(layer.out_features)):
            foretold = 0.5 * direction @ information @ direction
            change = direction * (1e-5 / foretold).sqrt()
            assert divergence(model, tokens, layer, change) == pytest.approx(1e-5, rel=0.15), name
        assert spread[0] > -1e-4 * spread[-1]


def test_the_model_stays_as_it_was(model):
    model.requires_grad_(False)
    model.h[0].requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    fisher(model, dict(block_linears(model)), torch.randint(19, (2, LENGTH)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_seed_gives_the_same(model):
    layers, windows = dict(block_linears(model)), torch.randint(19, (3, LENGTH))
    first, again, other = (fisher(model, layers, windows, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in layers)


@pytest.mark.parametrize(
    ("weight", "factor", "message"),
    [
        ("h.1.mlp.c_fc.weight", 1e39, "the outputs of layer h.1.mlp.c_fc are NaN or infinite"),
        ("ln_f.weight", 1e39, "the model's predictions are NaN"),
    ],
)
def test_what_is_not_finite_is_an_error_that_says_where(model, weight, factor, message):
    model.get_parameter(weight).data *= factor
    with pytest.raises(UserError, match=message):
        fisher(model, dict(block_linears(model)), torch.randint(19, (1, LENGTH)))


def test_derivatives_that_are_not_finite_are_an_error_that_names_a_layer(model):
    def overflow(_, __, output):
        output.register_hook(lambda gradient: gradient * 1e38 * 1e38)

    model.h[1].mlp.c_fc.register_forward_hook(overflow)
    with pytest.raises(UserError, match=r"derivatives by the outputs of layer h\.0\.attn\.c_attn are NaN or infinite"):
        fisher(model, dict(block_linears(model)), torch.randint(19, (1, LENGTH)))
