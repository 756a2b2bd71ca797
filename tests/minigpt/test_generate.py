"""Choosing tokens, generating, showing text as it comes, and the command line."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import DEVICE, ROOT

from minigpt import checkpoint
from minigpt import generate as generate_script
from minigpt.config import GPTConfig
from minigpt.device import arithmetic_dtype
from minigpt.errors import UserError, run_script
from minigpt.generate import TextStream, generate
from minigpt.model import GPT
from minigpt.quantization import gptq_format
from minigpt.quantization.convert import quantize_model
from minigpt.quantization.methods import METHODS
from minigpt.sampling import Sampling, draw
from minigpt.tokenizer import encode, gpt2_tokenizer, read_tokenizer

DEMO_TOKENIZER = checkpoint.DEMO_FOLDER / "tokenizer.tiktoken"


def random_model(**shape):
    model = GPT(GPTConfig(**({"vocab_size": 31, "n_positions": 16, "n_embd": 60, "n_layer": 2, "n_head": 3} | shape)))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(DEVICE).eval()


@pytest.fixture
def model():
    return random_model()


class TestSampling:
    def test_temperature_zero_takes_the_best(self):
        logits = torch.randn(5, 100)
        assert torch.equal(Sampling().choose(logits)[:, 0], logits.argmax(-1))

    def test_a_tiny_temperature_takes_the_best(self):
        logits = torch.randn(5, 100)
        for temperature in (1e-6, 1e-45, 5e-324):
            assert torch.equal(Sampling(temperature).choose(logits)[:, 0], logits.argmax(-1))

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("top_k", [None, 1, 3, 40, 1000])
    @pytest.mark.parametrize("top_p", [None, 1e-300, 1e-9, 0.37, 0.9, 1.0])
    def test_probabilities_are_those_worked_out_a_token_at_a_time(self, temperature, top_k, top_p):
        logits = torch.randn(4, 101, dtype=torch.float64)
        probabilities = Sampling(temperature, top_k, top_p).probabilities(logits)
        for row, result in zip(logits.numpy(), probabilities.numpy(), strict=True):
            weights = np.exp(row / temperature)
            best_first = np.argsort(-row)[:top_k]
            taken, mass = [], 0.0
            for token in best_first:
                if top_p is not None and mass >= top_p * weights[best_first].sum():
                    break
                taken.append(token)
                mass += weights[token]
            expected = np.zeros_like(row)
            expected[taken] = weights[taken] / mass
            if top_p != 1.0:  # there rounding may leave out a token as unlikely as 1e-16
                assert set(np.flatnonzero(result)) == set(taken)
            np.testing.assert_allclose(result, expected, atol=1e-14)

    def test_ties_are_taken_together(self):
        logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
        assert torch.equal(Sampling(1.0, top_k=1).probabilities(logits), torch.tensor([[0.0, 0.5, 0.5, 0.0]]))
        assert torch.equal(Sampling(1.0, top_p=0.1).probabilities(logits), torch.tensor([[0.0, 0.5, 0.5, 0.0]]))

    def test_half_precision_is_computed_in_single(self):
        logits = torch.randn(2, 1000, dtype=torch.float16)
        probabilities = Sampling(0.7, top_p=0.95).probabilities(logits)
        assert probabilities.dtype == torch.float32
        assert torch.equal(probabilities, Sampling(0.7, top_p=0.95).probabilities(logits.float()))

    def test_draws_come_as_often_as_they_are_probable(self):
        probabilities = torch.tensor([0.0, 0.1, 0.2, 0.7])
        counts = draw(probabilities.repeat(40000, 1)).flatten().bincount(minlength=4)
        assert torch.allclose(counts / 40000, probabilities, atol=0.01) and counts[0] == 0

    def test_what_is_out_of_range_is_said(self):
        for options, message in [
            ({"temperature": -1.0}, "--temperature is -1.0"),
            ({"temperature": float("nan")}, "--temperature is nan"),
            ({"temperature": 1.0, "top_k": 0}, "--top-k is 0"),
            ({"temperature": 1.0, "top_p": 0.0}, "--top-p is 0.0"),
            ({"temperature": 1.0, "top_p": 1.5}, "--top-p is 1.5"),
            ({"temperature": 1.0, "top_p": float("nan")}, "--top-p is nan"),
        ]:
            with pytest.raises(UserError, match=message):
                Sampling(**options)


def tokens_of(model, prompt, *arguments, **options):
    """The new tokens of one prompt."""
    return [step[0] for step in generate(model, [prompt], *arguments, **options)]


class TestGenerate:
    def test_unequal_prompts_are_continued_as_each_alone(self, tmp_path):
        """And as transformers continues each alone; sequences end where the model can read no more."""
        config = transformers.GPT2Config(
            vocab_size=83, n_positions=30, n_embd=60, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
        )
        reference = transformers.GPT2LMHeadModel(config).eval()
        for parameter in reference.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        reference.save_pretrained(tmp_path)
        model = checkpoint.load(tmp_path, torch.float32, DEVICE)
        prompts = [torch.randint(83, (length,)).tolist() for length in (4, 29, 1, 17, 10)]
        steps = list(generate(model, prompts, 20))
        assert len(steps) == 20
        for row, prompt in enumerate(prompts):
            n_new = min(20, 30 - len(prompt))
            column = [step[row] for step in steps]
            expected = reference.generate(
                torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt))), max_new_tokens=n_new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            assert column == expected[0, len(prompt) :].tolist() + [None] * (20 - n_new)
            assert tokens_of(model, prompt, 20) == column[:n_new]

    def test_a_stop_token_ends_its_sequence_and_the_last_one_all(self, model):
        prompts = [[1, 2, 3], [4], [5, 6]]
        free = list(zip(*generate(model, prompts, 12, Sampling(1.0), seed=3), strict=True))
        stop = free[0][5]
        expected = []
        for row in free:
            end = row.index(stop) if stop in row else 12
            expected.append(row[:end] + (None,) * (12 - end))
        n_steps = max(12 - row.count(None) for row in expected)
        assert any(None in row for row in expected)
        stopped = list(zip(*generate(model, prompts, 12, Sampling(1.0), seed=3, stop_token=stop), strict=True))
        assert stopped == [row[:n_steps] for row in expected]
        assert len(tokens_of(model, prompts[0], 12, stop_token=tokens_of(model, prompts[0], 1)[0])) == 0

    @pytest.mark.parametrize("temperature", [0.0, 5.0])
    def test_padding_of_the_vocabulary_is_never_chosen(self, model, temperature):
        model.lm_head.weight.data[20:] *= 1000  # without a limit these win, half of them
        tokens = tokens_of(model, [1, 2], 14, Sampling(temperature), n_vocab=20)
        assert len(tokens) == 14 and max(tokens) < 20

    def test_the_same_seed_gives_the_same_tokens(self, model):
        runs = [tokens_of(model, [1, 2, 3], 10, Sampling(1.0), seed=seed) for seed in (7, 7, 8)]
        assert runs[0] == runs[1] != runs[2]

    @pytest.mark.gpu
    def test_captured_text_is_the_eager_one(self):
        """Long enough to reach the end of the context, where finished sequences start over."""
        model = random_model(n_positions=90).half()
        for sampling in (Sampling(), Sampling(1.0), Sampling(0.9, top_k=20, top_p=0.9)):
            for prompts in ([[1, 2]], [[1, 2], [3] * 60, [4]]):
                eager, captured = (
                    list(generate(model, prompts, 100, sampling, how=how)) for how in ("eager", "captured")
                )
                assert eager == captured and len(eager) == 90 - min(len(prompt) for prompt in prompts)

    def test_another_step_takes_the_models_place(self, model):
        """What a faster decode step plugs into."""

        def always_seven(tokens, positions, cache):
            return torch.eye(31, device=tokens.device)[torch.full_like(tokens[:, 0], 7)]

        assert tokens_of(model, [1, 2], 5, step_logits=always_seven)[1:] == [7] * 4

    def test_what_does_not_fit_is_said(self, model):
        for prompts, n_new, message in [
            ([], 3, "empty"),
            ([[]], 3, "empty"),
            ([[1, 2], []], 3, "empty"),
            ([[1] * 3, [1] * 16], 3, "the prompt has 16 tokens; the model reads 16, with at least one new one"),
            ([[1] * 20], 3, "the prompt has 20 tokens"),
            ([[1]], -1, "--max-new-tokens is -1"),
        ]:
            with pytest.raises(UserError, match=message):
                next(generate(model, prompts, n_new))
        assert len(tokens_of(model, [1] * 10, 6)) == len(tokens_of(model, [1] * 10, 7)) == 6
        assert len(tokens_of(model, [1] * 15, 7)) == 1
        assert tokens_of(model, [1] * 16, 0) == []


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(DEMO_TOKENIZER)


class TestTextStream:
    TEXT = "naïve 世界 🙂🙂 e\u0301 = ½"

    def test_only_whole_characters_are_shown(self, tokenizer):
        """Each byte its own token: characters of two to four bytes arrive in parts."""
        stream, shown = TextStream(tokenizer), []
        for byte in self.TEXT.encode():
            shown.append(stream.add(tokenizer.encode_single_token(bytes([byte]))))
        assert "".join(shown) == self.TEXT and "\ufffd" not in "".join(shown)
        assert shown.count("") == len(self.TEXT.encode()) - len(self.TEXT)
        assert stream.end() == "" and stream.ended and stream.n_tokens == len(shown)

    def test_a_text_is_what_the_tokenizer_decodes(self, tokenizer):
        """Random tokens: bytes that are no characters are replaced as there."""
        tokens = torch.randint(tokenizer.n_vocab, (3000,)).tolist()
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.add, tokens), stream.end()]) == tokenizer.decode(tokens)

    def test_half_a_character_at_the_end(self, tokenizer):
        stream = TextStream(tokenizer)
        assert stream.add(tokenizer.encode_single_token("世".encode()[:1])) == ""
        assert stream.end() == "\ufffd"

    @pytest.mark.parametrize("stop", ["x", "\n\n", "abab", "世界", "aab"])
    def test_a_text_ends_before_its_stop_text(self, tokenizer, stop):
        """However the stop text is cut into tokens, and after false beginnings of it."""
        for text in ("one\nababx two", "aaab\n\nx", "世世界", "abaabab", "a\n", "\n\n", "ab"):
            stream, shown = TextStream(tokenizer, stop), ""
            for byte in text.encode():
                shown += stream.add(tokenizer.encode_single_token(bytes([byte])))
                assert shown == text[: len(shown)]
            assert stream.ended == (stop in text)
            assert shown + stream.end() == text.partition(stop)[0]
            assert stream.add(tokenizer.encode_single_token(b"x")) == ""

    def test_nothing_waits_that_cannot_be_the_stop_text(self, tokenizer):
        stream = TextStream(tokenizer, "abc")
        assert [stream.add(tokenizer.encode_single_token(b)) for b in (b"a", b"b", b"x", b"a")] == ["", "", "abx", ""]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process: exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        status = 0
        try:
            run_script(generate_script.main)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model that shares the demo's tokens, with room for 24."""
    folder = tmp_path_factory.mktemp("models") / "small"
    checkpoint.save(random_model(vocab_size=4096, n_positions=24), folder, DEMO_TOKENIZER)
    return folder


class TestCommandLine:
    def test_several_texts_come_one_after_another(self, cli, small, tokenizer):
        prompts = ["def f(", "import os, sys"]
        status, output, notes = cli("--model", small, "--max-new-tokens", 5, "--temperature", 0, *prompts)
        assert status == 0 and "10 new tokens, " in notes and "tokens/s" in notes
        model = checkpoint.load(small, arithmetic_dtype(DEVICE.type), DEVICE)
        texts = [p + tokenizer.decode(tokens_of(model, encode(tokenizer, p), 5)) for p in prompts]
        assert output == f"--- 1 of 2 ---\n{texts[0]}\n--- 2 of 2 ---\n{texts[1]}\n"
        assert cli("--model", small, "--max-new-tokens", 5, "--temperature", 0, prompts[0])[1] == texts[0] + "\n"

    def test_a_second_text_ends_before_the_first(self, cli, small, tokenizer):
        """It waits its turn, and is shown up to its own end."""
        _, whole, _ = cli("--model", small, "--max-new-tokens", 9, "--temperature", 0, "a", "b")
        first, second = whole.removeprefix("--- 1 of 2 ---\na").split("\n--- 2 of 2 ---\nb")
        stop = next(c for c in second if c not in first and c.isprintable())
        _, output, _ = cli("--model", small, "--max-new-tokens", 9, "--temperature", 0, "--stop", stop, "a", "b")
        assert (
            output
            == whole.partition("\n--- 2 of 2 ---\nb")[0] + "\n--- 2 of 2 ---\nb" + second.partition(stop)[0] + "\n"
        )

    def test_the_end_of_the_context_is_said(self, cli, small):
        status, _, notes = cli("--model", small, "--max-new-tokens", 100, "import os")
        assert status == 0 and "text 1 ended at 24 tokens, all that the model can read" in notes
        assert "ended" not in cli("--model", small, "--max-new-tokens", 3, "import os")[2]

    def test_nothing_to_write(self, cli, small):
        assert cli("--model", small, "--max-new-tokens", 0, "import os") == (0, "import os\n", "")

    def test_an_empty_prompt_begins_with_the_end_of_a_text(self, cli, tmp_path, text_folder):
        """GPT-2's vocabulary has that token; the text then ends where it comes again."""
        checkpoint.save(random_model(vocab_size=50257), tmp_path / "gpt2ish")
        status, output, _ = cli("--model", "gpt2ish", "--max-new-tokens", 4, "--temperature", 0, "")
        model = checkpoint.load(tmp_path / "gpt2ish", arithmetic_dtype(DEVICE.type), DEVICE)
        tokens = tokens_of(model, [50256], 4, stop_token=50256)
        assert status == 0 and output == gpt2_tokenizer().decode(tokens) + "\n"

    def test_quantized(self, cli, small, tmp_path):
        assert "no int4 checkpoint at checkpoints/small-int4; make it with: python quantize.py" in cli(
            "--model", small, "a", "--quantized"
        )[2].replace("\\", "/")
        int4 = random_model(vocab_size=4096, n_embd=48)
        list(quantize_model(int4, METHODS["mse"], 16))
        settings = gptq_format.describe("mse", 16, False)
        checkpoint.save(int4, tmp_path / "checkpoints" / "small-int4", DEMO_TOKENIZER, settings)
        outputs = [
            cli("--temperature", 0, "--max-new-tokens", 5, *options)[1]
            for options in (
                ("--model", small, "a", "--quantized"),
                ("--quantized", "checkpoints/small-int4", "a"),
                ("--model", "checkpoints/small-int4", "a"),
                ("--model", small, "a"),
            )
        ]
        assert outputs[0] == outputs[1] == outputs[2] != outputs[3]

    def test_errors(self, cli, small, monkeypatch):
        """Status 2, and one line that names what is wrong; nothing on stdout."""
        for arguments, message in [
            ([], "no prompt is given"),
            (["--quantized", "Once upon"], "no prompt is given: --quantized took 'Once upon' as its path"),
            (["--quantized", "nowhere", "a"], "--quantized 'nowhere': no such folder"),
            (["--quantized", "", "a"], "--quantized '': no such folder"),
            (["--quantized", small, "a"], "is no int4 checkpoint; quantize.py makes one"),
            (["a", "--stop", "\udcff"], "--stop '\\udcff' is not UTF-8 text"),
            ([""], "the prompt is empty, and this model's vocabulary has no <|endoftext|>"),
            (["x " * 30], "tokens; the model reads 24"),
            (["a", "--stop", ""], "--stop is empty"),
            (["a", "--top-p", "2"], "--top-p is 2.0"),
            (["a", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        ]:
            status, output, notes = cli("--model", small, *arguments)
            assert (status, output) == (2, ""), notes
            assert notes.startswith("error: ") and message in notes and notes.count("\n") == 1

        def no_memory(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(generate_script, "read_prompts", no_memory)
        status, _, notes = cli("--model", small, "a")
        assert status == 2 and "out of GPU memory: fewer prompts at once, a smaller --max-new-tokens" in notes

    def test_interrupt_and_broken_pipe(self):
        """Ctrl-C ends the line and says so; a reader that has gone away is no error worth a word."""
        command = [sys.executable, "-m", "minigpt.generate", "def main(", "--max-new-tokens", "500"]
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job may not by itself
        interrupted, unread = (
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
            for _ in range(2)
        )
        interrupted.stdout.read(20)
        interrupted.send_signal(signal.SIGINT)
        output, notes = interrupted.communicate(timeout=120)
        assert interrupted.returncode == 130 and notes == b"error: interrupted\n" and output.endswith(b"\n")
        unread.stdout.read(20)
        unread.stdout.close()
        assert unread.stderr.read() == b"" and unread.wait(timeout=120) == 141
