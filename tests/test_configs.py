"""The shipped configs: each can be inspected anywhere, and those that follow a publication have its sizes."""

import json

import pytest
from typer.testing import CliRunner

from moesaic.data.prepare import vocab_of
from moesaic.launch import cli
from moesaic.launch.config import read_run
from moesaic.launch.layers import shipped_names
from moesaic.models.accounting import account


@pytest.mark.parametrize("name", shipped_names())
def test_inspect_needs_no_data(name: str):
    result = CliRunner().invoke(
        cli.app, ["inspect", name, "model.layers=2", "train.precision=fp32", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["name"] == name


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        # OLMoE-1B-7B has 6,919,161,856: its query and key norms are 16 heads wide instead of one
        ("moe_1b", 6_919_161_856 - 16 * 2 * (2048 - 128), 1.3e9),
        ("moe_16b", 16.376e9, 2.8e9),  # DeepSeekMoE 16B
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: float, active: float):
    run = read_run(name)
    model = account(run.model, vocab_of(run.data), seq_len=run.data.seq_len)
    assert model.parameters == pytest.approx(parameters, rel=1e-4)
    assert model.active_parameters == pytest.approx(active, rel=2e-2)
