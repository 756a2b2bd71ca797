"""The persistent decode step, on a CPU in plain torch and on a GPU: against the same model with dense weights."""

import copy
import gc

import pytest
import torch
from conftest import DEVICE
from test_fused_decode import check_steps, check_tokens, dense, make_model, mma, pretend, read  # noqa: F401

from minigpt.decode import DecodeStep, greedy_way
from minigpt.quantization.persistent_step import PersistentStep, persistent_step


@pytest.mark.parametrize(("n_embd", "length"), [(64, 3), (192, 9), (320, 140)])
def test_logits_and_tokens(n_embd, length):
    model = make_model(n_embd=n_embd, n_head=n_embd // 64)
    twin = dense(model)
    check_steps(PersistentStep(model), twin, read(model, twin, (length,)))


def test_one_object_for_caches_of_any_size():
    """Each has buffers of its own, for as long as it lives."""
    model = make_model()
    twin, step = dense(model), PersistentStep(model)
    for length, room in ((9, 20), (1, 140), (9, 20)):
        check_steps(step, twin, read(model, twin, (length,), room), n_steps=2)
    gc.collect()
    assert len(step.mail) == 0


def test_weights_are_there_once(monkeypatch):
    """The model's are views of what the kernel reads, and mean the same."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    pretend(monkeypatch, model)
    step = persistent_step(model, 1)
    assert isinstance(step, PersistentStep)
    for i, block in enumerate(model.h):
        pairs = ((block.attn.c_attn, step.layers.c_attn), (block.attn.c_proj, step.layers.attn_proj))
        for layer, linears in (*pairs, (block.mlp.c_fc, step.layers.c_fc), (block.mlp.c_proj, step.layers.mlp_proj)):
            assert layer.codes.data_ptr() == linears.codes[i].data_ptr()
            assert layer.scale_zeros.data_ptr() == linears.scale_zeros[i].data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whom_it_serves(monkeypatch):
    for n_head, group_size, batch_size in ((3, 64, 2), (6, 64, 1), (3, 32, 1), (3, -1, 1)):
        model = make_model(n_head=n_head, group_size=group_size)
        pretend(monkeypatch, model)
        assert persistent_step(model, batch_size) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="asks what happens without a GPU")
def test_none_on_a_cpu():
    assert persistent_step(make_model(), 1) is None


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "captured"])
@pytest.mark.parametrize("length", [1, 120, 900])
def test_fifty_tokens(mma, how, length):  # noqa: F811
    """Through the graph; at first there may be one part of the context, and then two."""
    model = make_model(n_positions=1024)
    twin, step = dense(model), persistent_step(model, 1)
    state = read(model, twin, (length,), 50)
    run = DecodeStep(*greedy_way(step), state[2], state[0], state[1], how)
    check_tokens(torch.stack([run()[:, 0].clone() for _ in range(50)]), twin, state)


@pytest.mark.gpu
def test_captured_steps_are_the_eager_ones(mma):  # noqa: F811
    """To the last bit, whoever is done first; and again from an earlier position, with fewer parts than before."""
    model = make_model(n_positions=1024)
    step = persistent_step(model, 1)
    start, positions, cache, _ = read(model, dense(model), (300,), 100)
    runs = []
    for how in ("eager", "captured"):
        run = DecodeStep(*greedy_way(step), copy.deepcopy(cache), start, positions, how)
        for _ in range(2):
            run.tokens.copy_(start)
            run.positions.copy_(positions)
            runs.append(torch.stack([run()[:, 0].clone() for _ in range(100)]))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("n_embd", [768, 1024, 1280, 1600])
def test_gpt2s_sizes(mma, n_embd):  # noqa: F811
    model = make_model(n_embd=n_embd, n_head=n_embd // 64)
    twin = dense(model)
    check_steps(persistent_step(model, 1), twin, read(model, twin, (129,)), n_steps=3)
