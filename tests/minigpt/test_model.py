"""Our GPT-2 against transformers' GPT2LMHeadModel: the same weights must give the same logits and the same tokens."""

import pytest
import torch
import transformers

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.generate import generate
from minigpt.model import GPT, KVCache

# n_embd, n_head, n_layer, vocab_size, n_positions: odd head counts, XL's 25 heads, sizes that are no powers of two.
SHAPES = [(48, 3, 2, 101, 32), (100, 25, 2, 67, 40), (64, 1, 3, 300, 16), (112, 7, 1, 50, 64)]


def reference_model(n_embd, n_head, n_layer, vocab_size, n_positions):
    """A random GPT-2 of transformers', with biases and gains that are not just 0 and 1."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=SHAPES, ids=str)
def pair(request, tmp_path):
    """The same weights as transformers' model and as ours, by way of files that transformers wrote."""
    reference = reference_model(*request.param)
    reference.save_pretrained(tmp_path)
    return reference, checkpoint.load(tmp_path, torch.float32)


def test_logits_are_those_of_transformers(pair):
    reference, ours = pair
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.n_positions))
    with torch.no_grad():
        expected = reference(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("step", [1, 5])
def test_cached_logits_are_those_of_transformers(pair, step):
    """Reading a sequence a few tokens at a time through the cache, which is longer than the sequence."""
    reference, ours = pair
    tokens = torch.randint(ours.config.vocab_size, (2, 16))
    cache = KVCache(ours.config, 2, 16, torch.float32, torch.device("cpu"))
    parts = []
    with torch.no_grad():
        for begin in range(0, 15, step):
            positions = torch.arange(begin, min(begin + step, 15))
            parts.append(ours(tokens[:, positions], cache, positions))
        expected = reference(tokens[:, :15]).logits
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-4


def test_greedy_tokens_are_those_of_transformers(pair):
    reference, ours = pair
    prompt = torch.randint(ours.config.vocab_size, (2, 4))
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    new = torch.tensor(list(generate(ours, prompt.tolist(), 12))).T  # [B, 12]
    assert torch.equal(torch.cat([prompt, new], dim=1), expected)


def test_output_layer_is_tied_to_the_embedding():
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    assert model.lm_head.weight is model.wte.weight


def test_initialisation_is_gpt2s():
    """N(0, 0.02), the projections into the residual stream smaller by sqrt(2 n_layer); an untrained model guesses."""
    model = GPT(GPTConfig(vocab_size=512, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    model.init_weights()
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].attn.c_proj.bias.abs().max() == 0 and (model.ln_f.weight == 1).all()
    tokens = torch.randint(512, (4, 64))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(512.0).log().item(), rel=0.05)


def test_dropout_only_while_training():
    model = GPT(GPTConfig(vocab_size=31, n_positions=8, n_embd=16, n_layer=1, n_head=2, dropout=0.5))
    model.init_weights()
    tokens = torch.randint(31, (1, 8))
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
