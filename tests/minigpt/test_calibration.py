"""Calibration text, and the walk that watches a model's layers on it."""

import copy
import dataclasses

import datasets
import pytest
import torch
import torch.nn.functional as F

import kernels
from minigpt import checkpoint, data
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import calibration
from minigpt.quantization.calibration import DAMPING, damp, load_calibrations, watch
from minigpt.quantization.convert import block_linears, quantize_model
from minigpt.quantization.fisher import fisher
from minigpt.quantization.gptq import gptq
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.methods import CALIBRATED, METHODS, Calibrated
from minigpt.quantization.rtn import absmax
from minigpt.quantization.tune import n_held_back
from minigpt.tokenizer import encode, read_tokenizer

CONFIG = GPTConfig(vocab_size=4096, n_positions=24, n_embd=48, n_layer=2, n_head=3)


@pytest.fixture
def tokenizer():
    return read_tokenizer(checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")


def make_model(config):
    """With large weights, biases and embeddings, so that nothing is nearly zero."""
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model():
    return make_model(CONFIG)


@pytest.fixture
def windows():
    return torch.randint(4096, (30, 24))


def inputs_of(model, name, windows):
    """What reaches a layer of a model as it is, the plain way: float64 [tokens, in_features]."""
    caught = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    with kernels.exact_on_cpu():
        model(windows)
    hook.remove()
    return caught[0].flatten(0, 1).double()


def load_calibration(name, tokenizer, n_tokens, seed, n_tuning_windows=0):
    """A single draw."""
    draw = (seed, n_tuning_windows)
    return load_calibrations(name, tokenizer, CONFIG, n_tokens, [draw])[draw]


class TestText:
    def test_windows_are_from_the_text_and_chosen_by_the_seed(self, tmp_path, tokenizer):
        path = tmp_path / "text.txt"
        path.write_text(data.load_text("demo")[:20000], encoding="utf-8")
        tokens = encode(tokenizer, path.read_text(encoding="utf-8"))
        ours = load_calibration(str(path), tokenizer, 4000, seed=3)
        assert ours.windows.shape == (4000 // 24, 24) and ours.tokens == 3984 and ours.warnings == []
        assert ours.describe() == {"text": str(path), "tokens": 3984, "seed": 3}
        whole = " ".join(map(str, tokens))
        assert all(" ".join(map(str, window)) in whole for window in ours.windows.tolist())
        again, other = (load_calibration(str(path), tokenizer, 4000, seed).windows for seed in (3, 4))
        assert torch.equal(ours.windows, again) and not torch.equal(ours.windows, other)

    def test_tuning_needs_two_windows(self, tmp_path, tokenizer):
        (tmp_path / "text.txt").write_text(" one two" * 20, encoding="utf-8")
        with pytest.raises(UserError, match="has 40 tokens; tuning needs at least 2 windows of 24"):
            load_calibration(str(tmp_path / "text.txt"), tokenizer, 24, 0, n_tuning_windows=8)

    @pytest.mark.parametrize("n_text", [48, 100, 191, 5000])
    @pytest.mark.parametrize("n_tuning_windows", [3, 40, 500])
    def test_what_tuning_holds_back_shares_no_token_with_other_windows(
        self, tmp_path, tokenizer, monkeypatch, n_text, n_tuning_windows
    ):
        (tmp_path / "text.txt").write_text("any", encoding="utf-8")
        monkeypatch.setattr(calibration, "encode", lambda *_: list(range(n_text)))  # a token is its own place
        draws = [(0, n_tuning_windows), (0, 0), (1, n_tuning_windows)]
        drawn = load_calibrations(str(tmp_path / "text.txt"), tokenizer, CONFIG, 480, draws)
        ours, untuned, other = (drawn[draw] for draw in draws)
        n_windows = min(max(480, 24 * n_tuning_windows), n_text) // 24
        assert len(ours.tuning_windows) == n_windows and len(untuned.tuning_windows) == 0
        cut = n_windows - n_held_back(n_windows)
        shown, held_back = ours.tuning_windows[:cut], ours.tuning_windows[cut:]
        assert len(shown) >= 1 and len(held_back) >= 1 and shown.max() < held_back.min()
        assert torch.equal(ours.windows, shown[:20])
        again = load_calibration(str(tmp_path / "text.txt"), tokenizer, 480, 0, n_tuning_windows)
        assert torch.equal(again.tuning_windows, ours.tuning_windows)
        assert n_text < 5000 or not torch.equal(other.tuning_windows, ours.tuning_windows)

    def test_a_text_is_read_once_for_all_draws(self, tokenizer, monkeypatch):
        asked = []
        monkeypatch.setattr(data, "load_text", lambda *name: asked.append(name) or "def f(): pass\n" * 500)
        load_calibrations("demo", tokenizer, CONFIG, 240, [(0, 0), (1, 0), (0, 9)])
        assert len(asked) == 1

    def test_the_demos_is_what_it_was_trained_on(self, tokenizer, monkeypatch):
        asked = []
        monkeypatch.setattr(data, "standard_library_text", lambda split: asked.append(split) or "def f(): pass\n" * 500)
        load_calibration("demo", tokenizer, 240, 0)
        assert asked == ["train"]

    def test_too_little_text(self, tmp_path, tokenizer):
        path = tmp_path / "short.txt"
        path.write_text("x = 1\n" * 30, encoding="utf-8")
        short = load_calibration(str(path), tokenizer, 24000, 0)
        assert 24 <= short.tokens < 192
        assert "fewer than the 24,000 asked for" in short.warnings[0]
        assert "say little about layers of 192 inputs" in short.warnings[1]
        path.write_text("x = 1", encoding="utf-8")
        with pytest.raises(
            UserError, match="--calibration .* fewer than a window of 24; --calibration-tokens asks for"
        ):
            load_calibration(str(path), tokenizer, 24000, 0)
        with pytest.raises(UserError, match="--calibration-tokens 23 is less than a window"):
            load_calibration("demo", tokenizer, 23, 0)

    def test_wikitexts_test_split_is_refused_and_its_training_split_warned_of(self, tmp_path, tokenizer, monkeypatch):
        (tmp_path / "wikitext-2").mkdir()
        training = " = Valkyria Chronicles III = \n \n Senjō no Valkyria 3 : Unrecorded Chronicles \n" * 20
        (tmp_path / "wikitext-2" / "wiki.train.raw").write_text(training, encoding="utf-8")
        monkeypatch.setenv("MINIGPT_DATA", str(tmp_path))
        warning = load_calibration("wikitext-2", tokenizer, 240, 0).warnings[0]
        assert "perplexity on WikiText will flatter this model" in warning
        (tmp_path / "any.txt").write_text("\n = Robert Boulter = \n \n Robert Boulter is \n", encoding="utf-8")
        with pytest.raises(UserError, match="any.txt: this is WikiText's test split"):
            load_calibration(str(tmp_path / "any.txt"), tokenizer, 240, 0)

    def test_the_real_test_split_is_known_by_its_title(self, text_folder, tokenizer):
        with pytest.raises(UserError, match="test split"):
            load_calibration(str(text_folder / "wikitext-2" / "wiki.test.raw"), tokenizer, 240, 0)

    @pytest.mark.parametrize(
        ("name", "repository", "config", "revision"),
        [
            ("c4", "allenai/c4", "en", data.C4_REVISION),
            ("someone/texts", "someone/texts", None, None),
            ("someone/texts:small", "someone/texts", "small", None),
        ],
    )
    def test_a_dataset_of_the_hub_is_read_no_further_than_needed(
        self, tokenizer, monkeypatch, name, repository, config, revision
    ):
        """In a stand-in for `datasets`, which counts the rows that are taken."""
        from minigpt import hub

        taken = []

        def rows():
            for number in range(10**9):
                taken.append(number)
                yield {"text": f"text {number}"}

        def load_dataset(*arguments, **options):
            assert arguments == (repository, config)
            assert options == {"split": "train", "revision": revision, "streaming": True}
            return datasets.IterableDataset.from_generator(rows)

        monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(data, "HUB_DOCUMENTS", 100)
        assert data.load_text(name, "train").startswith("text 0\n\ntext 1\n\n")
        assert 100 <= len(taken) <= 101
        assert load_calibration(name, tokenizer, 240, 0).tokens == 240

    def test_a_dataset_that_cannot_be_reached(self, monkeypatch):
        from minigpt import hub

        def refuse(*_):
            raise ConnectionError("no route")

        monkeypatch.setattr(hub, "check_reachable", refuse)
        with pytest.raises(UserError, match=r"cannot read dataset a/b .*no route.*no file has that name"):
            data.load_text("a/b", "train")


class TestWalk:
    @pytest.mark.parametrize("group_size", [16, 32])  # torch's CPU kernel takes the latter, and rounds to bfloat16
    def test_each_layer_is_watched_with_all_layers_before_it_quantized(self, windows, monkeypatch, group_size):
        model = make_model(dataclasses.replace(CONFIG, n_embd=3 * group_size))
        monkeypatch.setattr(calibration, "CHUNK_TOKENS", 7 * 24)  # 30 windows: chunks of 7 and a rest
        seen = []
        so_far = copy.deepcopy(model)

        def method(weight, group_size, hessian):
            seen.append(hessian)
            return absmax(weight, group_size)

        reports = quantize_model(model, Calibrated(method), group_size, windows)
        for name, _ in list(block_linears(so_far)):
            x = inputs_of(so_far, name, windows)
            assert next(reports).name == name
            x = x - x.mean(0)
            expected = x.t() @ x / len(x)
            expected += DAMPING * expected.diagonal().mean() * torch.eye(len(expected), dtype=torch.float64)
            assert (seen[-1] - expected).abs().max() < 1e-4 * expected.diagonal().max(), name
            so_far.set_submodule(name, model.get_submodule(name))
        assert next(reports, None) is None and len(seen) == 8

    def test_the_mean_of_each_layers_outputs_is_the_original_models(self, model, windows):
        """Bias correction, fed with what the layers before it made of the text."""
        original = copy.deepcopy(model)
        method = Calibrated(lambda weight, group_size, _: absmax(weight, group_size), aim=0.5)
        list(quantize_model(model, method, 16, windows))
        for name, layer in list(block_linears(original)):
            x, int4 = inputs_of(model, name, windows).float(), model.get_submodule(name)
            target = layer(inputs_of(original, name, windows).float()).mean(0)
            uncorrected = Int4Linear(int4.weight, layer.bias)
            shift = (int4(x).mean(0) - target).abs().max()
            assert shift < 1e-2 * target.abs().max() and shift < 0.1 * (uncorrected(x).mean(0) - target).abs().max()

    def test_each_layer_gets_its_own_fisher_information_of_the_original_model(self, model, windows):
        expected = fisher(model, dict(block_linears(model)), windows)
        seen = []

        def choose(weight, group_size, hessian, information):
            seen.append(information)
            return absmax(weight, group_size)

        list(quantize_model(model, Calibrated(choose, fisher=True), 16, windows))
        assert len(seen) == 8 and all(map(torch.equal, seen, expected.values()))

    def test_activations_that_are_not_finite_name_the_layer(self, model, windows):
        model.h[1].ln_1.bias[5] = float("inf")
        with pytest.raises(UserError, match="inputs of layer h.1.attn.c_attn are NaN or infinite"):
            list(quantize_model(model, METHODS["gptq"], 16, windows))

    def test_weights_that_are_not_finite_name_the_layer_before_anything_changes(self, model, windows):
        model.h[1].mlp.c_fc.weight[3, 4] = float("nan")
        with pytest.raises(UserError, match="h.1.mlp.c_fc"):
            quantize_model(model, METHODS["gptq"], 16, windows)
        assert not any(isinstance(module, Int4Linear) for module in model.modules())

    @pytest.mark.parametrize("method", CALIBRATED)
    def test_dead_inputs_and_fewer_tokens_than_inputs(self, model, windows, method):
        """The Hessian is singular; damping makes up for it, and the inputs that never come are reported."""
        model.h[0].ln_2.weight[[3, 17]] = 0
        model.h[0].ln_2.bias[[3, 17]] = 0
        reports = list(quantize_model(model, METHODS[method], 16, windows[:1]))
        assert [note for report in reports for note in report.notes] == [
            "h.0.mlp.c_fc: 2 of 48 inputs are 0 on all the text; rounded to nearest"
        ]
        assert torch.isfinite(model(windows)).all()

    def test_damping_is_doubled_until_it_does(self):
        hessian = torch.diag(torch.tensor([4.0, 1.0, -0.1], dtype=torch.float64))
        damped, damping = damp("layer", hessian)
        mean = hessian.diagonal().mean()
        assert damping == 0.08 and damping / 2 * mean < 0.1
        assert torch.allclose(damped, hessian + 0.08 * mean * torch.eye(3))
        assert torch.equal(damp("layer", torch.zeros(3, 3, dtype=torch.float64))[0], torch.eye(3))
        with pytest.raises(UserError, match="layer some.layer: .*not positive definite"):
            damp("some.layer", torch.diag(torch.tensor([1.0, -0.9999], dtype=torch.float64)))

    def test_no_method_is_worse_than_mse_on_the_trained_model(self):
        """By the KL divergence to the original model, on text that neither it nor the calibration has seen.

        To keep it short, of a model with the trained one's first block only.
        """
        tokenizer = read_tokenizer(checkpoint.DEMO_FOLDER / "tokenizer.tiktoken")
        text = data.load_text("demo", "train")
        pieces = "".join(text[start : start + 1500] for start in range(0, 6_000_000, 200_000))  # of many kinds
        shown = torch.tensor(encode(tokenizer, pieces))[: 40 * 256].view(40, 256)
        tokens = torch.tensor(encode(tokenizer, data.load_text("demo", "validation")[:9000]))[:2048].view(8, 256)

        def load():
            model = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32)
            model.h = model.h[:1]
            return model

        def log_probabilities(model):
            return model(tokens).log_softmax(-1).flatten(0, 1)

        expected, kl = log_probabilities(load()), {}
        for name in ("mse", "hqq", *CALIBRATED):
            model = load()
            list(quantize_model(model, METHODS[name], 64, shown if name in CALIBRATED else None))
            kl[name] = F.kl_div(log_probabilities(model), expected, log_target=True, reduction="batchmean").item()
        assert kl["hqq"] < 1.02 * kl["mse"], kl  # level, give or take: it does not know the text either
        assert all(kl[name] < 0.95 * kl["mse"] for name in CALIBRATED), kl


class TestGoal:
    """Two layers, of which the first one is rounded: X is what the second was trained on, x what it gets."""

    @pytest.fixture
    def problem(self):
        mixing = torch.eye(64) + 0.1 * torch.randn(64, 64)
        text = torch.randn(4000, 64) @ mixing + 3 * torch.randn(64)
        first, second = torch.eye(64) + 0.1 * torch.randn(64, 64), torch.randn(32, 64)
        return text @ kernels.dequantize(absmax(first, 64), torch.float32).t(), text @ first.t(), second

    def test_it_is_the_least_squares_solution(self, problem, monkeypatch):
        monkeypatch.setattr(calibration, "DAMPING", 1e-9)
        x, original, weight = problem
        inputs = watch("layer", iter([x[:1500], x[1500:]]), iter([original[:1500], original[1500:]]))
        ones = torch.ones(4000, 1, dtype=torch.float64)
        outputs = (original + 1).double() @ weight.double().t()
        best = torch.linalg.lstsq(torch.cat([x.double(), ones], 1), outputs).solution[:64].t()
        goal = inputs.goal(weight, aim=1.0)
        assert (goal - best).norm() < 0.01 * (weight - best).norm()
        assert torch.equal(inputs.goal(weight, aim=0.0), weight)

    def test_outputs_come_closer_to_the_original_ones(self, problem):
        x, original, weight = problem
        inputs = watch("layer", iter([x[:2000]]), iter([original[:2000]]))
        error = {}
        for aim in (0.0, 0.25, 1.0):
            rounded = kernels.dequantize(gptq(inputs.goal(weight, aim), 64, inputs.hessian), torch.float32)
            outputs = x @ rounded.t() + inputs.bias(torch.zeros(32), weight, rounded)
            error[aim] = (outputs - original @ weight.t())[2000:].norm()  # on text that was not watched
        assert error[1.0] < 0.95 * error[0.25] and error[0.25] < 0.97 * error[0.0]


def test_notes_are_kept_in_the_checkpoint(tmp_path, model, windows):
    from minigpt.quantization import gptq_format

    list(quantize_model(model, METHODS["gptq"], 16, windows))
    described = gptq_format.describe("gptq", 16, False, calibration={"text": "demo", "tokens": 720, "seed": 0})
    checkpoint.save(model, tmp_path, quantization=described)
    assert described["meta"]["calibration"] == {"text": "demo", "tokens": 720, "seed": 0}
    loaded = checkpoint.load(tmp_path, torch.float32)
    layer = loaded.h[1].mlp.c_proj
    assert isinstance(layer, Int4Linear)
    assert torch.equal(kernels.dequantize(layer.weight), kernels.dequantize(model.h[1].mlp.c_proj.weight))
