"""Checkpoints of owned experts: between any numbers of ranks and any owners, optimizer state included, bit for bit."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter
from moesaic.parallel.checkpoint import load, read_tensors, save
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.reshard import reshard
from moesaic.parallel.shard import local, window
from moesaic.parallel.slots import slots_of
from moesaic.parallel.spawn import run_ranks
from moesaic.parallel.storage import CheckpointError, DamagedCheckpointError
from moesaic.train.audit import full
from moesaic.train.optim import AdamWConfig, build_optimizer, optimizer_tensors

EXPERTS = 5
SPARSE = MoE.Config(num_experts=EXPERTS, hidden=6, router=TopKRouter.Config(k=2))
CONFIG = Transformer.Config(dim=8, layers=3, heads=2, ffn=SPARSE, ffn_at={"1": FeedForward.Config(hidden=12)})


@dataclass(frozen=True)
class Layout:
    """Who owns the experts of the two sparse layers."""

    ranks: int
    owners: tuple[tuple[int, ...], tuple[int, ...]]
    copies: int = 1


LAYOUTS = {
    "interleaved": Layout(2, ((0, 1, 0, 1, 0), (1, 0, 1, 0, 1))),
    "one owner of two": Layout(2, ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1))),
    "nothing in the middle": Layout(3, ((0, 2, 0, 2, 2), (2, 2, 0, 0, 0))),
    "two copies": Layout(4, ((0, 1, 1, 0, 0), (1, 1, 0, 0, 1)), copies=2),
    "four ranks": Layout(4, ((3, 1, 3, 0, 1), (0, 0, 3, 3, 1))),
}


def blank(layout: Layout | None) -> tuple[dict[str, Tensor], Ranks]:
    """The state of a run with this layout (None: of one process), all NaN, with experts where they belong."""
    if layout is None:
        model, ranks = Transformer(CONFIG, 13), ALONE
    else:
        config = ParallelConfig(experts=OwnedExperts(), dp_replicate=layout.copies)
        ranks = ranks_of(config, "cpu")
        with torch.device("meta"):
            model = Transformer(CONFIG, 13)
        parallelize(model, config, ranks)
        model.to_empty(device="cpu")
        model.initialize(0, window=window)
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0))
    if layout is not None:
        slots = slots_of(model)
        assert slots is not None
        banks: dict[str, tuple[int, ...]] = {"layer0": layout.owners[0], "layer2": layout.owners[1]}
        reshard(model, optimizer, OwnerMap(slots.owners.ranks, banks))
    state = {name: tensor.detach() for name, tensor in logical_tensors(model).items()}
    state |= optimizer_tensors(model, optimizer)
    for tensor in state.values():
        local(tensor).fill_(torch.nan)
    return state, ranks


def values() -> dict[str, Tensor]:
    """Something else in every place; a table has one number of steps."""
    state, _ = blank(None)
    for index, (name, tensor) in enumerate(state.items()):
        generator = torch.Generator().manual_seed(index)
        tensor.copy_(torch.randn(tensor.shape, generator=generator) if tensor.ndim else torch.tensor(7.0))
        assert name.startswith("optim.step.") == (not tensor.ndim)
    return state


def loaded(folder: Path, layout: Layout | None) -> dict[str, Tensor]:
    state, ranks = blank(layout)
    assert load(folder, state) == {"step": 7}
    return {name: full(tensor, ranks).clone() for name, tensor in state.items()}


def on_each_number_of_ranks(work: Callable[[str, Layout], object]) -> list[tuple[str, list[object]]]:
    """`work` for all layouts; one start for all of so many ranks."""
    found = []
    for size in sorted({layout.ranks for layout in LAYOUTS.values()}):
        members = {name: layout for name, layout in LAYOUTS.items() if layout.ranks == size}
        results = run_ranks(lambda m=members: [work(name, layout) for name, layout in m.items()], size)
        found += [(name, [of_rank[i] for of_rank in results]) for i, name in enumerate(members)]
    return found


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process, and one of every layout that loaded it."""
    folder = tmp_path_factory.mktemp("owned")
    save(folder / "one process", values(), {"step": 7})

    def pass_on(name: str, layout: Layout) -> None:
        state, _ = blank(layout)
        load(folder / "one process", state)
        save(folder / name, state, {"step": 7})

    on_each_number_of_ranks(pass_on)
    return folder


def test_any_layout_to_any_other(folder: Path) -> None:
    want = values()
    for name in LAYOUTS:
        assert same(read_tensors(folder / name), want), name
        assert same(loaded(folder / name, None), want), name

    def all_of(_: str, layout: Layout) -> list[str]:
        return [name for name in LAYOUTS if not same(loaded(folder / name, layout), want)]

    for name, wrong in on_each_number_of_ranks(all_of):
        assert wrong == [[]] * LAYOUTS[name].ranks, name


def test_experts_are_written_once_and_by_their_owners(folder: Path) -> None:
    files = {name: sorted(path.name for path in (folder / name).glob("rank-*")) for name in LAYOUTS}
    sizes = {name: sum((folder / name / file).stat().st_size for file in files[name]) for name in LAYOUTS}
    whole = sum(tensor.numel() * tensor.element_size() for tensor in values().values())
    for name, layout in LAYOUTS.items():
        assert len(files[name]) <= layout.ranks
        assert whole < sizes[name] < 1.3 * whole + 20_000  # and headers


@pytest.mark.parametrize("damage", ["missing", "cut", "swapped"])
def test_the_file_of_one_rank(folder: Path, tmp_path: Path, damage: str) -> None:
    """Is refused on every rank, and named, before anything is loaded."""
    bad = tmp_path / "bad"
    shutil.copytree(folder / "nothing in the middle", bad)
    first, last = bad / "rank-00000.safetensors", bad / "rank-00002.safetensors"
    if damage == "missing":
        last.unlink()
    elif damage == "cut":
        last.write_bytes(last.read_bytes()[:-100])
    else:
        content = first.read_bytes(), last.read_bytes()
        first.write_bytes(content[1])
        last.write_bytes(content[0])

    def refused(layout: Layout | None) -> tuple[str, bool]:
        state, _ = blank(layout)
        with pytest.raises(CheckpointError) as caught:
            load(bad, state)
        untouched = all(local(tensor).isnan().all() for tensor in state.values())
        return f"{type(caught.value).__name__} {caught.value}", untouched

    results = [refused(None), *run_ranks(lambda: refused(LAYOUTS["interleaved"]), 2)]
    said = {
        "missing": "missing",
        "cut": "bytes instead of",
        "swapped": "(has .* bytes instead of|was changed)",
    }
    for message, untouched in results:
        assert untouched
        assert DamagedCheckpointError.__name__ in message
        pattern = rf"bad/rank-0000[02].safetensors: .*{said[damage]}.*; use another checkpoint"
        assert re.search(pattern, message), message
