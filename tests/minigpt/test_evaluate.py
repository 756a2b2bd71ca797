"""The perplexity protocol, against the loop that Hugging Face documents, with transformers' own model and loss."""

import copy
import math
import sys

import pytest
import torch
import transformers

from minigpt import checkpoint, evaluate, scoring
from minigpt.errors import UserError
from minigpt.quantization.convert import quantize_model
from minigpt.quantization.embedding import quantize_embedding
from minigpt.quantization.methods import METHODS


def huggingface_perplexity(model, tokens, context_length, stride):
    """The strided loop: labels of tokens that an earlier window scored are masked; sums in float64."""
    nats, scored, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context_length, len(tokens))
        window = tokens[None, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        n_scored = (labels[:, 1:] != -100).sum().item()
        if n_scored:
            with torch.no_grad():
                nats += model(window, labels=labels).loss.double().item() * n_scored
            scored += n_scored
        previous_end = end
        if end == len(tokens):
            break
    return math.exp(nats / scored), scored


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    reference.save_pretrained(folder)
    return reference, checkpoint.load(folder, torch.float32)


@pytest.mark.parametrize("n_tokens", [2, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize(("context_length", "stride"), [(32, 32), (32, 16), (32, 7), (20, 20), (20, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_that_of_the_documented_loop(pair, n_tokens, context_length, stride, batch_size):
    reference, ours = pair
    tokens = torch.randint(97, (n_tokens,))
    score = evaluate.perplexity(ours, tokens, context_length, stride, batch_size)
    expected, scored = huggingface_perplexity(reference, tokens, context_length, stride)
    assert score.tokens_scored == scored
    assert score.perplexity == pytest.approx(expected, rel=1e-5)


def divergence_and_agreement(p_model, q_model, tokens, context_length, stride):
    """KL(p || q) and top-1 agreement by their definitions, in float64, from transformers' logits."""
    kl, same, previous_end = [], [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context_length, len(tokens))
        window = tokens[None, begin:end]
        with torch.no_grad():
            p, q = (m(window).logits[0, :-1].double().softmax(-1) for m in (p_model, q_model))  # [T - 1, V]
        new = min(end - previous_end, end - begin - 1)  # the tokens that this window scores are its last
        if new:
            kl += (p * (p / q).log()).sum(-1)[-new:].tolist()
            same += (p.argmax(-1) == q.argmax(-1))[-new:].tolist()
        previous_end = end
        if end == len(tokens):
            break
    return sum(kl) / len(kl), sum(same) / len(same)


@pytest.mark.parametrize("n_tokens", [2, 33, 65, 200])
@pytest.mark.parametrize(("context_length", "stride"), [(32, 32), (32, 7), (20, 1)])
@pytest.mark.parametrize("rows", [128, 10**6])
def test_divergence_is_its_definition(pair, tmp_path, monkeypatch, n_tokens, context_length, stride, rows):
    """Against transformers' logits of two different models; whether all tokens' logits are computed at once or not."""
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", {"cpu": rows * 97})
    reference, ours = pair
    other = copy.deepcopy(reference)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path)
    tokens = torch.randint(97, (n_tokens,))
    changed = checkpoint.load(tmp_path, torch.float32)
    score = evaluate.perplexity(changed, tokens, context_length, stride, batch_size=9, reference=ours)
    kl, top1 = divergence_and_agreement(reference, other, tokens, context_length, stride)
    assert score.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert score.top1 == pytest.approx(top1)
    alone = evaluate.perplexity(changed, tokens, context_length, stride, batch_size=9)
    assert alone.perplexity == pytest.approx(score.perplexity, rel=1e-12) and alone.kl is None and alone.top1 is None


def test_a_model_does_not_diverge_from_itself(pair):
    _, ours = pair
    score = evaluate.perplexity(ours, torch.randint(97, (100,)), 32, 32, 2, reference=copy.deepcopy(ours))
    assert score.kl == 0 and score.top1 == 1


def test_what_a_text_scores_does_not_depend_on_how_much_is_read_at_once(pair):
    """Not even with groups that torch's int4 kernel for CPUs takes, which would round few tokens to bfloat16."""
    model = copy.deepcopy(pair[1])
    list(quantize_model(model, METHODS["mse"], 32))
    tokens = torch.randint(97, (300,))
    at_once, one_by_one = (evaluate.perplexity(model, tokens, 32, 32, batch, reference=pair[1]) for batch in (9, 1))
    assert at_once.kl == pytest.approx(one_by_one.kl, rel=1e-4) and at_once.kl > 1e-4
    assert at_once.nats == pytest.approx(one_by_one.nats, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 64, 97])
def test_rows_that_are_added_change_no_probability(rows):
    weight, hidden = torch.randn(rows, 16), torch.randn(5, 16)
    aligned, bias = scoring.align(weight)
    assert len(aligned) == len(bias) == -(-rows // 64) * 64
    logits = torch.nn.functional.linear(hidden, aligned, bias).log_softmax(-1)
    torch.testing.assert_close(logits[:, :rows], (hidden @ weight.t()).log_softmax(-1))
    assert (logits[:, rows:] == -math.inf).all()


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-4),
        ("cpu", torch.bfloat16, 1e-2),
        pytest.param("cuda", torch.float16, 1e-3, marks=pytest.mark.gpu),
    ],
)
def test_scores_of_a_batch(pair, embedding, device, dtype, tolerance):
    """Batch after batch, of two shapes in turn, against logits made at once; the reference is the model before.

    On a GPU the first one of a shape runs, the second one is recorded, and the others are replayed.
    """
    reference = copy.deepcopy(pair[1]).to(device, dtype)
    model = copy.deepcopy(reference)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    quantize_embedding(model, embedding, 16)
    scorer = scoring.Scorer(model, reference)
    for _ in range(4):
        for length, skip in ((32, 1), (20, 7)):
            batch = torch.randint(97, (3, length), device=device)
            log_q, log_p = (m(batch)[:, skip - 1 : -1].double().log_softmax(-1) for m in (model, reference))
            expected = [
                -log_q.gather(2, batch[:, skip:, None]).sum().item(),
                (log_p.exp() * (log_p - log_q)).sum().item(),
                (log_p.argmax(-1) == log_q.argmax(-1)).sum().item(),
            ]
            nats, kl, agreements = scorer(batch, skip).tolist()
            assert nats == pytest.approx(expected[0], rel=tolerance)
            assert kl == pytest.approx(expected[1], rel=20 * tolerance)
            assert abs(agreements - expected[2]) <= 2  # a tie may fall either way
    assert all(scorer.recorded.values()) == (device == "cuda")


def test_every_token_is_scored_once():
    """With any stride, windows score each token at most once, and leave out only those that begin a window."""
    for n_tokens in (2, 50, 64, 65, 129):
        for context_length, stride in [(16, 16), (16, 5), (2, 1), (16, 15)]:
            scored = [
                t for _, end, first in evaluate.windows(n_tokens, context_length, stride) for t in range(first, end)
            ]
            assert len(scored) == len(set(scored))
            if stride < context_length:
                assert scored == list(range(1, n_tokens))
            else:
                assert set(range(n_tokens)) - set(scored) == set(range(0, n_tokens, stride))


def test_what_cannot_be_scored_is_said(pair):
    _, ours = pair
    tokens = torch.randint(97, (50,))
    for context_length, stride, message in [
        (33, 33, "--context-length is 33, it must be from 2 to 32"),
        (1, 1, "--context-length is 1"),
        (16, 17, "--stride is 17, it must be from 1 to the context length 16"),
        (16, 0, "--stride is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate.perplexity(ours, tokens, context_length, stride)
    with pytest.raises(UserError, match="too few"):
        evaluate.perplexity(ours, tokens[:1], 32, 32)


def test_rates_are_tokens_over_time(pair, monkeypatch):
    """With a clock that advances 0.5 s a reading: each timed call reads it twice, so it takes 0.5 s."""
    _, ours = pair
    clock = iter(range(10**6))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock) * 0.5)
    tokens = torch.randint(97, (32,))
    assert evaluate.prefill_rate(ours, tokens, 32) == 32 / 0.5
    assert evaluate.prefill_rate(ours, tokens, 10, batch_size=3) == 30 / 0.5
    assert evaluate.scoring_rate(ours, tokens, 16, 3) == 3 * 16 / 0.5
    assert evaluate.decode_rate(ours, tokens, 8, 20) == 1 / 0.5
    assert evaluate.decode_rate(ours, tokens, 31, 1, batch_size=5) == 5 / 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about the memory of the process, not of a GPU")
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_sees_an_allocation_that_is_gone():
    memory = evaluate.PeakMemory(torch.device("cpu"))
    before = memory.read()
    torch.ones(50_000_000)  # 200 MB
    assert memory.read() - before > 150e6
    assert evaluate.PeakMemory(torch.device("cpu")).read() - before < 100e6
