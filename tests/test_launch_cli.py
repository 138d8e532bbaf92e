import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moesaic import __version__
from moesaic.launch import cli
from moesaic.launch.yaml_text import ConfigError
from moesaic.train.config import RunConfig

SMALL = """
name: small
model: {dim: 16, layers: 2, heads: 2, ffn: {kind: moe, num_experts: 4, hidden: 8, router: {kind: topk, k: 2}}}
data: {kind: text, path: text, seq_len: 8, tokenizer: {kind: bytes}, eval_fraction: 0.5, workers: 1}
train: {steps: 200, batch_tokens: 32, precision: fp32, threads: 1}
optim: {kind: adamw, lr: 1e-3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with small.yaml and eight short texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Text number {i}. " * 9)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesaic.launch.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


def replace(monkeypatch: pytest.MonkeyPatch, target: str, result: object) -> list[tuple[Any, dict[str, Any]]]:
    """Replace a function by one that keeps its arguments; an exception is raised instead of returned."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def stand_in(*args: Any, **kwargs: Any) -> object:
        calls.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(target, stand_in)
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["train ", "eval ", "generate ", "inspect ", "schema ", "data ", "moesaic train debug"]),
        (
            ["train"],
            ["--resume", "--profile", "    moesaic train quickstart\n    moesaic train my.yaml name=second"],
        ),
        (["eval"], ["--step", "--tokens", "--json", "  moesaic eval runs/quickstart\n"]),
        (
            ["generate"],
            ["--prompt", "--max-tokens", "--temperature", "--top-p", "--seed", "  moesaic generate"],
        ),
        (
            ["lm-eval"],
            ["--tasks", "--include-path", "--limit", "--json", "  moesaic lm-eval quickstart --tasks"],
        ),
        (["inspect"], ["--json", "  moesaic inspect quickstart\n"]),
        (["report"], ["--out", "report.html", "  moesaic report runs/quickstart\n"]),
        (["data"], ["prepare ", "stats "]),
        (["data", "prepare"], ["  moesaic data prepare quickstart\n"]),
        (["data", "stats"], ["--json", "  moesaic data stats quickstart\n"]),
        (["schema"], ["  moesaic schema > moesaic.schema.json"]),
    ],
)
def test_help_shows_options_and_examples(arguments: list[str], expected: list[str]):
    result = CliRunner().invoke(cli.app, [*arguments, "--help"], terminal_width=80)
    assert result.exit_code == 0
    for text in expected:
        assert text in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "..." not in result.output.replace("]...", "").replace("}...", "").replace(
        "[ARGS]...", ""
    )  # no summary is cut short


def test_help_and_version_need_no_torch(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        result = process(*arguments, PYTHONPATH=str(tmp_path))
        assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"moesaic {__version__}\n"


def test_a_broken_file_is_reported_without_torch(folder: Path):
    (folder / "blocked").mkdir()
    (folder / "blocked" / "torch.py").write_text("raise SystemExit('torch was imported')")
    (folder / "broken.yaml").write_text("a: 1\na: 2\n")
    result = process("train", "broken.yaml", PYTHONPATH=str(folder / "blocked"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: broken.yaml:2:1: 'a' is given twice, first on line 1\n".replace(
        "broken.yaml", str(folder / "broken.yaml")
    )


def test_errors_are_one_line_and_exit_code_2(folder: Path):
    result = process("train", "small.yaml", "model.ffn.router.topk=4")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: model.ffn.router.topk: no such field; did you mean 'k'?\n"


def test_the_traceback_is_there_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cli.TRACEBACK, "1")
    result = CliRunner().invoke(cli.app, ["train", "small.yaml", "model.ffn.router.topk=4"])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "error: nothing.yaml: no such file; shipped configs: debug, "),
        (
            ["train", "small.yaml", "steps"],
            "error: 'steps': not an override; write a.b=value, such as train.steps=100",
        ),
        (
            ["inspect", "small.yaml", "model.ffn.router.k=5"],
            "error: model.ffn.router.k: 5 is more than num_experts = 4",
        ),
        (["data", "stats", "small.yaml", "data.path=gone"], "error: data.path: "),
        (
            ["data", "prepare", "small.yaml", "train.steps=x"],
            "error: train.steps: expected an integer, got 'x'",
        ),
        (
            ["eval", "small"],
            "error: small: no run there (a folder with config.yaml); there is no run in ./runs either",
        ),
        (["generate", "small", "--prompt", "a"], "error: small: no run there"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], message: str):
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["train", "debug", "--nothing"], ["fly"], ["generate", "x"], ["eval", "x", "--step", "a"]],
)
def test_wrong_usage_exits_2(folder: Path, arguments: list[str]):
    assert "Usage: moesaic" in run(*arguments, code=2).stderr


def test_train_gets_the_run_and_gives_the_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = replace(monkeypatch, "moesaic.train.session.train", 3)
    monkeypatch.setattr(sys, "argv", ["moesaic", "train", "small.yaml"])
    run("train", "small.yaml", "train.steps=300", "optim.lr=2e-3", "--resume", code=3)
    (config, text), options = calls[0]
    assert yaml.safe_load(text)["train"]["steps"] == 300
    assert isinstance(config, RunConfig)
    assert (config.train.steps, config.optim.lr) == (300, 2e-3)
    assert options == {"resume": True, "profile": False, "command": ["moesaic", "train", "small.yaml"]}


def test_the_number_of_processes_comes_from_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    shown = run("train", "small.yaml", "parallel.dp_shard=2", code=2).stderr
    assert shown.startswith("error: parallel.dp_replicate: 1 x dp_shard 2 asks for 2 processes, but 4 run")


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("eval.tokens: too few"), 2, "error: eval.tokens: too few\n"),
        (PermissionError(13, "Permission denied", "runs/small"), 2, "error: runs/small: Permission denied\n"),
        (OSError("no space"), 2, "error: no space\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_command_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
):
    replace(monkeypatch, "moesaic.train.session.train", raised)
    result = run("train", "small.yaml", code=code)
    assert (result.stdout, result.stderr) == ("", message)


def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    replace(monkeypatch, "moesaic.train.session.train", ZeroDivisionError("a bug"))
    assert isinstance(CliRunner().invoke(cli.app, ["train", "small.yaml"]).exception, ZeroDivisionError)


@pytest.fixture
def finished(folder: Path) -> Path:
    """The folder of a run, as far as its config."""
    path = folder / "runs" / "small"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(SMALL)
    return path


def test_eval(finished: Path, monkeypatch: pytest.MonkeyPatch):
    result = {"step": 20, "loss": 1.23456, "tokens": 65536}
    calls = replace(monkeypatch, "moesaic.train.evaluate.evaluate_run", result)
    assert json.loads(run("eval", "small", "--step", "20", "--tokens", "1000", "--json").stdout) == result
    (config, path), options = calls[0]
    assert config.name == "small"
    assert path == Path("runs/small")
    assert options == {"step": 20, "tokens": 1000}
    text = run("eval", str(finished)).stdout
    assert calls[1][0][1] == finished
    assert calls[1][1] == {"step": None, "tokens": None}
    assert [line.split() for line in text.splitlines()] == [
        ["small"],
        ["step", "20"],
        ["loss", "1.2346"],
        ["tokens", "65,536"],
    ]


def test_generate(finished: Path, monkeypatch: pytest.MonkeyPatch):
    calls = replace(monkeypatch, "moesaic.train.generate.generate_run", ["one\x1b[2J", "two\n"])
    arguments = [
        "generate",
        "small",
        "--prompt",
        "a ",
        "--prompt",
        "b ",
        "--top-p",
        "0.5",
        "--max-tokens",
        "7",
    ]
    assert run(*arguments).stdout == "a one\\x1b[2J\n" + "-" * 40 + "\nb two\n\n"
    (config, path, prompts), options = calls[0]
    assert (config.name, path, prompts) == ("small", Path("runs/small"), ["a ", "b "])
    assert options == {"max_tokens": 7, "temperature": 0.8, "top_p": 0.5, "seed": 0, "step": None}
    found = json.loads(run(*arguments, "--json").stdout)
    assert found == [{"prompt": "a ", "text": "one\x1b[2J"}, {"prompt": "b ", "text": "two\n"}]


def test_runs_are_listed_where_one_is_missing(finished: Path):
    expected = "error: smal: no run there (a folder with config.yaml); runs here: small\n"
    assert run("eval", "smal", code=2).stderr == expected


def test_inspect_counts(folder: Path):
    facts = json.loads(run("inspect", "small.yaml", "--json").stdout)
    embedding, attention, norms = 257 * 16, 4 * 16 * 16 + 2 * 8, 2 * 2 * 16 + 16
    experts = 4 * 3 * 8 * 16
    assert facts["vocab"] == 257
    assert facts["model"]["embedding_parameters"] == embedding
    assert facts["model"]["parameters"] == embedding + 2 * (attention + 4 * 16 + experts) + norms
    assert facts["model"]["active_parameters"] == facts["model"]["parameters"] - 2 * experts // 2
    assert facts["training"]["tokens"] == 6400
    assert facts["training"]["flops"] == 6400 * facts["model"]["train_flops_per_token"]
    assert (facts["precision"], facts["memory"]["gradients"]) == ("fp32", 4 * facts["model"]["parameters"])
    assert "active per token" in run("inspect", "small.yaml").stdout
    assert not (folder / "runs").exists()


def test_data_prepare_and_stats(folder: Path):
    text = run("data", "prepare", "small.yaml").stdout
    summary = json.loads(run("data", "stats", "small.yaml", "--json").stdout)
    assert (summary["documents"], summary["bytes"]) == (8, 8 * 9 * 15)
    assert text == f"{summary['tokens']:,} tokens of 8 documents in {summary['folder']}\n"
    assert summary["folder"][:20] in run("data", "stats", "small.yaml").stdout


def test_schema(folder: Path):
    assert json.loads(run("schema").stdout)["else"] == {"$ref": "#/$defs/train.config.RunConfig"}


def test_a_reader_that_leaves_is_no_error(folder: Path):
    code = "from moesaic.launch import cli\n@cli.app.command()\ndef speak(): print('x')\ncli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "speak"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()  # before the child has anything to write
        assert child.stderr.read() == ""
        assert child.wait(timeout=60) == 141


def test_main_is_the_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["moesaic", "--version"])
    call: Callable[[], None] = cli.main
    with pytest.raises(SystemExit) as raised:
        call()
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"moesaic {__version__}\n"
