"""The directions in which imports may run: scripts -> minigpt -> kernels, and no further than the house allows."""

import ast
import re

import pytest
from conftest import ROOT

REFERENCE = "kernels.k00_reference"
SHARED = {
    f"kernels.{name}"
    for name in ("common", "prepared", "activations", "parts", "int8", "rings", "row_tiles", "stream")
}  # fmt: skip
LESSON = re.compile(r"k\d\d_\w+")


def imports(path):
    """All modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton_only(path):
    allowed = {"torch", "triton", "kernels"}
    import sys

    allowed |= {"bench.py": {"tqdm", "gemlite"}, "plots.py": {"matplotlib"}}.get(path.name, set())
    for name in imports(path):
        assert name.split(".")[0] in allowed | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_lessons_import_only_what_they_share(path):
    """The reference, the harness, formats and layouts, and pieces of kernels; never another lesson."""
    name = f"kernels.{path.stem}"
    used = {".".join(used.split(".")[:2]) for used in imports(path) if used.startswith("kernels.")}
    if name == REFERENCE:
        assert not used
    elif name in SHARED or LESSON.fullmatch(path.stem):
        # `from kernels import parts` names a module, `from kernels import Int8Weight` what the package has made public.
        modules = {module for module in used if (ROOT / f"{module.replace('.', '/')}.py").exists()}
        assert modules <= SHARED | {REFERENCE}


@pytest.mark.parametrize("path", files("minigpt"), ids=lambda p: p.name)
def test_only_quantization_imports_kernels_and_by_its_public_names(path):
    import kernels

    used = [name for name in imports(path) if name.split(".")[0] == "kernels"]
    if path.parent.name != "quantization":
        assert not used
    assert set(used) <= {"kernels", *(f"kernels.{name}" for name in kernels.__all__)}


def test_the_model_knows_nothing_of_quantization():
    assert not any("quantization" in name for name in imports(ROOT / "minigpt" / "model.py"))


@pytest.mark.parametrize("path", [*files("kernels"), *files("minigpt")], ids=lambda p: p.name)
def test_nothing_below_imports_a_script(path):
    scripts = {"quantize", "eval", "train"}
    assert not scripts & {name.split(".")[0] for name in imports(path)}
