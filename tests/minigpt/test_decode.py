"""The decode step: prompts of unequal length in one batch, a step that feeds itself, and its capture on a GPU."""

import pytest
import torch
import transformers
from conftest import DEVICE

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.decode import DecodeStep, model_logits, read_behind, read_prompts
from minigpt.model import GPT, KVCache
from minigpt.sampling import GREEDY, Sampling

# n_embd, n_head, n_layer, vocab_size, n_positions: none a power of two, the last one with a cache longer than 64.
SHAPES = [(60, 3, 2, 101, 31), (100, 25, 1, 67, 45), (28, 7, 3, 50, 90)]
LENGTHS = (7, 1, 12)  # of the prompts in a batch


def pair(folder, shape):
    """The same random weights, in float64, as transformers' model and as ours."""
    n_embd, n_head, n_layer, vocab_size, n_positions = shape
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    reference = transformers.GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    reference.save_pretrained(folder)
    return reference.double(), checkpoint.load(folder, torch.float64)


def random_model(device="cpu", dtype=torch.float32):
    model = GPT(GPTConfig(vocab_size=101, n_positions=90, n_embd=60, n_layer=2, n_head=3))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(device, dtype).eval().requires_grad_(False)


def random_prompts(vocab_size, lengths=LENGTHS):
    return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_of_unequal_prompts_has_the_logits_of_each_alone(tmp_path, shape):
    """Against transformers without a cache, each sequence by itself, in float64."""
    reference, model = pair(tmp_path, shape)
    sequences = random_prompts(model.config.vocab_size)
    logits, cache = read_prompts(model, sequences, 15)
    step_logits = model_logits(model)
    with torch.no_grad():
        for _ in range(15):
            expected = [reference(torch.tensor([sequence])).logits[0, -1] for sequence in sequences]
            assert (logits - torch.stack(expected)).abs().max() < 1e-12
            tokens = logits.argmax(-1, keepdim=True)
            positions = torch.tensor([[len(sequence)] for sequence in sequences])
            logits = step_logits(tokens, positions, cache)
            for sequence, token in zip(sequences, tokens[:, 0].tolist(), strict=True):
                sequence.append(token)


def test_what_lies_behind_a_sequence_is_not_seen():
    """Whatever the cache holds there: with other garbage, the same logits to the last bit."""
    model, prompts = random_model(), random_prompts(101)
    logits = []
    for garbage in (0.0, 1000.0):
        _, cache = read_prompts(model, prompts, 5)
        for layer in (*cache.k, *cache.v):
            for row, prompt in enumerate(prompts):
                layer[row, :, len(prompt) :] = garbage
        tokens, positions = torch.tensor([[1], [2], [3]]), torch.tensor(LENGTHS)[:, None]
        logits.append(model_logits(model)(tokens, positions, cache))
    assert torch.equal(*logits)


def test_positions_of_any_shape_that_broadcasts():
    model, tokens = random_model(), torch.randint(101, (3, 4))
    logits = []
    for positions in (None, torch.arange(4), torch.arange(4)[None], torch.arange(4).repeat(3, 1)):
        cache = KVCache(model.config, 3, 10, torch.float32, torch.device("cpu"))
        logits.append(model(tokens, cache, positions))
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert (model(tokens) - logits[0]).abs().max() < 1e-5


def test_the_step_compiles_as_a_whole():
    """No graph break; and what the compiler makes of the writes to the cache is what they are."""
    model, prompts = random_model(), random_prompts(101)
    compiled = torch.compile(model_logits(model), fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, caches = torch.tensor([[1], [2], [3]]), [read_prompts(model, prompts, 5)[1] for _ in range(2)]
    with torch.inference_mode():
        for n in range(3):
            positions = torch.tensor(LENGTHS)[:, None] + n
            logits = [
                step(tokens, positions, cache)
                for step, cache in zip((model_logits(model), compiled), caches, strict=True)
            ]
            assert (logits[0] - logits[1]).abs().max() < 1e-5
    for before, after in zip(caches[0].v, caches[1].v, strict=True):
        assert (before - after).abs().max() < 1e-5


def test_a_step_feeds_itself():
    """Each step reads what the one before chose, a position further; what it was made with stays as it was."""
    seen = []

    def step_logits(tokens, positions, cache):
        seen.append((tokens.flatten().tolist(), positions.flatten().tolist()))
        return torch.nn.functional.one_hot((tokens[:, 0] * 2) % 11, 11).float()

    tokens, positions = torch.tensor([[1], [3]]), torch.tensor([[5], [2]])
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    cache = KVCache(config, 2, 8, torch.float32, torch.device("cpu"))
    step = DecodeStep(step_logits, GREEDY.choose, cache, tokens, positions)
    assert [step().flatten().tolist() for _ in range(3)] == [[2, 6], [4, 1], [8, 2]]
    assert seen == [([1, 3], [5, 2]), ([2, 6], [6, 3]), ([4, 1], [7, 4])]
    assert tokens.flatten().tolist() == [1, 3] and positions.flatten().tolist() == [5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_cpu_has_the_models_logits(dtype):
    """In bfloat16 attention goes another way, which differs by that format's rounding."""
    model = random_model(dtype=dtype)
    prompts = random_prompts(model.config.vocab_size)
    _, cache = read_prompts(model, prompts, 4)
    tokens = torch.randint(model.config.vocab_size, (len(prompts), 1))
    positions = torch.tensor([[len(prompt)] for prompt in prompts])
    seen = []
    step = DecodeStep(model_logits(model), lambda logits: seen.append(logits) or tokens, cache, tokens, positions)
    step()
    expected = torch.cat(
        [
            model.double()(torch.tensor([[*prompt, *new]]))[:, -1]
            for prompt, new in zip(prompts, tokens.tolist(), strict=True)
        ]
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert (seen[0].double() - expected).norm() <= tolerance * expected.norm()


def test_tokens_are_read_before_their_memory_is_used_again():
    memory = torch.zeros((2, 1), dtype=torch.int64, device=DEVICE)

    def steps():
        for _ in range(5):
            memory.add_(1)
            yield memory

    assert list(read_behind(steps())) == [[n, n] for n in range(1, 6)]
    assert list(read_behind([])) == []


def decode(model, prompts, n_steps, sampling, how):
    """Tokens of n_steps steps, int64 [n_steps, B], drawn with seed 5, and a number drawn afterwards."""
    logits, cache = read_prompts(model, prompts, n_steps)
    generator = torch.Generator(logits.device).manual_seed(5)
    positions = torch.tensor([[len(prompt)] for prompt in prompts], device=logits.device)
    step = DecodeStep(
        model_logits(model), lambda scores: sampling.choose(scores, generator), cache,
        sampling.choose(logits, generator), positions, how, generator,
    )  # fmt: skip
    tokens = torch.stack([step().flatten().clone() for _ in range(n_steps)])
    return tokens, torch.rand(1, device=logits.device, generator=generator)


SAMPLINGS = [GREEDY, Sampling(temperature=1.0), Sampling(temperature=0.9, top_k=20, top_p=0.9)]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(7,), LENGTHS], ids=len)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_captured_tokens_are_the_eager_ones(lengths, sampling):
    """Same seed, same text; and the generator has drawn as many numbers."""
    model, prompts = random_model("cuda", torch.float16), random_prompts(101, lengths)
    runs = [decode(model, prompts, 40, sampling, how) for how in ("eager", "captured")]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert len(runs[0][0].unique()) > 3  # not the same token all the time


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(7,), LENGTHS], ids=len)
def test_compiled_tokens_are_the_eager_ones(lengths):
    """In float32, where rounding otherwise does not make another token the best."""
    model, prompts = random_model("cuda"), random_prompts(101, lengths)
    eager, compiled = (decode(model, prompts, 40, GREEDY, how)[0] for how in ("eager", "compiled"))
    assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "captured"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_host_waits_for_no_step(how, sampling):
    """torch raises where it would synchronise; reading a step behind waits for an event only."""
    model, prompts = random_model("cuda", torch.float16), random_prompts(101)
    logits, cache = read_prompts(model, prompts, 20)
    generator = torch.Generator("cuda").manual_seed(0)
    choose = lambda scores: sampling.choose(scores, generator)  # noqa: E731
    positions = torch.tensor(LENGTHS, device="cuda")[:, None]
    step = DecodeStep(model_logits(model), choose, cache, choose(logits), positions, how, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = list(read_behind(step() for _ in range(20)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(tokens) == 20 and step.positions.flatten().tolist() == [length + 20 for length in LENGTHS]
