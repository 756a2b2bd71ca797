"""Files: written by transformers and read by us, written by us and read by transformers, and broken in many ways."""

import dataclasses
import json
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import gptq_format
from minigpt.quantization.convert import WHOLE_ROW, quantize_model
from minigpt.quantization.linear import Int4Linear
from minigpt.quantization.rtn import METHODS

CONFIG = GPTConfig(vocab_size=71, n_positions=24, n_embd=48, n_layer=2, n_head=3)
TOKENS = torch.arange(40).view(2, 20) % 71


@pytest.fixture
def model():
    model = GPT(CONFIG)
    model.init_weights()
    return model.half().float().eval().requires_grad_(False)  # weights that fp16 holds exactly


@pytest.fixture
def reference_folder(tmp_path):
    """A GPT-2 saved by transformers."""
    config = transformers.GPT2Config(
        vocab_size=71, n_positions=24, n_embd=48, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path / "reference"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def quantized(model, method="mse", group_size=16):
    list(quantize_model(model, METHODS[method], group_size))
    return gptq_format.describe(method, group_size, method == "absmax")


def test_what_we_save_loads_again(model, tmp_path):
    checkpoint.save(model, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved", torch.float32)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.config == CONFIG and not any(p.requires_grad for p in again.parameters())


def test_what_we_save_loads_in_transformers(model, tmp_path):
    checkpoint.save(model, tmp_path / "saved")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(TOKENS).logits - model(TOKENS)).abs().max() < 1e-4


def test_hub_style_names_buffers_and_a_tied_copy(reference_folder):
    """The hub's files have no `transformer.` prefix and carry mask buffers; some files repeat the tied weight."""
    expected = checkpoint.load(reference_folder, torch.float32)(TOKENS)
    tensors = load_file(reference_folder / "model.safetensors")
    hub = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        hub[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        hub[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    hub["lm_head.weight"] = hub["wte.weight"].clone()
    save_file(hub, reference_folder / "model.safetensors")
    assert torch.equal(checkpoint.load(reference_folder, torch.float32)(TOKENS), expected)
    # A .safetensors file by its own path works too, with config.json beside it.
    assert torch.equal(checkpoint.load(reference_folder / "model.safetensors", torch.float32)(TOKENS), expected)


def test_shards(reference_folder):
    """Large models come in several files, with an index."""
    expected = checkpoint.load(reference_folder, torch.float32)(TOKENS)
    tensors = load_file(reference_folder / "model.safetensors")
    (reference_folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, reference_folder / shard)
    (reference_folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    assert torch.equal(checkpoint.load(reference_folder, torch.float32)(TOKENS), expected)


def test_head_count_of_a_published_shape_needs_no_config(tmp_path):
    """Without config.json only the presets' shapes can be told: the number of heads shows in no tensor."""
    model = GPT(GPTConfig(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024))
    checkpoint.save(model, tmp_path)
    (tmp_path / "config.json").unlink()
    assert checkpoint.load(tmp_path, torch.float16).config.n_head == 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [16, 48, WHOLE_ROW])
def test_int4_round_trip(model, tmp_path, method, group_size):
    settings = quantized(model, method, group_size)
    checkpoint.save(model, tmp_path / "int4", quantization=settings)
    again = checkpoint.load(tmp_path / "int4", torch.float32)
    assert sum(isinstance(module, Int4Linear) for module in again.modules()) == 8
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_int4_scales_stay_fp16_whatever_the_rest_becomes(model, tmp_path):
    settings = quantized(model)
    checkpoint.save(model, tmp_path / "int4", quantization=settings)
    again = checkpoint.load(tmp_path / "int4", torch.bfloat16).to(torch.bfloat16)
    layer = again.h[0].mlp.c_fc
    assert layer.scales.dtype == torch.float16 and layer.qweight.dtype == torch.int32
    assert torch.equal(layer.scales, model.h[0].mlp.c_fc.scales)
    assert again.wte.weight.dtype == layer.bias.dtype == torch.bfloat16


def decode_gptq(tensors, name, plus_one):
    """The weight [out_features, in_features] of a layer in a GPTQ file, by that format's own definition, in numpy."""
    qweight, qzeros = (tensors[f"{name}.{part}"].numpy().view("uint32") for part in ("qweight", "qzeros"))
    scales, g_idx = tensors[f"{name}.scales"].float().numpy(), tensors[f"{name}.g_idx"].numpy()
    in_features, out_features = qweight.shape[0] * 8, qweight.shape[1]
    weight = torch.empty(out_features, in_features)
    for k in range(in_features):
        for n in range(out_features):
            code = int(qweight[k // 8, n]) >> 4 * (k % 8) & 15
            zero = (int(qzeros[g_idx[k], n // 8]) >> 4 * (n % 8) & 15) + plus_one
            weight[n, k] = (code - zero) * float(scales[g_idx[k], n])
    return weight


def test_int4_file_is_gptqs(model, tmp_path):
    """What other tools will read: names, dtypes, shapes, config, and the numbers that they decode."""
    settings = quantized(model)
    checkpoint.save(model, tmp_path / "int4", quantization=settings)
    fields = json.loads((tmp_path / "int4" / "config.json").read_text(encoding="utf-8"))
    assert fields["quantization_config"]["quant_method"] == "gptq"
    assert fields["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert fields["quantization_config"]["desc_act"] is False
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    name = "transformer.h.1.attn.c_attn"
    assert {t: (str(tensors[f"{name}.{t}"].dtype), list(tensors[f"{name}.{t}"].shape)) for t in
            ("qweight", "scales", "qzeros", "g_idx", "bias")} == {
        "qweight": ("torch.int32", [6, 144]),
        "scales": ("torch.float16", [3, 144]),
        "qzeros": ("torch.int32", [3, 18]),
        "g_idx": ("torch.int32", [48]),
        "bias": ("torch.float16", [144]),
    }  # fmt: skip
    import kernels

    decoded = decode_gptq(tensors, name, plus_one=0)
    assert torch.equal(decoded, kernels.dequantize(model.h[1].attn.c_attn.weight, torch.float32))


def test_files_of_the_first_gptq_version(model, tmp_path):
    """They store each zero less one, modulo 16; 0 becomes 15."""
    settings = quantized(model, "minmax")
    checkpoint.save(model, tmp_path / "int4", quantization=settings)
    file = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            nibbles = torch.stack([tensor >> shift & 15 for shift in range(0, 32, 4)])
            nibbles[:, 0, 0] = torch.arange(8)  # all zeros that the format knows, 0 among them
            tensors[name] = sum(((nibbles[i] - 1) % 16).to(torch.int64) << 4 * i for i in range(8)).to(torch.int32)
            layer = model.get_submodule(name.removeprefix("transformer.").removesuffix(".qzeros"))
            layer.qzeros.copy_(sum(nibbles[i].to(torch.int64) << 4 * i for i in range(8)).to(torch.int32))
    save_file(tensors, file)
    config = json.loads((tmp_path / "int4" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (tmp_path / "int4" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(checkpoint.load(tmp_path / "int4", torch.float32)(TOKENS), model(TOKENS))


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def fail_to_load(path, message):
    with pytest.raises(UserError, match=message) as error_info:
        checkpoint.load(path, torch.float32)
    assert "\n" not in str(error_info.value)


class TestBrokenFiles:
    def test_truncated(self, reference_folder):
        file = reference_folder / "model.safetensors"
        content = file.read_bytes()
        for length in (0, 5, 100, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            fail_to_load(reference_folder, "model.safetensors: not a whole safetensors file")

    def test_hostile_headers(self, reference_folder):
        file = reference_folder / "model.safetensors"
        header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**40, 48], "data_offsets": [0, 4]}}).encode()
        for content in (
            struct.pack("<Q", 2**62) + b"{}",  # a header longer than any disk
            struct.pack("<Q", len(header)) + header + b"1234",  # a tensor larger than the file
            struct.pack("<Q", 4) + b"[1]\n",
            b"PK\x03\x04 a zip file, such as torch.save writes" * 10,
        ):
            file.write_bytes(content)
            fail_to_load(reference_folder, "not a whole safetensors file")

    def test_missing_parts(self, reference_folder, tmp_path):
        fail_to_load(tmp_path, "no model.safetensors in this folder")
        (reference_folder / "config.json").rename(tmp_path / "config.json")
        fail_to_load(reference_folder, "config.json: no such file.*head count")
        shutil.copy(tmp_path / "config.json", reference_folder)
        edit_tensors(reference_folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
        fail_to_load(reference_folder, "h.1.mlp.c_fc.bias is missing")

    def test_foreign_files(self, reference_folder):
        edit_tensors(reference_folder, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(2)}))
        fail_to_load(reference_folder, "model.embed_tokens.weight is no tensor of a GPT-2")
        edit_config(reference_folder, model_type="llama")
        fail_to_load(reference_folder, "model_type is 'llama'")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"activation_function": "relu"}, "activation_function is 'relu', only 'gelu_new'"),
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
            ({"tie_word_embeddings": False}, "tie_word_embeddings"),
            ({"n_head": 5}, "n_embd 48 is no multiple of n_head 5"),
            ({"n_layer": "many"}, "n_layer is 'many'"),
            ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
            ({"n_layer": 10**9}, "n_layer is 1000000000, it must be"),
            ({"n_layer": 3}, "fewer blocks"),
            ({"n_embd": None}, "n_embd is None"),
            ({"n_layer": 1}, "no tensor of a GPT-2 with 1 blocks"),
            ({"n_embd": 96}, r"shape \[71, 48\], not \[71, 96\]"),
        ],
    )
    def test_configs_that_do_not_fit(self, reference_folder, changes, message):
        edit_config(reference_folder, **changes)
        fail_to_load(reference_folder, message)

    def test_configs_that_are_not_configs(self, reference_folder):
        for content in ("{", "[]", '"gpt2"', "\0"):
            (reference_folder / "config.json").write_text(content, encoding="utf-8")
            fail_to_load(reference_folder, "config.json: not (a )?JSON")

    def test_wrong_shapes_and_dtypes(self, reference_folder):
        name = "transformer.h.0.attn.c_attn.weight"
        edit_tensors(reference_folder, lambda tensors: tensors.update({name: tensors[name].t().contiguous()}))
        fail_to_load(reference_folder, r"h.0.attn.c_attn.weight has shape \[48, 144\], not \[144, 48\]")
        edit_tensors(reference_folder, lambda tensors: tensors.update({name: tensors[name][None].contiguous()}))
        fail_to_load(reference_folder, r"h.0.attn.c_attn.weight has shape \[1, 144, 48\], not \[144, 48\]")
        edit_tensors(reference_folder, lambda tensors: tensors.update({name: torch.zeros(48, 144, dtype=torch.int8)}))
        fail_to_load(reference_folder, "torch.int8")

    def test_untied_output_layer(self, reference_folder):
        edit_tensors(reference_folder, lambda tensors: tensors.update({"lm_head.weight": torch.randn(71, 48)}))
        fail_to_load(reference_folder, "only tied output layers")

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("qweight", torch.zeros(6, 144, dtype=torch.int64), "qweight is torch.int64, not torch.int32"),
            ("qweight", torch.zeros(5, 144, dtype=torch.int32), r"qweight has shape \[5, 144\]"),
            ("scales", torch.zeros(3, 144), "scales is torch.float32, not torch.float16"),
            ("qzeros", torch.zeros(3, 144, dtype=torch.int32), r"qzeros has shape \[3, 144\]"),
            ("g_idx", torch.arange(47, -1, -1, dtype=torch.int32) // 16, "desc_act"),
        ],
    )
    def test_int4_tensors(self, model, tmp_path, part, value, message):
        checkpoint.save(model, tmp_path / "int4", quantization=quantized(model))
        edit_tensors(tmp_path / "int4", lambda tensors: tensors.update({f"transformer.h.0.attn.c_attn.{part}": value}))
        fail_to_load(tmp_path / "int4", message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 8}, "only 4-bit gptq"),
            ({"quant_method": "awq"}, "only 4-bit gptq"),
            ({"group_size": 32}, "group_size 32 does not fit h.0.attn.c_attn, whose in_features is 48"),
            ({"group_size": "x"}, "group_size 'x'"),
            ({"group_size": 16.0}, "group_size 16.0"),
            ({"group_size": 48}, "g_idx does not count up in groups of 48"),
        ],
    )
    def test_int4_settings(self, model, tmp_path, change, message):
        settings = quantized(model)
        checkpoint.save(model, tmp_path / "int4", quantization=settings | change)
        fail_to_load(tmp_path / "int4", message)

    def test_int4_without_int4_layers(self, model, tmp_path):
        checkpoint.save(model, tmp_path / "int4", quantization=gptq_format.describe("mse", 16, False))
        fail_to_load(tmp_path / "int4", "quantization_config, but no layer has a .qweight tensor")

    @pytest.mark.parametrize("name", ["wpe.weight", "h.0.ln_1.weight", "h.1.mlp.c_fc.bias", "h.0.attn.c_attn.weight"])
    def test_values_that_are_not_finite(self, reference_folder, name):
        for value, message in [(torch.nan, "NaN or infinite"), (-torch.inf, "NaN or infinite"), (1e5, "float16")]:
            edit_tensors(reference_folder, lambda tensors, v=value: tensors[f"transformer.{name}"].view(-1)[7].fill_(v))
            with pytest.raises(UserError, match=f"{name} has values that are .*{message}"):
                checkpoint.load(reference_folder, torch.float16)
        checkpoint.load(reference_folder, torch.float32)  # which holds 1e5

    def test_int4_scales_that_are_not_finite(self, model, tmp_path):
        checkpoint.save(model, tmp_path / "int4", quantization=quantized(model))
        edit_tensors(
            tmp_path / "int4", lambda tensors: tensors["transformer.h.0.mlp.c_fc.scales"][0, 3].fill_(torch.nan)
        )
        fail_to_load(tmp_path / "int4", "h.0.mlp.c_fc.scales has values that are NaN")

    def test_a_tensor_with_and_without_prefix(self, reference_folder):
        edit_tensors(reference_folder, lambda tensors: tensors.update({"wpe.weight": torch.zeros(24, 48)}))
        fail_to_load(reference_folder, "wpe.weight is there twice")


class TestSaving:
    def test_a_failure_leaves_the_old_checkpoint(self, model, tmp_path, monkeypatch):
        checkpoint.save(model, tmp_path / "saved")
        before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

        def full_disk(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(model, tmp_path / "saved")
        assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    def test_weights_beside_another_checkpoints_config(self, model, tmp_path):
        """As two programs that save at once may leave it: another head count shows in no tensor's shape."""
        checkpoint.save(model, tmp_path / "saved")
        checkpoint.save(GPT(dataclasses.replace(CONFIG, n_head=4)), tmp_path / "other")
        shutil.copy(tmp_path / "other" / "config.json", tmp_path / "saved")
        fail_to_load(tmp_path / "saved", "not the one that the weights were saved with")

    def test_values_that_fp16_cannot_hold(self, model, tmp_path):
        model.wpe.weight[3, 4] = 1e5
        with pytest.raises(UserError, match="wpe.weight has values that are too large for torch.float16"):
            checkpoint.save(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_other_files_in_the_folder_stay(self, model, tmp_path):
        (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
        checkpoint.save(model, tmp_path)
        assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"

    def test_an_index_of_an_earlier_checkpoint_goes_away(self, model, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": {"wte.weight": "old.safetensors"}}', encoding="utf-8"
        )
        checkpoint.save(model, tmp_path)
        assert torch.equal(checkpoint.load(tmp_path, torch.float32)(TOKENS), model(TOKENS))

    def test_a_tokenizer_goes_along_and_an_old_one_goes_away(self, model, tmp_path):
        tokenizer = checkpoint.DEMO_FOLDER / "tokenizer.tiktoken"
        checkpoint.save(model, tmp_path / "saved", tokenizer)
        assert (tmp_path / "saved" / "tokenizer.tiktoken").read_bytes() == tokenizer.read_bytes()
        checkpoint.save(model, tmp_path / "saved")
        assert not (tmp_path / "saved" / "tokenizer.tiktoken").exists()

    def test_output_must_be_a_folder(self, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UserError, match="file is a file"):
                checkpoint.check_output(path)

    def test_output_must_be_writable(self, tmp_path, monkeypatch):
        checkpoint.check_output(tmp_path / "new" / "folder")
        monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
        with pytest.raises(UserError, match=f"no permission to write to {tmp_path}"):
            checkpoint.check_output(tmp_path / "new" / "folder")
        assert not list(tmp_path.iterdir())


def test_models_are_told_apart_by_their_embeddings(model, tmp_path):
    other = GPT(CONFIG)
    other.init_weights()
    checkpoint.save(model, tmp_path / "int4", quantization=quantized(model))
    assert not checkpoint.holds_another_model(tmp_path / "int4", model)
    assert checkpoint.holds_another_model(tmp_path / "int4", other)
    assert not checkpoint.holds_another_model(tmp_path / "nowhere", other)
    (tmp_path / "int4" / "model.safetensors").write_bytes(b"half")
    assert not checkpoint.holds_another_model(tmp_path / "int4", other)


def test_broken_index(reference_folder):
    for content in ("[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        (reference_folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
        fail_to_load(reference_folder, "not an index of safetensors files")


def test_default_output(tmp_path, monkeypatch):
    """Named after the model: a known name, a folder's whole name, a file's without its ending."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine-v1.5").mkdir()
    (tmp_path / "mine-v1.5" / "weights.safetensors").write_text("", encoding="utf-8")
    for model, name in [("gpt2", "gpt2"), ("mine-v1.5/", "mine-v1.5"), ("mine-v1.5/weights.safetensors", "weights")]:
        assert checkpoint.default_int4_folder(model).as_posix() == f"checkpoints/{name}-int4"


def test_resolve():
    assert checkpoint.resolve("demo") == checkpoint.DEMO_FOLDER
    with pytest.raises(UserError, match="unknown model 'gpt5'.*gpt2-xl"):
        checkpoint.resolve("gpt5")
