"""The record of a start: right versions, right repository, and never an error."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from moesaic.train.environment import environment, package_versions, repositories


def test_environment_is_plain_json_with_the_facts():
    entry = environment(["moesaic", "train", "a b.yaml"], threads=3)
    assert json.loads(json.dumps(entry)) == entry
    assert entry["command"] == "moesaic train 'a b.yaml'"
    assert entry["threads"] == 3
    assert entry["folder"] == str(Path.cwd())
    assert entry["cpu"]


def test_versions_cover_what_is_required():
    versions = package_versions()
    if not versions:
        pytest.skip("runs from a bare clone")
    assert versions["torch"] == torch.__version__
    assert {"moesaic", "numpy", "rich", "PyYAML"} <= set(versions)
    assert "pytest" not in versions


def test_repository_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert repositories([tmp_path, tmp_path / "missing"]) == []
    git("init")
    assert repositories([tmp_path])[0]["commit"] is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "file").write_text("2")
    (tmp_path / "sub").mkdir()
    (state,) = repositories([tmp_path, tmp_path / "sub"])
    assert state["commit"] == git("rev-parse", "HEAD")
    assert (state["branch"], state["changed"], state["num_changed"]) == ("main", [" M file"], 1)
