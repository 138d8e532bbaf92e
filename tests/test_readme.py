"""What the README shows works."""

import re
from pathlib import Path

import torch

from moesaic.moe import MoE

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_layer_in_your_own_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    loss, moe = names["loss"], names["moe"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() < 3.0
    assert isinstance(moe, MoE)
    assert moe.router.bias.abs().max() > 0


def test_every_file_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((Path(__file__).parents[1] / link).exists() for link in links)
