"""Downloads by the real libraries, from a stand-in for the Hugging Face hub on 127.0.0.1.

huggingface_hub and datasets read their environment when they are imported, so each test starts processes of its own.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import ROOT
from hub_server import closed_port, running_hub
from pyarrow import parquet

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.data import WIKITEXT_REVISION
from minigpt.model import GPT

GPT2 = "openai-community/gpt2"
GPT2_REVISION = checkpoint.HUB_REVISIONS["gpt2"]
RESOLVE_GPT2 = "from minigpt import checkpoint; print(checkpoint.resolve('gpt2'))"

WIKITEXT = "datasets/Salesforce/wikitext"
CONFIGS = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
SPLITS = ("test", "train", "validation")
ROWS = ["", " = Robert Boulter = \n", "", ' He said : " naïve \u2028 <unk> \t " 東京 \n', " \n", "\r\n"]
PRINT_ROWS = "from minigpt import data; print(ascii(data.wikitext_rows('wikitext-2', 'test')))"


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def dead_end():
    """A URL that refuses connections."""
    with closed_port() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def run(tmp_path, dead_end):
    """Runs Python in tmp_path: nothing is cached, no host but 127.0.0.1 is reached, the caller's settings are gone."""
    theirs = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TIKTOKEN_", "DATA_GYM_", "XDG_", "MINIGPT_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(theirs) and not name.lower().endswith("_proxy")
    }
    # huggingface_hub waits 23 s in all before it gives a hub up. Python imports sitecustomize as it starts.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import time\ntime.sleep = lambda seconds: None\n", encoding="utf-8"
    )
    environment |= {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}",
        "http_proxy": dead_end,
        "https_proxy": dead_end,
        "no_proxy": "127.0.0.1",
    }

    def run(*arguments, **settings):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment | settings, capture_output=True, timeout=100)

    return run


def output(result):
    """What a process printed that went well."""
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


def check_error(result, *words):
    """The process ended with one line for the user that has all the words; libraries may have warned before it."""
    stderr = result.stderr.decode()
    lines = stderr.rstrip("\n").split("\n")
    assert result.returncode == 2, stderr
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[-1]
    assert result.stdout == b""


def serve_gpt2(hub, tmp_path):
    """Puts a tiny model at the hub in GPT-2's place; gives the model, rounded as its file is."""
    model = GPT(GPTConfig(vocab_size=50, n_positions=16, n_embd=64, n_layer=2, n_head=2)).half().float().eval()
    checkpoint.save(model, tmp_path / "served")
    files = {name: (tmp_path / "served" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.repositories[GPT2] = (GPT2_REVISION, files)
    return model


def wikitext_card():
    """The head of the repository's README.md: how many rows each configuration has, and where its files are."""
    features = "  features:\n  - name: text\n    dtype: string\n"
    counts = "".join(f"  - name: {split}\n    num_bytes: 99\n    num_examples: {len(ROWS)}\n" for split in SPLITS)
    sizes = "  download_size: 999\n  dataset_size: 297\n"
    card = "---\nlanguage:\n- en\npretty_name: WikiText\ndataset_info:\n"
    card += "".join(f"- config_name: {name}\n{features}  splits:\n{counts}{sizes}" for name in CONFIGS)
    card += "configs:\n"
    for name in CONFIGS:
        card += f"- config_name: {name}\n  data_files:\n"
        card += "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in SPLITS)
    return card + "---\n\n# Dataset Card for WikiText\n"


def parquet_file(rows):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": rows}), file)
    return file.getvalue()


def serve_wikitext(hub):
    """Puts tiny files at the hub in WikiText's place; wikitext-2-raw-v1's test split, and no other, has ROWS."""
    files = {"README.md": wikitext_card().encode()}
    for name in CONFIGS:
        for split in SPLITS:
            rows = ROWS if (name, split) == ("wikitext-2-raw-v1", "test") else [f"{name} {split}"] * len(ROWS)
            files[f"{name}/{split}-00000-of-00001.parquet"] = parquet_file(rows)
    hub.repositories[WIKITEXT] = (WIKITEXT_REVISION, files)


def test_pretrained_model_is_downloaded_once(run, hub, tmp_path):
    served = serve_gpt2(hub, tmp_path)
    folder = output(run("-c", RESOLVE_GPT2, HF_ENDPOINT=hub.url))
    assert folder.startswith(str(tmp_path / "hf")) and folder.endswith(GPT2_REVISION)
    assert hub.bodies() == ["config.json", "model.safetensors"]
    loaded = checkpoint.load(Path(folder), torch.float32)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens)[0], served(tokens)[0])

    assert output(run("-c", RESOLVE_GPT2, HF_ENDPOINT=hub.url)) == folder
    assert output(run("-c", RESOLVE_GPT2, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")) == folder
    assert len(hub.bodies()) == 2


def test_broken_download_goes_on_where_it_stopped(run, hub, tmp_path):
    serve_gpt2(hub, tmp_path)
    body = os.urandom(24 << 20)  # the library writes 10 MiB at a time, and goes on behind what it has written
    hub.repositories[GPT2][1]["model.safetensors"] = body
    hub.breaks = 1
    folder = Path(output(run("-c", RESOLVE_GPT2, HF_ENDPOINT=hub.url)))
    assert (folder / "model.safetensors").read_bytes() == body
    assert len(hub.resumed) == 1 and hub.resumed[0] >= 10 << 20


def test_wikitext_rows_come_back_exactly(run, hub):
    serve_wikitext(hub)
    assert output(run("-c", PRINT_ROWS, HF_ENDPOINT=hub.url)) == ascii(ROWS)
    assert "test-00000-of-00001.parquet" in hub.bodies()

    requests = len(hub.requests)
    assert output(run("-c", PRINT_ROWS, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")) == ascii(ROWS)
    assert len(hub.requests) == requests


def test_quantize_without_a_hub_says_what_works_without(run, dead_end, tmp_path):
    result = run(ROOT / "quantize.py", "gpt2", HF_ENDPOINT=dead_end)
    check_error(result, GPT2, "quantize.py demo")
    assert not (tmp_path / "checkpoints").exists()


def test_eval_without_a_hub_says_what_works_without(run, dead_end):
    output(run(ROOT / "quantize.py", "demo", "--method", "absmax", "--output", "int4"))
    result = run(ROOT / "eval.py", "demo", "--dataset", "wikitext-2", "--quantized", "int4", HF_ENDPOINT=dead_end)
    check_error(result, "wikitext-2", "--dataset demo")


FAULTS = {
    "no repository": lambda hub: hub.repositories.clear(),
    "no such commit": lambda hub: hub.repositories.update({GPT2: ("0" * 40, {})}),
    "no weights": lambda hub: hub.repositories[GPT2][1].pop("model.safetensors"),
    "weights cut short": lambda hub: setattr(hub, "breaks", 1000),
    "404": lambda hub: setattr(hub, "broken", 404),
    "500": lambda hub: setattr(hub, "broken", 500),
}


@pytest.mark.parametrize("break_hub", FAULTS.values(), ids=FAULTS.keys())
def test_failing_hub_gives_one_line_and_writes_nothing(run, hub, tmp_path, break_hub):
    serve_gpt2(hub, tmp_path)
    break_hub(hub)
    result = run(ROOT / "quantize.py", "gpt2", "--output", tmp_path / "outputs" / "int4", HF_ENDPOINT=hub.url)
    check_error(result, GPT2, "quantize.py demo")
    assert any("config.json" in request for request in hub.requests)
    assert not list((tmp_path / "outputs").rglob("*"))
    assert not list((tmp_path / "hf").rglob("model.safetensors"))  # nor half a model in the cache
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_unreachable_vocabulary_is_a_user_error(run, tmp_path):
    (tmp_path / "tiktoken").mkdir()
    code = "from minigpt import errors, tokenizer; errors.run_script(tokenizer.gpt2_tokenizer)"
    check_error(run("-c", code, TIKTOKEN_CACHE_DIR=str(tmp_path / "tiktoken")), "vocabulary", "TIKTOKEN_CACHE_DIR")
    assert not list((tmp_path / "tiktoken").iterdir())
