"""What all tests share: random data, poisoned outputs, and where the text for tests lies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels  # noqa: F401  chooses Triton's interpreter where there is no GPU, before Triton is imported

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if os.environ.get("MINIGPT_DATA"):  # tests run scripts in folders of their own, where a relative path leads elsewhere
    os.environ["MINIGPT_DATA"] = str(Path(os.environ["MINIGPT_DATA"]).resolve())


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu need one."""
    if DEVICE.type != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU (make test-gpu)"))


@pytest.fixture(scope="module")
def compiled(request):
    """What kernels compile to for GPUs that are not here: what the test's file, or its PROGRAM, prints as a program.

    A program of its own, as Triton's interpreter is chosen once for all and compiles nothing.
    """
    folder = request.path.parent
    program = folder / getattr(request.module, "PROGRAM", request.path.name)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


@pytest.fixture
def text_folder():
    """MINIGPT_DATA: a folder with wikitext-2/ and tiktoken/."""
    folder = os.environ.get("MINIGPT_DATA")
    if not folder:
        if os.environ.get("CI"):
            pytest.fail("in CI the environment variable MINIGPT_DATA must name a folder with wikitext-2/ and tiktoken/")
        pytest.skip("MINIGPT_DATA names no folder with wikitext-2/ and tiktoken/")
    return Path(folder)


class Canary:
    """Stands in for torch.empty: gives tensors filled with garbage, with more garbage before and after them.

    A kernel that leaves an element unwritten, or that writes outside its output, is found out. (Triton's interpreter
    does not notice the latter by itself.)
    """

    MARGIN = 64

    def __init__(self):
        self.outputs = []
        self.torch_empty = torch.empty

    def __call__(self, *size, dtype=None, device=None, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        buffer = self.torch_empty((int(torch.Size(shape).numel()) + 2 * self.MARGIN,), dtype=dtype, device=device)
        buffer.fill_(float("nan") if buffer.is_floating_point() else self.garbage(buffer.dtype))
        self.outputs.append(buffer)
        return buffer[self.MARGIN : -self.MARGIN].view(shape)

    @staticmethod
    def garbage(dtype):
        """A whole number that no kernel writes: 8-bit activations reach from -127 to 127."""
        return -128 if dtype == torch.int8 else 0x5A5A5A5A

    def check(self):
        """No output holds garbage inside, and all hold it still outside."""
        assert self.outputs, "the launcher allocated nothing"
        for buffer in self.outputs:
            garbage = buffer.isnan() if buffer.is_floating_point() else buffer == self.garbage(buffer.dtype)
            assert garbage[: self.MARGIN].all(), "something wrote before the output"
            assert garbage[-self.MARGIN :].all(), "something wrote behind the output"
            assert not garbage[self.MARGIN : -self.MARGIN].any(), "an element of the output was not written"


@pytest.fixture
def canary(monkeypatch):
    """While a test runs, outputs are allocated poisoned and watched."""
    canary = Canary()
    monkeypatch.setattr(torch, "empty", canary)
    yield canary
    monkeypatch.undo()
