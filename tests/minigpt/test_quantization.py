"""Converting a whole model."""

import pytest
import torch
from safetensors.torch import load_file

import kernels
from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import gptq_format
from minigpt.quantization.convert import WHOLE_ROW, quantize_model
from minigpt.quantization.linear import Int4Linear, describe_path
from minigpt.quantization.rtn import METHODS, SYMMETRIC

needs_cpu_kernel = pytest.mark.skipif(
    not isinstance(kernels.prepare_for_cpu(kernels.quantize(torch.ones(16, 32), 32)), kernels.CPUWeight),
    reason="this torch has no int4 kernel for this CPU",
)


@pytest.fixture
def model():
    model = GPT(GPTConfig(vocab_size=71, n_positions=24, n_embd=48, n_layer=2, n_head=3))
    model.init_weights()
    return model.eval()


def test_every_linear_layer_of_the_blocks_is_converted_and_nothing_else(model):
    reports = list(quantize_model(model, METHODS["mse"], 16))
    assert [report.name for report in reports] == [
        f"h.{i}.{kind}" for i in range(2) for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    converted = {name for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    assert converted == {report.name for report in reports}
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.wte.weight


@pytest.mark.parametrize("method", METHODS)
def test_reports_say_what_was_done(model, method):
    originals = {name: module.weight.detach().clone() for name, module in model.named_modules() if "c_" in name}
    for report in quantize_model(model, METHODS[method], 16):
        weight, layer = originals[report.name], model.get_submodule(report.name)
        error = kernels.dequantize(layer.weight, torch.float32).double() - weight.double()
        assert report.weights == weight.numel() and report.kind == report.name[4:]
        assert report.mean_absolute_error == pytest.approx(error.abs().mean().item(), rel=1e-4)
        assert report.relative_error == pytest.approx((error.norm() / weight.double().norm()).item(), rel=1e-4)
        stored = [tensor.numel() * tensor.element_size() for tensor in layer.weight]
        assert report.stored_bytes == sum(stored) + 4 * weight.shape[1]
        zeros = kernels.unpack(layer.qzeros.t(), weight.shape[0])
        assert (zeros == 8).all() == (method in SYMMETRIC)


def test_int4_layer_computes_what_the_linear_layer_with_its_weight_does():
    linear = torch.nn.Linear(64, 24)
    x = torch.randn(2, 5, 64)
    for group_size, tolerance in ((16, 1e-6), (32, 3e-2)):  # torch's CPU kernel, which takes 32, rounds to bfloat16
        layer = Int4Linear(kernels.quantize(linear.weight.detach(), group_size), linear.bias.detach())
        expected = torch.nn.functional.linear(x, kernels.dequantize(layer.weight, torch.float32), linear.bias)
        assert torch.allclose(layer(x), expected, atol=tolerance)


def prepare_layers(model):
    """Brings a model's int4 layers into the state that they have on a GPU."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.hold(kernels.prepare(module.weight))


def same_tensors(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prepared_layers_compute_the_same(model, activation_bits, dtype):
    list(quantize_model(model, METHODS["mse"], 16))
    for module in model.to(dtype).modules():
        if isinstance(module, Int4Linear):
            module.activation_bits = activation_bits
    tokens = torch.arange(20).view(1, 20)
    expected = model(tokens)
    prepare_layers(model)
    assert torch.equal(model(tokens), expected)


def test_eight_bit_activations_reach_the_layer():
    layer = Int4Linear(kernels.quantize(torch.randn(24, 64), 32), torch.randn(24))
    x = torch.randn(5, 64)
    exact = layer(x)
    layer.activation_bits = 8
    assert 1e-3 < (layer(x) - exact).norm() / exact.norm() < 2e-2


def test_prepared_layers_save_the_same_file(model, tmp_path):
    list(quantize_model(model, METHODS["minmax"], 16))
    settings = gptq_format.describe("minmax", 16, False)
    checkpoint.save(model, tmp_path / "file", quantization=settings)
    stored = [module.stored_bytes for module in model.modules() if isinstance(module, Int4Linear)]
    prepare_layers(model)
    checkpoint.save(model, tmp_path / "prepared", quantization=settings)
    assert same_tensors(tmp_path / "prepared", tmp_path / "file")
    assert stored == [module.stored_bytes for module in model.modules() if isinstance(module, Int4Linear)]


def test_a_layer_holds_one_layout(model):
    """Prepared on a GPU, the file's on a CPU; casting the model to another dtype leaves both as they are."""
    list(quantize_model(model, METHODS["minmax"], 16))
    layer = model.h[0].mlp.c_fc
    before = layer.weight
    assert {name for name, _ in layer.named_buffers()} == {"qweight", "scales", "qzeros"}
    layer.hold(kernels.prepare(before))
    assert {name for name, _ in layer.named_buffers()} == {"codes", "scale_zeros", "row_scales"}
    assert layer.bfloat16().bias.dtype == torch.bfloat16  # and, on a CPU, in the file's layout again
    assert {name for name, _ in layer.named_buffers()} == {"qweight", "scales", "qzeros"}
    for ours, theirs in zip(layer.bfloat16().weight, before, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@needs_cpu_kernel
def test_on_a_cpu_a_layer_holds_the_file_and_what_torchs_kernel_reads():
    layer, other = (Int4Linear(kernels.quantize(torch.randn(40, 64), 32), torch.randn(40)) for _ in range(2))
    assert {name for name, _ in layer.named_buffers()} == {"qweight", "scales", "qzeros", "packed", "scale_shifts"}
    assert layer.state_dict().keys() == {"qweight", "scales", "qzeros", "bias"}
    assert describe_path(layer) == "torch's CPU kernel, in bfloat16"
    x = torch.randn(3, 64)
    for before, after in zip(layer.held, layer.half().float().held, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)
    layer.load_state_dict(other.state_dict())  # what was packed from the old weight must not stay
    assert torch.equal(layer(x), other(x))


@pytest.mark.gpu
def test_layers_on_a_gpu(model, tmp_path):
    list(quantize_model(model, METHODS["minmax"], 16))
    tokens = torch.arange(20).view(1, 20)
    expected = model(tokens)
    settings = gptq_format.describe("minmax", 16, False)
    checkpoint.save(model, tmp_path / "cpu", quantization=settings)
    model.to("cuda")
    assert {name for name, _ in model.h[0].mlp.c_fc.named_buffers()} == {"codes", "scale_zeros", "row_scales"}
    checkpoint.save(model, tmp_path / "gpu", quantization=settings)
    assert same_tensors(tmp_path / "gpu", tmp_path / "cpu")
    assert (model.half()(tokens.cuda()).cpu() - expected).abs().max() < 0.02
    assert model.h[0].mlp.c_fc.row_scales.dtype == torch.float32
    assert {name for name, _ in model.cpu().h[0].mlp.c_fc.named_buffers()} == {"qweight", "scales", "qzeros"}


def test_better_methods_lose_less_on_the_trained_model():
    """On the demo's real weights: mse beats minmax, smaller groups beat larger ones."""
    errors = {}
    for method, group_size in [("absmax", 128), ("minmax", 128), ("mse", 128), ("mse", 32), ("mse", WHOLE_ROW)]:
        model = checkpoint.load(checkpoint.DEMO_FOLDER, torch.float32)
        reports = list(quantize_model(model, METHODS[method], group_size))
        errors[method, group_size] = sum(report.relative_error for report in reports)
    assert errors["mse", 128] < errors["minmax", 128] < errors["absmax", 128]
    assert errors["mse", 32] < errors["mse", 128] < errors["mse", WHOLE_ROW]


def test_group_sizes_that_do_not_fit_are_named_with_those_that_do(model):
    with pytest.raises(UserError, match="--group-size 32 .*in_features 48 and 192; possible: 16, 48, row"):
        quantize_model(model, METHODS["mse"], 32)


def test_a_model_whose_rows_no_group_fits():
    model = GPT(GPTConfig(vocab_size=71, n_positions=24, n_embd=24, n_layer=1, n_head=3))
    for size in (16, WHOLE_ROW):
        with pytest.raises(UserError, match="cannot be int4: .* in_features, 24 and 96, are no multiples of 16"):
            quantize_model(model, METHODS["mse"], size)


def test_a_model_that_is_int4_already(model):
    list(quantize_model(model, METHODS["mse"], 16))
    with pytest.raises(UserError, match="int4 already"):
        quantize_model(model, METHODS["mse"], 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_anything_changes(model, value):
    model.h[1].mlp.c_fc.weight.data[3, 4] = value
    with pytest.raises(UserError, match="h.1.mlp.c_fc"):
        quantize_model(model, METHODS["mse"], 16)
    assert not any(isinstance(module, Int4Linear) for module in model.modules())


def test_how_a_checkpoint_was_made():
    assert gptq_format.made_how(gptq_format.describe("gptaq", 128, False, "int8")) == (
        "gptaq, groups of 128, embedding int8"
    )
    for foreign in ({"group_size": WHOLE_ROW}, {"group_size": WHOLE_ROW, "meta": "of another tool"}):
        assert gptq_format.made_how(foreign) == "method unknown, a group a row, embedding fp16"
