"""What docs/experts_across_ranks.md shows works, and it leaves no key out."""

import re
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.parallel.auto import AutoConfig
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.costs import Costs
from moesaic.parallel.hecate import HecateConfig
from moesaic.parallel.placement import Topology, even_owners, no_copies
from moesaic.parallel.plans import CustomPlanConfig, build_planner, check_plan

FOLDER = Path(__file__).parents[1] / "docs"
TEXT = (FOLDER / "experts_across_ranks.md").read_text(encoding="utf-8")


def test_its_planner_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module: Any = types.ModuleType("mine")
    exec(compile(code, "experts_across_ranks.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "mine", module)
    costs = Costs(row=1, copy_near=1, copy_far=1, grad_near=1, grad_far=1)
    planner = build_planner(CustomPlanConfig(planner="mine:Hottest", options={"number": 3}), costs)
    assert not planner.exact
    owners, topology = even_owners({"bank": 6}, 2).owners["bank"], Topology(2, 2)
    alone = no_copies(owners, 2)
    assert (planner.plan([], None, owners, topology) == alone).all()
    counts = np.array([[9, 0, 0, 3, 0, 1], [0, 2, 0, 0, 5, 0]])
    found = planner.plan([counts[::-1] * 0, counts], None, owners, topology)
    check_plan("bank", found, owners, topology)
    assert np.flatnonzero(found.all(0)).tolist() == [0, 3, 4]
    assert found.sum() == 6 + 3


def test_it_tells_every_key() -> None:
    keys = {f.name for f in fields(OwnedExperts)} | {
        f"plan.{f.name}" for config in (AutoConfig, HecateConfig) for f in fields(config)
    }
    assert keys - set(re.findall(r"^\| `([\w.]+)` \|", TEXT, flags=re.MULTILINE)) == {"kind"}


def test_its_pictures_and_pages_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT) if not link.startswith((".", "http"))]
    assert len(links) >= 5
    assert [link for link in links if not (FOLDER / link).is_file()] == []
    assert all(path.stat().st_size < 150_000 for path in (FOLDER / "experts").iterdir())
