"""What a user can get wrong: each is one line on stderr that names the place and the remedy, and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesaic.kernels import backend as backends
from moesaic.launch import cli

CONFIG = """
name: bad
model: {dim: 16, layers: 1, heads: 2, ffn: {kind: moe, num_experts: 4, hidden: 8, router: {kind: topk, k: 2}}}
data: {kind: text, path: text, seq_len: 16, tokenizer: {kind: bytes}, eval_fraction: 0.3, workers: 1}
train: {steps: 4, batch_tokens: 32, precision: fp32, threads: 1}
optim: {kind: adamw, lr: 1e-3, schedule: {kind: cosine, warmup: 1}}
log: {tensorboard: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    return tmp_path


def refused(*arguments: str) -> str:
    """Run a command that must be refused; its one line."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.ffn.router.topk=4", ["model.ffn.router.topk", "did you mean 'k'"]),
        ("kernels=cutlass", ["kernels", "cutlass", "triton"]),
        ("trian.steps=4", ["trian", "did you mean 'train'"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("model.ffn.router.k=5", ["model.ffn", "router.k: 5 is more than num_experts = 4"]),
        ("model.heads=3", ["model.heads: 3 does not divide dim = 16"]),
        ("model.ffn.router.groups=3", ["router.groups: 3 does not divide num_experts = 4"]),
        ("train.batch_tokens=40", ["train.batch_tokens: 40", "data.seq_len = 16"]),
        ("parallel.tp=2", ["parallel.tp: 2 is not supported"]),
        ("data.path=nowhere", ["nowhere"]),
        ("data.seq_len=8192", ["batch_tokens: 32"]),
        ("optim.groups=[{match: nothing.*}]", ["optim.groups", "nothing.*"]),
    ],
)
def test_a_wrong_config(folder: Path, override: str, parts: list[str]) -> None:
    line = refused("train", "run.yaml", override)
    assert all(part in line for part in parts), line
    assert not (folder / "runs" / "bad" / "metrics.jsonl").exists()


def empty(folder: Path) -> None:
    for file in (folder / "text").iterdir():
        file.unlink()


def too_small(folder: Path) -> None:
    empty(folder)
    (folder / "text" / "a.txt").write_text("tiny text.")


def undecodable(folder: Path) -> None:
    (folder / "text" / "3.txt").write_bytes(b"good \xff\xfe bad")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (empty, ["text"]),
        (too_small, ["data.seq_len", "more text"]),
        (undecodable, ["3.txt", "UTF-8", "on_error"]),
    ],
)
def test_a_wrong_corpus_leaves_no_run_behind(
    folder: Path, spoil: Callable[[Path], None], parts: list[str]
) -> None:
    spoil(folder)
    line = refused("train", "run.yaml")
    assert all(part in line for part in parts), line
    assert not (folder / "runs").exists()


def test_kernels_that_cannot_run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read or written."""
    monkeypatch.setattr(backends, "_triton", lambda: (None, False))
    line = refused("train", "run.yaml", "kernels=triton")
    assert line.startswith("error: kernels: triton cannot run: it needs a GPU")
    line = refused("train", "run.yaml", "kernels=megablocks")
    assert "grouped_gemm" in line
    assert not (folder / "runs").exists()


def test_an_undecodable_file_may_be_skipped(folder: Path) -> None:
    undecodable(folder)
    result = CliRunner().invoke(cli.app, ["train", "run.yaml", "data.on_error=skip"])
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "runs" / "bad" / "data.json").read_text())["skipped"]


def test_runs_that_are_not_there(folder: Path) -> None:
    assert "nothing" in refused("eval", "nothing")
    assert "nothing" in refused("generate", "nothing", "--prompt", "a")


def test_a_trained_run_guards_itself(folder: Path) -> None:
    assert CliRunner().invoke(cli.app, ["train", "run.yaml"]).exit_code == 0
    assert "exists already" in refused("train", "run.yaml")
    assert "model.dim: 16 -> 32" in refused("train", "run.yaml", "model.dim=32", "--resume")
    assert "--top-p: 2.0" in refused("generate", "runs/bad", "--prompt", "a", "--top-p", "2")
    newest = folder / "runs" / "bad" / "checkpoints" / "step_00000004"
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in refused("eval", "runs/bad", "--step", "4")
    (folder / "runs" / "bad" / "tokenizer" / "about_tokenizer.json").unlink()
    assert "tokenizer" in refused("generate", "runs/bad", "--prompt", "a")
