"""The READMEs: their tables come from results/, and the files they link to exist."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

READMES = [ROOT / folder / "README.md" for folder in (".", "kernels", "minigpt/demo", "results")]


def test_tables_are_those_of_the_results():
    result = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_commands_of_the_readme_exist():
    """Every `make` target and every script named in the README is there."""
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python3? -m ((?:minigpt|kernels)[\w.]*)", text):
        assert find_spec(module), module
