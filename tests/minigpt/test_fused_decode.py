"""The fused decode step, on a CPU in plain torch and on a GPU: against the same model with dense weights in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE

import kernels
from kernels import PreparedWeight
from kernels.stream import next_power_of_2, part_length
from minigpt.config import GPTConfig
from minigpt.decode import DecodeStep, greedy_way, model_logits, read_prompts
from minigpt.model import GPT, KVCache
from minigpt.quantization.convert import quantize_model
from minigpt.quantization.embedding import CHOICES, Int4Embedding, Int8Embedding, quantize_embedding
from minigpt.quantization.fused_decode import FusedStep, fused_step
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.rtn import minmax
from minigpt.sampling import GREEDY

LIMIT = 5e-3  # relative error of logits after a few layers in fp16; a step that is wrong is off by about 1
BATCHES = {1: (9,), 3: (7, 1, 140), 8: (3, 1, 12, 7, 127, 128, 129, 64)}  # how long the prompts are


def make_model(embedding="int8", n_embd=192, n_head=3, n_positions=150, group_size=64, device=DEVICE):
    """An int4 model in fp16 with random weights, large enough that its logits differ from token to token."""
    model = GPT(GPTConfig(vocab_size=101, n_positions=n_positions, n_embd=n_embd, n_layer=2, n_head=n_head))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 1.4 / n_embd**0.5 * torch.randn_like(parameter)
    model.to(device).eval().requires_grad_(False)
    list(quantize_model(model, minmax, group_size))
    quantize_embedding(model, embedding, group_size)
    return model.half()


def dense(model):
    """The same model with nothing packed, in float64."""
    twin = GPT(model.config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in twin.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, (Int4Linear, Int4Embedding)):
            state[f"{name}.weight"] = kernels.dequantize(module.weight, torch.float32)
        elif isinstance(module, Int8Embedding):
            state[f"{name}.weight"] = kernels.dequantize_int8(module.weight, torch.float32)
    state["lm_head.weight"] = state["wte.weight"]
    twin.double().load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return twin.to(model.wpe.weight.device).eval().requires_grad_(False)


def read(model, twin, lengths, room=20):
    """Reads random prompts with a model: the next tokens, their positions, and the caches of both, which are equal."""
    prompts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in lengths]
    logits, cache64 = read_prompts(twin, prompts, room)
    cache = copy.copy(cache64)
    cache.k, cache.v = ([layer.half() for layer in layers] for layers in (cache64.k, cache64.v))
    tokens = logits.argmax(1, keepdim=True)
    return tokens, torch.tensor(lengths, device=tokens.device)[:, None], cache, cache64


def relative_error(out, expected):
    return ((out.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def check_steps(step, twin, state, n_steps=6):
    """Some steps, each sequence from its own position on: logits, the likeliest token, and what is in the cache."""
    tokens, positions, cache, cache64 = state
    for _ in range(n_steps):
        expected = model_logits(twin)(tokens, positions, cache64)
        before = copy.deepcopy(cache)
        logits = step(tokens, positions, cache)
        assert logits.dtype == torch.float16 and logits.shape == expected.shape
        assert relative_error(logits, expected) < LIMIT
        assert torch.equal(step.greedy(tokens, positions, before), logits.argmax(1, keepdim=True))
        for ours, reference in zip((*cache.k, *cache.v), (*cache64.k, *cache64.v), strict=True):
            assert torch.allclose(ours.double(), reference, rtol=0.02, atol=0.02)
        tokens, positions = expected.argmax(1, keepdim=True), positions + 1


# ---- the step, on whatever there is


@pytest.mark.parametrize("embedding", CHOICES)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_logits_and_tokens(embedding, batch_size):
    model = make_model(embedding)
    twin = dense(model)
    check_steps(FusedStep(model), twin, read(model, twin, BATCHES[batch_size]))


@pytest.mark.parametrize(("n_embd", "n_head"), [(64, 1), (192, 64), (320, 5), (128, 8)])
def test_heads_of_any_size(n_embd, n_head):
    model = make_model(n_embd=n_embd, n_head=n_head)
    twin = dense(model)
    check_steps(FusedStep(model), twin, read(model, twin, (5, 130)), n_steps=3)


@pytest.mark.parametrize("group_size", [192, -1])
def test_groups_of_any_size(group_size):
    model = make_model("int4", group_size=group_size)
    twin = dense(model)
    check_steps(FusedStep(model), twin, read(model, twin, (5, 1)), n_steps=3)


def test_one_object_for_batches_and_caches_of_any_size():
    """Each time it sees another batch or cache; and the same as before afterwards."""
    model = make_model()
    twin, step = dense(model), FusedStep(model)
    for lengths, room in (((9,), 20), ((1, 5, 3), 100), ((9,), 300), ((2,), 20), ((140, 3, 7), 10), ((9,), 20)):
        state = read(model, twin, lengths, room)
        check_steps(step, twin, state, n_steps=2)
        length = state[2].k[0].shape[2]
        parts = -(-length // part_length(len(state[0]), length))
        assert step.parts[len(state[0]), length].logs.shape[2] == next_power_of_2(parts)


def test_up_to_the_last_position():
    model = make_model()
    twin, step = dense(model), FusedStep(model)
    tokens, _, cache, cache64 = read(model, twin, (149, 3))
    assert cache.k[0].shape[2] == model.config.n_positions == 150
    check_steps(step, twin, (tokens, torch.tensor([[149], [3]], device=DEVICE), cache, cache64), n_steps=1)
    cache, cache64 = (KVCache(model.config, 2, 150, dtype, DEVICE) for dtype in (torch.float16, torch.float64))
    first = torch.zeros((2, 1), dtype=torch.int64, device=DEVICE)
    check_steps(step, twin, (tokens, first, cache, cache64), n_steps=3)  # position 0: nothing in the cache


def test_no_further_off_than_the_plain_layers():
    """Those round the residual stream to fp16 after each sum, and what a norm makes of it."""
    model = make_model()
    twin = dense(model)
    tokens, positions, cache, cache64 = read(model, twin, BATCHES[8])
    expected = model_logits(twin)(tokens, positions, cache64)
    plain = model_logits(model)(tokens, positions, copy.deepcopy(cache))
    fused = FusedStep(model)(tokens, positions, cache)
    assert relative_error(fused, expected) < 1.5 * relative_error(plain, expected)


# ---- where it serves


def pretend(monkeypatch, model):
    """Makes a model on a CPU look as if a GPU held it."""
    for module in model.modules():
        if isinstance(module, Int4Linear) and not isinstance(module.held, PreparedWeight):
            module.hold(kernels.prepare(module.weight))
    monkeypatch.setattr(kernels, "can_fuse", lambda weight, dtype, tokens: tokens <= 8 and weight.group_size % 64 == 0)


def test_whom_it_serves(monkeypatch):
    model = make_model()
    pretend(monkeypatch, model)
    assert isinstance(fused_step(model, 1), FusedStep) and isinstance(fused_step(model, 8), FusedStep)
    assert fused_step(model, 9) is None
    narrow = make_model(group_size=32)
    pretend(monkeypatch, narrow)
    assert fused_step(narrow, 1) is None
    odd = make_model(n_embd=96, n_head=3, group_size=96)
    pretend(monkeypatch, odd)
    monkeypatch.setattr(kernels, "can_fuse", lambda *_: True)
    assert fused_step(odd, 1) is None
    assert fused_step(dense(model).half(), 1) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="asks what happens without a GPU")
@pytest.mark.parametrize("embedding", CHOICES)
def test_no_fused_step_on_a_cpu(embedding):
    assert fused_step(make_model(embedding), 1) is None


def test_which_weights_the_kernels_take(monkeypatch):
    """In fp16, on a GPU that has mma.sync and room for the tokens, with groups of whole blocks."""
    common = pytest.importorskip("kernels.common", reason="Triton is for Linux only")
    monkeypatch.setattr(common, "has_mma", lambda device: device != "old")
    monkeypatch.setattr(common, "shared_memory", lambda device: {"new": 227, "small": 99}[device] * 1024)

    def fits(tokens=1, dtype=torch.float16, device="new", is_cuda=True, k=768, group_size=64):
        codes = SimpleNamespace(device=device, is_cuda=is_cuda, shape=(48, k // 64, 16, 16))
        return kernels.can_fuse(PreparedWeight(codes, None, None, k, group_size), dtype, tokens)

    assert fits() and fits(8) and fits(group_size=192) and fits(8, k=8192)
    assert not fits(9) and not fits(dtype=torch.bfloat16) and not fits(dtype=torch.float32)
    assert not fits(device="old") and not fits(is_cuda=False)
    assert not fits(group_size=32) and not fits(group_size=96) and not fits(k=16384)
    assert fits(8, device="small", k=4096) and fits(1, device="small", k=6400)
    assert not fits(2, device="small", k=6400)


# ---- on a GPU


@pytest.fixture
def mma():
    from kernels import common

    if not common.has_mma(DEVICE):
        pytest.skip("needs an NVIDIA GPU of sm_80 or newer")


def check_tokens(tokens, twin, state):
    """Each token is the likeliest after those before it, or as good as that within what rounding does to logits."""
    last, positions, _, cache64 = state
    for chosen in tokens:  # [B]
        expected = model_logits(twin)(last, positions, cache64)
        missed = expected.amax(1) - expected.gather(1, chosen[:, None])[:, 0]
        assert (missed <= 2 * LIMIT * expected.abs().amax(1)).all()
        last, positions = chosen[:, None], positions + 1
    assert len(tokens.unique()) > 3  # not the same one all the time


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "captured"])
@pytest.mark.parametrize("embedding", CHOICES)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_fifty_tokens(mma, how, embedding, batch_size):
    """Through the graph as the text is written with: the likeliest tokens, by either way to them."""
    model = make_model(embedding, n_positions=200)
    twin, step = dense(model), fused_step(model, batch_size)
    for way in (greedy_way(step), (step, GREEDY.choose)):
        state = read(model, twin, BATCHES[batch_size], 50)
        run = DecodeStep(*way, state[2], state[0], state[1], how)
        check_tokens(torch.stack([run()[:, 0].clone() for _ in range(50)]), twin, state)
        assert torch.equal(run.positions, state[1] + 50)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", BATCHES)
def test_captured_steps_are_the_eager_ones(mma, batch_size):
    """To the last bit, as nothing is added up in an order that changes; and again in a second run."""
    model = make_model(n_positions=200)
    step = fused_step(model, batch_size)
    start, positions, cache, _ = read(model, dense(model), BATCHES[batch_size], 50)
    runs = []
    for how in ("eager", "captured", "captured"):
        run = DecodeStep(*greedy_way(step), copy.deepcopy(cache), start, positions, how)
        runs.append(torch.stack([run()[:, 0].clone() for _ in range(50)]))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])


@pytest.mark.gpu
def test_two_captured_steps_of_one_object(mma):
    """In turn; each has what it was captured with."""
    model = make_model(n_positions=300)
    twin, step = dense(model), fused_step(model, 3)
    states = [read(model, twin, lengths, 40) for lengths in ((9,), (7, 1, 140), (200,))]
    runs = [DecodeStep(*greedy_way(step), state[2], state[0], state[1]) for state in states]
    turns = [[run()[:, 0].clone() for run in runs] for _ in range(30)]
    for state, tokens in zip(states, zip(*turns, strict=True), strict=True):
        check_tokens(torch.stack(tokens), twin, state)


@pytest.mark.gpu
@pytest.mark.parametrize("n_embd", [768, 1024, 1280, 1600])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_gpt2s_sizes(mma, n_embd, batch_size):
    model = make_model(n_embd=n_embd, n_head=n_embd // 64)
    twin = dense(model)
    check_steps(fused_step(model, batch_size), twin, read(model, twin, BATCHES[batch_size]), n_steps=3)
