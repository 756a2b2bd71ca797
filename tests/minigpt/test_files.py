"""Results on disk."""

import json
from pathlib import Path

import pytest

from minigpt import files
from minigpt.errors import UserError


def test_json_is_written(tmp_path):
    files.write_json(tmp_path / "out.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"a": [1, 2.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(UserError, match="out.json is not written: a result is NaN or infinite"):
        files.write_json(tmp_path / "out.json", {"perplexity": value})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text("old", encoding="utf-8")

    def full_disk(path, text, encoding):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "out.json", {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.json", b"old")]


def test_rows_that_others_added_meanwhile_stay(tmp_path):
    path = tmp_path / "out.json"
    for row in ({"name": "a", "value": 1}, {"name": "b", "value": 2}, {"name": "a", "value": 3}):
        files.add_row("--json", path, row, ("name",))
    assert json.loads(path.read_text(encoding="utf-8")) == [{"name": "a", "value": 3}, {"name": "b", "value": 2}]


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    files.check_file("--json", tmp_path / "out.json")
    with pytest.raises(UserError, match="--json .* is a folder"):
        files.check_file("--json", tmp_path)
    with pytest.raises(UserError, match="--json .*: there is no folder"):
        files.check_file("--json", tmp_path / "no" / "out.json")
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"--json .*: no permission to write to {tmp_path}"):
        files.check_file("--json", tmp_path / "out.json")
