"""The front door: which lesson it picks, what it computes without one, and that torch.compile can call it."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, ROOT

import kernels
from kernels import front_door

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
FORMS = {"file": lambda weight: weight, "prepared": kernels.prepare}


def problem(*shape, n=24, group_size=32, dtype=torch.float32, device="cpu"):
    """x of `shape`, a weight that fits it, a bias, and their product in float64."""
    x = torch.randn(shape).to(device, dtype)
    weight = kernels.quantize(torch.randn(n, shape[-1]).to(device), group_size)
    bias = torch.randn(n).to(device, dtype)
    expected = x.double() @ kernels.dequantize(weight, torch.float32).double().t() + bias.double()
    return x, weight, bias, expected


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


# ---- which lesson


@pytest.mark.parametrize(
    ("gpu", "bits", "m", "n", "k", "group_size", "lesson"),
    [
        ("sm_90", 16, 1, 2304, 768, 64, "k17_few_tokens"),
        ("sm_90", 16, 1, 8192, 8192, 128, "k17_few_tokens"),
        ("sm_90", 16, 1, 5000, 6400, 64, "k17_few_tokens"),
        ("sm_90", 16, 8, 50304, 4096, 128, "k17_few_tokens"),
        ("sm_90", 16, 8, 1600, 6400, 64, "k17_few_tokens"),
        ("sm_90", 16, 8, 4096, 8192, 64, "k17_few_tokens"),
        ("sm_90", 16, 8, 4100, 6400, 64, "k22_two_rings"),
        ("sm_90", 16, 1, 8192, 12800, 64, "k10_gemv"),
        ("sm_90", 16, 16, 4800, 1600, 64, "k22_two_rings"),
        ("sm_90", 16, 16, 2048, 2048, 64, "k17_few_tokens"),
        ("sm_90", 16, 9, 6400, 1600, 64, "k22_two_rings"),
        ("sm_90", 16, 16, 6400, 1600, 64, "k22_two_rings"),
        ("sm_90", 16, 9, 8192, 2048, 128, "k22_two_rings"),
        ("sm_90", 16, 16, 50304, 768, 64, "k22_two_rings"),
        ("sm_90", 16, 32, 16384, 2048, 64, "k22_two_rings"),
        ("sm_90", 16, 16, 2048, 8192, 128, "k22_two_rings"),
        ("sm_90", 16, 64, 512, 2048, 128, "k22_two_rings"),
        ("sm_90", 16, 64, 2048, 2048, 128, "k22_two_rings"),
        ("sm_90", 16, 9, 1600, 6400, 64, "k22_two_rings"),  # 16 tokens of so many columns are too many for lesson 17
        ("sm_90", 16, 17, 768, 768, 64, "k22_two_rings"),
        ("sm_90", 16, 32, 768, 3072, 64, "k22_two_rings"),
        ("sm_90", 16, 64, 50257, 768, 64, "k09_split_k"),
        ("sm_90", 16, 2048, 1600, 1600, 64, "k11_dequantize_gemm"),
        ("sm_90", 16, 1, 768, 768, 32, "k10_gemv"),
        ("sm_90", 16, 2, 768, 768, 96, "k09_split_k"),
        ("sm_90", 8, 1, 768, 768, 64, "k17_few_tokens"),  # to round its token would take longer
        ("sm_100", 16, 1, 768, 768, 64, "k10_gemv"),
        ("gfx942", 16, 1, 768, 768, 768, "k10_gemv"),
        ("sm_90", 16, 32, 8192, 8192, 128, "k22_two_rings"),
        ("sm_90", 16, 33, 8192, 8192, 64, "k22_two_rings"),
        ("sm_90", 16, 128, 8192, 8192, 128, "k22_two_rings"),
        ("sm_90", 16, 129, 8192, 8192, 64, "k12_hopper"),
        ("sm_90", 16, 128, 8192, 8192, 32, "k09_split_k"),
        ("sm_90", 16, 256, 8192, 2048, 128, "k22_two_rings"),
        ("sm_90", 16, 257, 8192, 2048, 128, "k12_hopper"),
        ("sm_90", 16, 512, 2048, 8192, 128, "k22_two_rings"),
        ("sm_90", 16, 513, 2048, 8192, 128, "k11_dequantize_gemm"),
        ("sm_90", 16, 2048, 512, 2048, 64, "k22_two_rings"),
        ("sm_90", 16, 2048, 8192, 2048, 64, "k12_hopper"),  # 512 tiles in 4 rounds
        ("sm_90", 16, 2048, 6400, 1600, 64, "k11_dequantize_gemm"),  # 400 tiles in 4 rounds
        ("sm_90", 16, 512, 6400, 1600, 64, "k12_hopper"),  # 100 tiles in a round
        ("sm_90", 16, 8192, 8192, 8192, 128, "k11_dequantize_gemm"),
        ("sm_90", 16, 2048, 8192, 8192, 32, "k11_dequantize_gemm"),
        ("sm_90", 16, 128, 512, 2048, 64, "k22_two_rings"),
        ("sm_90", 16, 1, 50257, 768, 64, "k17_few_tokens"),
        ("sm_90", 16, 8, 50257, 768, 64, "k09_split_k"),  # no multiple of 4
        ("sm_90", 16, 128, 50257, 768, 64, "k09_split_k"),
        ("sm_90", 16, 257, 50257, 768, 64, "k12_hopper"),
        ("sm_90", 16, 128, 32000, 1600, 64, "k22_two_rings"),
        ("sm_90", 16, 129, 32000, 1600, 64, "k12_hopper"),
        ("sm_90", 8, 2048, 8192, 8192, 64, "k23_w4a8_rings"),
        ("sm_90", 8, 2048, 8192, 8192, 32, "k13_w4a8"),
        ("sm_90", 8, 48, 8192, 8192, 64, "k23_w4a8_rings"),
        ("sm_90", 8, 47, 8192, 8192, 64, "k22_two_rings"),
        ("sm_90", 8, 10**6, 1280, 1280, 64, "k11_dequantize_gemm"),  # too small a weight
        ("sm_90", 8, 2048, 1600, 1600, 64, "k23_w4a8_rings"),
        ("sm_120", 16, 256, 8192, 8192, 64, "k09_split_k"),
        ("sm_100", 16, 257, 8192, 8192, 64, "k11_dequantize_gemm"),
        ("sm_86", 8, 8192, 3072, 768, 16, "k13_w4a8"),
        ("sm_86", 8, 8192, 768, 768, 16, "k11_dequantize_gemm"),
        ("sm_86", 8, 1, 768, 768, 16, "k10_gemv"),
        ("sm_75", 8, 8192, 768, 768, 16, "k11_dequantize_gemm"),
        ("sm_75", 16, 10**6, 50257, 1600, 64, "k11_dequantize_gemm"),
    ],
)
def test_choose_lesson(gpu, bits, m, n, k, group_size, lesson):
    assert front_door.choose_lesson(gpu, bits, m, n, k, group_size, 132) == lesson


# What their launchers refuse: group sizes that are no multiples of 64, more tokens, longer rows.
OF_WHOLE_BLOCKS = ("k12_hopper", "k17_few_tokens", "k22_two_rings", "k23_w4a8_rings")


@pytest.mark.parametrize("group_size", [16, 48, 64, 96, 128, 192, 320, 512, 1600, 4096])
@pytest.mark.parametrize("gpu", ["sm_75", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_rule_picks_a_lesson_that_refuses(gpu, group_size):
    for m in (1, 2, 8, 9, 16, 17, 32, 33, 80, 81, 256, 257, 384, 385, 1024, 1025, 4095, 4096, 100_000):
        for n in (1, 3, 64, 201, 768, 2048, 4096, 4097, 5120, 5121, 8192, 50257):
            for k in [group_size * groups for groups in (1, 2, 3, 5, 8, 16, 25, 32, 64, 128, 200)]:
                lesson = front_door.choose_lesson(gpu, 16, m, n, k, group_size, 132)
                assert lesson not in OF_WHOLE_BLOCKS or (gpu == "sm_90" and group_size % 64 == 0)
                assert lesson != "k10_gemv" or m == 1
                if lesson == "k17_few_tokens":
                    assert m <= 16 and k <= (8192 if m <= 8 else 4096)
                lesson = front_door.choose_lesson(gpu, 8, m, n, k, group_size, 132)
                assert lesson not in OF_WHOLE_BLOCKS or (gpu == "sm_90" and group_size % 64 == 0)
                assert lesson != "k13_w4a8" or gpu != "sm_75"


def test_lesson_12_is_chosen_where_its_tiles_fill_the_machine():
    """128 tiles of 256 x 128 almost fill an H200; an H100 that is a PCIe card makes them in two rounds."""
    lessons = [front_door.choose_lesson("sm_90", 16, 1024, 4096, 4096, 128, count) for count in (132, 114)]
    assert lessons == ["k12_hopper", "k11_dequantize_gemm"]


@pytest.mark.parametrize("lesson", sorted({rule.lesson for rule in front_door.RULES}))
def test_lessons_of_the_table_exist(lesson):
    assert (ROOT / "kernels" / f"{lesson}.py").exists()


def test_a_gradient_is_refused():
    """Rather than left out."""
    x, weight, _, _ = problem(3, 64, dtype=torch.float32)
    x.requires_grad_()
    int8 = kernels.quantize_int8(torch.randn(5, 64, device=x.device))
    for out in (kernels.matmul(x, kernels.prepare(weight)), kernels.matmul_int8(x, int8)):
        with pytest.raises(RuntimeError, match="no gradients"):
            (out.sum() + x.sum()).backward()


@pytest.fixture
def rounds(monkeypatch):
    """Has the front door round activations of any number, where it may, not only of so many that it pays."""
    at_all = {"least_work": 0, "least_weight": 0}
    rules = tuple(rule._replace(**at_all) if rule.activation_bits == 8 else rule for rule in front_door.RULES)
    monkeypatch.setattr(front_door, "RULES", rules)
    front_door.choose_lesson.cache_clear()
    yield
    front_door.choose_lesson.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Makes the front door take a CPU for a GPU of some architecture: the lessons run in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux only")

    def pretend(name):
        monkeypatch.setattr(front_door, "_serves", lambda x: True)
        monkeypatch.setattr(front_door, "architecture", lambda device: name)

    return pretend


@pytest.mark.usefixtures("rounds")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="runs lessons in the interpreter")
@pytest.mark.parametrize("name", ["sm_75", "sm_86", "sm_90"])
@pytest.mark.parametrize(("shape", "n"), [((1, 128), 24), ((3, 5, 128), 24), ((300, 64), 9)])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_lessons_are_called_as_they_want_it(gpu, name, shape, n, activation_bits):
    gpu(name)
    x, weight, bias, expected = problem(*shape, n=n, dtype=torch.float16)
    out = kernels.matmul(x, kernels.prepare(weight), bias, activation_bits)
    assert out.shape == expected.shape and out.dtype == x.dtype
    rounded = activation_bits == 8 and name != "sm_75"  # which is too old for lesson 13
    least, most = (4e-3, 0.02) if rounded else (0, 1e-3)
    assert least <= relative_error(out, expected) < most


def test_when_lesson_9_is_tuned(gpu, monkeypatch):
    gpu("sm_86")
    from kernels import k09_split_k, k14_autotune

    seen = []
    monkeypatch.setattr(k14_autotune, "tuned_options", lambda *args: {"NUMBER": len(args)})
    monkeypatch.setattr(k09_split_k, "matmul", lambda x, weight, bias, options=None: seen.append(options) or x.clone())
    x, weight, bias, _ = problem(2, 64, dtype=torch.float16)
    prepared = kernels.prepare(weight)
    kernels.matmul(x, prepared, bias)
    gpu("sm_90")
    kernels.matmul(x, prepared, bias)
    monkeypatch.setenv("MINIGPT_AUTOTUNE", "1")
    kernels.matmul(x, prepared, bias)
    assert seen == [{"NUMBER": 4}, None, {"NUMBER": 4}]


# ---- what it computes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 5, 128), (2, 0, 128), (70, 96)])
def test_matmul(form, dtype, shape):
    x, weight, bias, expected = problem(*shape, dtype=dtype)
    weight = FORMS[form](weight)
    out = kernels.matmul(x, weight, bias)
    assert out.shape == expected.shape and out.dtype == dtype
    if out.numel():
        assert relative_error(out, expected) < TOLERANCE[dtype]
        assert relative_error(kernels.matmul(x, weight), expected - bias.double()) < TOLERANCE[dtype]


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bit_activations(form, dtype):
    x, weight, bias, expected = problem(3, 5, 128, dtype=dtype)
    out = kernels.matmul(x, FORMS[form](weight), bias, activation_bits=8)
    assert out.dtype == dtype and 1e-3 < relative_error(out, expected) < 0.02
    assert kernels.matmul(x[:, :0], FORMS[form](weight), bias, activation_bits=8).shape == (3, 0, 24)


def test_quantize_activations():
    """Whole numbers are their own codes where the largest is 127; halves go to the even neighbour."""
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 3.0], [0.0] * 6, [254.0, 1.0, 3.0, 5.0, -7.0, 8.0]])
    codes, scales = front_door.quantize_activations(x)
    assert codes.tolist() == [[127, -127, 0, 2, -2, 3], [0] * 6, [127, 0, 2, 2, -4, 4]]
    assert scales.tolist() == [[1.0], [0.0], [2.0]]


OTHER = {torch.float32: torch.float16, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_another_dtype(form, dtype):
    x, weight, bias, expected = problem(3, 64, dtype=dtype)
    out = kernels.matmul(x, FORMS[form](weight), bias.to(OTHER[dtype]))
    assert out.dtype == dtype and relative_error(out, expected) < max(1e-3, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 64, 300, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_another_dtype_on_a_gpu(m, dtype):
    x, weight, bias, expected = problem(m, 256, n=128, group_size=64, dtype=dtype, device="cuda")
    out = kernels.matmul(x, kernels.prepare(weight), bias.to(OTHER[dtype]))
    assert out.dtype == dtype and relative_error(out, expected) < max(1e-3, TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 32)}, r"\[3, 32\].*in_features 64"),
        ({"x": torch.zeros(())}, "in_features 64"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "float64"),
        ({"bias": torch.zeros(1, 24)}, r"\[1, 24\].*\[24\]"),
        ({"activation_bits": 4}, "activation_bits is 4"),
    ],
)
def test_errors_name_what_does_not_fit(form, change, message):
    x, weight, bias, _ = problem(3, 64)
    with pytest.raises(ValueError, match=message):
        kernels.matmul(**{"x": x, "weight": FORMS[form](weight), "bias": bias, **change})


# ---- the operator


def operator_arguments(x, weight, bias, activation_bits):
    return (x, *kernels.prepare(weight), bias, activation_bits)


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (0, 64)])
def test_opcheck(dtype, activation_bits, shape):
    x, weight, bias, _ = problem(*shape, dtype=dtype, device=DEVICE)
    for each in (bias, None):
        torch.library.opcheck(
            torch.ops.minigpt.int4_matmul.default, operator_arguments(x, weight, each, activation_bits)
        )


def test_opcheck_of_an_input_that_is_not_contiguous():
    x, weight, bias, _ = problem(64, 3, 64, device=DEVICE)
    x = x.transpose(0, 1)
    torch.library.opcheck(torch.ops.minigpt.int4_matmul.default, operator_arguments(x, weight, bias, 16))


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_compiles_without_a_graph_break(form, activation_bits):
    x, weight, bias, _ = problem(3, 5, 64, dtype=torch.float16, device=DEVICE)
    weight = FORMS[form](weight)

    def layer(x):
        return kernels.matmul(x * 2, weight, bias, activation_bits).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 3, 2):
        assert torch.equal(compiled(x[:, :length]), layer(x[:, :length]))


# ---- tuning (the rest of lesson 14 is in its --check)


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Lesson 14 on a pretended GPU, where the candidate with the largest number is the fastest."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from kernels import k14_autotune

    timed = []

    def time_options(matmul, x, weight, options):
        timed.append(options)
        return 10.0 - options["NUMBER"]

    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(k14_autotune, "_remembered", {})
    monkeypatch.setattr(k14_autotune, "time_options", time_options)
    monkeypatch.setattr(k14_autotune, "gpu_name", lambda device: "some GPU")
    monkeypatch.setattr(k14_autotune.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight = kernels.prepare(kernels.quantize(torch.randn(24, 64), 32))

    def run(m, is_cuda=True):
        x = SimpleNamespace(shape=(m, 64), numel=lambda: m * 64, device=None, is_cuda=is_cuda)
        candidates = [{"NUMBER": number} for number in (1, 3, 2)]
        return k14_autotune.tuned_options(front_door.matmul, lambda m, n, k, group_size: candidates, x, weight)

    return SimpleNamespace(run=run, timed=timed, module=k14_autotune, file=tmp_path / "cache" / "autotune.json")


def test_a_shape_is_tuned_once(tune, capsys):
    assert [tune.run(m) for m in (9, 16, 10)] == [{"NUMBER": 3}] * 3 and len(tune.timed) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "M<=16|24x64|32: 3 candidates ... 7.0 us" in line
    assert list(json.loads(tune.file.read_text()).values()) == [{"NUMBER": 3}]
    assert [path.name for path in tune.file.parent.iterdir()] == ["autotune.json"]
    tune.run(17)
    assert len(tune.timed) == 6 and len(json.loads(tune.file.read_text())) == 2


def test_where_nothing_is_tuned(tune, monkeypatch):
    assert tune.run(4, is_cuda=False) is None
    monkeypatch.setattr(tune.module.triton.knobs.runtime, "interpret", True)
    assert tune.run(4) is None
    monkeypatch.setattr(tune.module.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.run(4) is None and not tune.timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tune.run(4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.run(4) == {"NUMBER": 3} and len(tune.timed) == 3


def test_a_broken_file_is_a_warning(tune):
    tune.file.parent.mkdir()
    tune.file.write_text("[" * 100_000)
    with pytest.warns(UserWarning, match="autotune.json cannot be read"):
        assert tune.run(4) == {"NUMBER": 3}
    assert len(json.loads(tune.file.read_text())) == 1


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_folder_that_cannot_be_written_is_a_warning(tune, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="autotune.json cannot be written"):
        assert tune.run(4) == {"NUMBER": 3}


# ---- on a GPU


@pytest.mark.usefixtures("rounds")
@pytest.mark.gpu
@pytest.mark.parametrize("autotune", ["0", "1"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("group_size", [32, 64, 1600])
@pytest.mark.parametrize("n", [1000, 1001])
@pytest.mark.parametrize("m", [0, 1, 2, 9, 17, 64, 300, 2048])
def test_every_lesson_on_a_gpu(monkeypatch, tmp_path, autotune, dtype, activation_bits, group_size, n, m):
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("MINIGPT_AUTOTUNE", autotune)
    x, weight, bias, expected = problem(m, 1600, n=n, group_size=group_size, dtype=dtype, device=DEVICE)
    least, most = (0, max(TOLERANCE[dtype], 1e-5)) if activation_bits == 16 else (4e-3, 0.03)
    for form in FORMS.values():
        out = kernels.matmul(x, form(weight), bias, activation_bits)
        assert out.shape == expected.shape and out.dtype == dtype
        assert m == 0 or least <= relative_error(out, expected) < most


@pytest.mark.usefixtures("rounds")
@pytest.mark.gpu
@pytest.mark.parametrize("autotune", ["0", "1"])
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("m", [1, 5, 12, 300])
def test_captured_in_a_graph(monkeypatch, tmp_path, autotune, activation_bits, m):
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("MINIGPT_AUTOTUNE", autotune)
    x, weight, bias, _ = problem(m, 1024, n=1000, group_size=64, dtype=torch.float16, device=DEVICE)
    kernels.matmul(x, kernels.prepare(weight), bias, activation_bits)  # compiles, and tunes
    prepared = kernels.prepare(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.matmul(x, prepared, bias, activation_bits)
    x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, kernels.matmul(x, prepared, bias, activation_bits))


@pytest.mark.usefixtures("rounds")
@pytest.mark.gpu
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("m", [1, 8, 16, 128, 1024])
def test_a_chain_of_products_whose_launches_overlap(activation_bits, m):
    """In a graph, where each launch lets the next one begin early, and as it is when each waits for the one ahead."""
    shapes = [(2048, 8192), (2048, 2048), (8192, 2048)] * 3
    weights = [kernels.prepare(kernels.quantize(torch.randn(n, k, device=DEVICE) / k**0.5, 64)) for n, k in shapes]
    start = torch.randn(m, 8192, device=DEVICE).half()

    def chain(after_each):
        x = start
        for weight in weights:
            x = kernels.matmul(x, weight, None, activation_bits)
            after_each()
        return x

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.usefixtures("rounds")
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("m", [1, 5, 300])
def test_compiled_by_inductor(mode, activation_bits, m):
    """A weight that nothing was multiplied with before."""
    x, weight, bias, expected = problem(m, 1024, n=1000, group_size=64, dtype=torch.float16, device=DEVICE)
    prepared = kernels.prepare(weight)
    compiled = torch.compile(
        lambda x: kernels.matmul(x, prepared, bias, activation_bits) * 1, fullgraph=True, mode=mode
    )
    for _ in range(4):  # reduce-overhead captures in the second or third
        assert relative_error(compiled(x), expected) < (2e-3 if activation_bits == 16 else 0.03)
