"""`moesaic lm-eval` on tasks of a local file, without a network: its numbers are those of plain forward passes."""

import builtins
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moesaic.launch import cli
from moesaic.launch.config import read_run
from moesaic.train.assemble import Restored, restore_run

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; it is in the extra `eval`, not in `dev`: pip install -e '.[eval]'",
)
CONFIG = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn: {kind: moe, num_experts: 4, hidden: 8, router: {kind: topk, k: 2}}}
data: {kind: text, path: text, seq_len: 16, tokenizer: {kind: bytes}, eval_fraction: 0.3, workers: 1}
train: {steps: 4, batch_tokens: 32, precision: fp32, threads: 1}
optim: {kind: adamw, lr: 1e-2, schedule: {kind: cosine, warmup: 1}}
log: {tensorboard: false}
"""
DOCS = [
    {"question": "One", "choices": [" and", " or not"], "answer": 0},
    {
        "question": "A question longer than the sequences of the model",
        "choices": [" yes", " no"],
        "answer": 1,
    },
    {"question": "", "choices": ["a text", "b"], "answer": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: tiny_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: tiny_writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder: a trained run, a file of questions, and a folder of tasks."""
    path = tmp_path_factory.mktemp("harness")
    (path / "text").mkdir()
    for number in range(8):
        (path / "text" / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    (path / "run.yaml").write_text(CONFIG)
    (path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (path / "tasks").mkdir()
    common = COMMON.format(file=path / "docs.jsonl", cache=path / "cache")
    for name, text in {"choice": CHOICE, "text": PERPLEXITY, "writing": WRITING}.items():
        (path / "tasks" / f"{name}.yaml").write_text(text + common)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert CliRunner().invoke(cli.app, ["train", "run.yaml"]).exit_code == 0
    return path


@pytest.fixture
def current(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return folder


@torch.no_grad()
def log_likelihood(restored: Restored, before: str, after: str) -> float:
    """Of `after`, all in one forward pass over at most 16 tokens."""
    tokens = [256, *before.encode(), *after.encode()][-17:]
    logits = restored.model.double()(torch.tensor([tokens[:-1]]), mode="eval", dtype=torch.float64).logits
    assert logits is not None
    each = logits[0].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
    return each[-len(after) :].sum().item()


@pytest.fixture
def restored(current: Path) -> Restored:
    path = current / "runs" / "tiny"
    return restore_run(read_run(path / "config.yaml"), path, step=None, say=print)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["lm-eval", "tiny", *arguments])
    assert result.exit_code == code, result.output
    return result


@installed
def test_tasks_of_ones_own(current: Path, restored: Restored):
    shown = run("--tasks", "tiny_choice, tiny_text,tiny_writing", "--include-path", "tasks", "--json")
    found = json.loads(shown.stdout)
    assert found["step"] == 4
    likeliest = [
        max(range(2), key=lambda i: log_likelihood(restored, doc["question"], doc["choices"][i]))
        for doc in DOCS
    ]
    right = [i == doc["answer"] for i, doc in zip(likeliest, DOCS, strict=True)]
    assert found["tasks"]["tiny_choice"]["acc"] == pytest.approx(sum(right) / 3)
    texts = [doc["question"] + doc["choices"][0] for doc in DOCS]
    nats = 0.0
    for text in texts:
        for begin in range(0, len(text), 16):  # bytes are tokens
            nats += log_likelihood(restored, text[:begin], text[begin : begin + 16])
    size = sum(map(len, texts))
    assert found["tasks"]["tiny_text"]["byte_perplexity"] == pytest.approx(math.exp(-nats / size), rel=1e-5)
    assert found["tasks"]["tiny_text"]["bits_per_byte"] == pytest.approx(-nats / size / math.log(2), rel=1e-5)
    assert 0 <= found["tasks"]["tiny_writing"]["exact_match"] <= 1


@installed
def test_a_table_and_a_limit(current: Path):
    text = run("--tasks", "tiny_choice", "--include-path", "tasks", "--limit", "1").stdout
    assert ["tiny_choice", "acc"] in [line.split()[:2] for line in text.splitlines()]


@installed
def test_log_likelihoods_are_those_of_plain_passes(current: Path, restored: Restored):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from moesaic.train.lm_eval import Harnessed
    from moesaic.train.scoring import Scorer

    model, tokenizer = restored.model.double(), restored.tokenizer
    lm = Harnessed(Scorer(model=model, tokenizer=tokenizer, seq_len=16, batch_tokens=64, dtype=torch.float64))
    pairs = [(doc["question"], choice) for doc in DOCS for choice in doc["choices"]]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for pair, (found, _) in zip(pairs, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert found == pytest.approx(log_likelihood(restored, *pair), abs=1e-12)


@installed
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(  # looks through all tasks that come with the harness
            ["--tasks", "nothing_of_the_kind"],
            "--tasks: no such task 'nothing_of_the_kind'",
            marks=pytest.mark.slow,
        ),
        (["--tasks", ","], "--tasks: names no task"),
        (["--tasks", "tiny_choice", "--include-path", "nowhere"], "--include-path: nowhere is not a folder"),
        (
            ["--tasks", "tiny_choice", "--include-path", "tasks", "--step", "3"],
            "runs/tiny: holds no checkpoint of step 3",
        ),
    ],
)
def test_mistakes_are_one_line(current: Path, arguments: list[str], message: str):
    (line,) = run(*arguments, code=2).stderr.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_without_the_extra_the_error_names_it(current: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "moesaic.train.lm_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    expected = (
        "error: lm-eval is not installed; it comes with the extra `eval`: pip install 'moesaic[eval]'\n"
    )
    assert run("--tasks", "x", code=2).stderr == expected
