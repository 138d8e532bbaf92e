"""What the README shows works."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.parallel.spawn import run_ranks
from moesaic.train.audit import full

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def run_code(code: str) -> tuple[dict[str, torch.Tensor], float]:
    """Weights and the summed loss of all ranks."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    model, ranks = names["model"], names["ranks"]
    weights = {name: full(tensor.detach(), ranks).clone() for name, tensor in model.state_dict().items()}
    return weights, ranks.sum(names["loss"]).item()


def test_the_layer_in_your_own_code_runs_on_any_number_of_ranks() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    weights, loss = run_code(code)
    assert loss < 3.0
    assert weights["moe.router.bias"].abs().max() > 0
    for found, total in run_ranks(lambda: run_code(code), 2):
        assert total == pytest.approx(loss, rel=1e-4)
        assert found.keys() == weights.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4, msg=name)


def test_every_file_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    assert links
    assert all((Path(__file__).parents[1] / link).exists() for link in links)
