from pathlib import Path

import pytest
import yaml

from moesaic.launch.config import read_run, run_to_yaml
from moesaic.launch.layers import shipped_names
from moesaic.launch.yaml_text import ConfigError

SMALL = """
version: 1
name: small
model: {dim: 16, layers: 2, heads: 2, ffn: {kind: moe, num_experts: 4, hidden: 8, router: {kind: topk, k: 2}}}
data: {kind: text, path: x.txt, seq_len: 8}
train: {steps: 200, batch_tokens: 32}
optim: {kind: adamw, lr: 1e-3}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configs_read_and_read_back(name: str, tmp_path: Path):
    run = read_run(name)
    assert run.name == name
    (tmp_path / "config.yaml").write_text(run_to_yaml(run))
    assert read_run(tmp_path / "config.yaml") == run


def test_values_arrive(small: Path):
    run = read_run(
        small, ["model.ffn.router.k=3", "optim.lr=5e-4", "eval.prompts=[a, 'b: c']", "data.path=[x, y]"]
    )
    assert run.optim.lr == 5e-4
    assert run.eval.prompts == ("a", "b: c")
    assert run.data.kind == "text"
    assert run.data.path == ("x", "y")
    assert run.model.ffn.kind == "moe"
    assert run.model.ffn.router.k == 3


def test_the_resolved_config_holds_every_default_and_reads_back(small: Path, tmp_path: Path):
    run = read_run(
        small,
        [
            "eval.prompts=['1e-3', 'no', \"a\\n  b\", '012', '']",
            "name='1e5'",
        ],
    )
    values = yaml.safe_load(run_to_yaml(run))
    assert values["optim"]["betas"] == [0.9, 0.95]
    assert values["data"]["tokenizer"] == {"kind": "bpe", "vocab": 4096}
    path = tmp_path / "again.yaml"
    path.write_text(run_to_yaml(run))
    assert read_run(path) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ffn.router.topk=4", "model.ffn.router.topk: no such field; did you mean 'k'?"),
        ("modle.dim=4", "modle: no such field; did you mean 'model'?"),
        ("train.steps=abc", "train.steps: expected an integer, got 'abc'"),
        ("model.heads=3", "model.heads: 3 does not divide dim = 16; set head_dim or change one"),
        ("model.ffn.router.k=5", "model.ffn.router.k: 5 is more than num_experts = 4"),
        ("train.batch_tokens=30", "train.batch_tokens: 30 is not a multiple of data.seq_len = 8"),
        ("checkpoint.every=-1", "checkpoint.every: -1 is negative; give a number of steps, or 0"),
        ("parallel.tp=2", "parallel.tp: 2 is not supported yet; use 1"),
        (
            "data.kind=web",
            "data.kind: no such kind 'web'; kinds: python, text, jsonl, parquet, huggingface, tokens, mixture",
        ),
        ("name=a/b", "name: 'a/b' cannot name a folder"),
        (f"name={'x' * 201}", "name: 201 bytes are too long to name a folder"),
        ("model.layers=1000000000", "model.layers: 1000000000 is above 1000, the largest that is supported"),
        (
            "model.ffn.num_experts=2000000",
            "model.ffn.num_experts: 2000000 is above 1048576, the largest that is supported",
        ),
        ('model.ffn_at={"0-": null}', "model.ffn_at.0-: expected keys and values, got nothing (null)"),
        ("train.threads=5000", "train.threads: 5000 is above 4096, the largest that is supported"),
        ('data.path="a\\0b"', "data.path: 'a\\x00b' is not valid Unicode text"),
        (
            "version=2",
            "version: 2 is not the format that this moesaic reads; "
            "write version: 1, or use the moesaic that wrote the file",
        ),
    ],
)
def test_errors(small: Path, override: str, message: str):
    with pytest.raises(ConfigError) as raised:
        read_run(small, [override])
    assert str(raised.value) == message


def test_sections_without_defaults_are_required(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel: {dim: 16, layers: 1, heads: 1, ffn: {kind: dense, hidden: 4}}\n")
    with pytest.raises(ConfigError, match=r"^data: missing \(also train, optim\); it has no default$"):
        read_run(path)


def test_the_number_of_processes_is_checked(small: Path):
    assert read_run(small, world_size=2).parallel.shards(2) == 2
    with pytest.raises(ConfigError, match="dp_shard 2 asks for 2 processes, but 1 run"):
        read_run(small, ["parallel.dp_shard=2"])
    with pytest.raises(
        ConfigError, match=r"parallel.dp_replicate: 2 x dp_shard .all. asks for 2 processes or a multiple"
    ):
        read_run(small, ["parallel.dp_replicate=2"], world_size=3)
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens: .* fewer than the 64 processes"):
        read_run(small, world_size=64)
    assert read_run(small, ["parallel.dp_shard=2"], world_size=None).parallel.ranks == 2
