"""Choosing tokens, and the errors of generation."""

import pytest
import torch

from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.generate import choose_token, generate
from minigpt.model import GPT


@pytest.fixture
def model():
    model = GPT(GPTConfig(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model.init_weights()
    return model.eval()


def test_temperature_zero_takes_the_best():
    logits = torch.randn(5, 100)
    assert torch.equal(choose_token(logits)[:, 0], logits.argmax(-1))


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20000, 1)
    counts = choose_token(logits, temperature=2.0).flatten().bincount(minlength=3)
    expected = (torch.tensor([0.0, 1.0, 2.0]) / 2).softmax(0)
    assert torch.allclose(counts / 20000, expected, atol=0.02)


def test_top_k_leaves_the_k_best():
    logits = torch.randn(1, 50)
    best = set(logits.topk(3).indices[0].tolist())
    drawn = {choose_token(logits, temperature=5.0, top_k=3).item() for _ in range(200)}
    assert drawn == best


def test_a_tiny_temperature_takes_the_best():
    logits = torch.randn(5, 100)
    for temperature in (1e-6, 1e-45, 5e-324):
        assert torch.equal(choose_token(logits, temperature)[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_of_the_vocabulary_is_never_chosen(model, temperature):
    model.lm_head.weight.data[20:] *= 1000  # without a limit these win, half of them
    tokens = [int(t) for t in generate(model, torch.tensor([[1, 2]]), 14, temperature, n_vocab=20)]
    assert len(tokens) == 14 and max(tokens) < 20


def test_the_same_seed_gives_the_same_tokens(model):
    prompt = torch.tensor([[1, 2, 3]])
    runs = [
        [int(t) for t in generate(model, prompt, 10, 1.0, generator=torch.Generator().manual_seed(seed))]
        for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_what_does_not_fit_is_said(model):
    with pytest.raises(UserError, match="empty"):
        next(generate(model, torch.zeros((1, 0), dtype=torch.int64), 3))
    with pytest.raises(UserError, match="10 tokens and 7 new ones exceed the model's 16"):
        next(generate(model, torch.zeros((1, 10), dtype=torch.int64), 7))
    for options, message in [
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            next(generate(model, torch.zeros((1, 3), dtype=torch.int64), 2, **options))
    with pytest.raises(UserError, match="--max-new-tokens is -1"):
        next(generate(model, torch.zeros((1, 3), dtype=torch.int64), -1))
    assert len(list(generate(model, torch.zeros((1, 10), dtype=torch.int64), 6))) == 6
