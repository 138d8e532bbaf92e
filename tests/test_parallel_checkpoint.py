"""Saving and loading tensors: exact, strict, atomic, without pickle, on one process and on two."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moesaic.parallel import checkpoint
from moesaic.parallel.checkpoint import load, read_meta, read_tensors, save, save_async
from moesaic.parallel.storage import CheckpointError, DamagedCheckpointError

META = {"step": 7, "rate": 0.1 + 0.2, "tuple": (1, 2), "none": None, "text": "\u2603", "nested": {"a": [1.5]}}
MIB = 2**20

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # pytest resets the module's filter


def write(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], *, asynchronous: bool) -> None:
    """One of the two ways to save."""
    if asynchronous:
        save_async(folder, tensors, meta).result()
    else:
        save(folder, tensors, meta)


def samples() -> dict[str, Tensor]:
    """One tensor of every kind, with every bit pattern that is easily lost."""
    generator = torch.Generator().manual_seed(0)
    return {
        "fp32": torch.randn(5, 7, generator=generator),
        "special": torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(
            torch.float32
        ),
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "fp64": torch.randn(4, generator=generator, dtype=torch.float64),
        "int64": torch.tensor([2**63 - 1, -(2**63), 3]),
        "bool": torch.tensor([[True, False], [False, True]]),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "every.second|0": torch.arange(10)[::2],
        "parameter": nn.Parameter(torch.randn(2, 2, generator=generator)),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor.detach(), 1) for name, tensor in tensors.items()}


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (
            t.dtype,
            tuple(t.shape),
            t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_bitwise_round_trip(tmp_path: Path, asynchronous: bool) -> None:
    tensors, folder = samples(), tmp_path / "deep" / "one"
    write(folder, tensors, META, asynchronous=asynchronous)
    into = blank(tensors)
    into["transposed"] = torch.zeros(3, 4).t()
    into["parameter"] = nn.Parameter(torch.zeros(2, 2))
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    assert load(folder, into) == json.loads(json.dumps(META))
    assert bits(into) == bits(tensors)
    assert {name: tensor.data_ptr() for name, tensor in into.items()} == addresses
    assert bits(read_tensors(folder)) == bits(tensors)
    assert read_meta(folder)["rate"] == 0.1 + 0.2
    assert sorted(path.name for path in folder.parent.iterdir()) == ["one"]


def test_some_tensors(tmp_path: Path) -> None:
    tensors = samples()
    save(tmp_path / "one", tensors, {})
    assert bits(read_tensors(tmp_path / "one", ["bf16"])) == bits({"bf16": tensors["bf16"]})
    with pytest.raises(
        CheckpointError, match=r"one: has no tensor what, where; it has fp32, special, .* and 3 more"
    ):
        read_tensors(tmp_path / "one", ["what", "bf16", "where"])


def test_nothing_to_save(tmp_path: Path) -> None:
    save(tmp_path / "one", {}, {"step": 1})
    assert load(tmp_path / "one", {}) == {"step": 1}


def test_save_replaces(tmp_path: Path) -> None:
    save(tmp_path / "one", {"w": torch.zeros(3)}, {"step": 1})
    save(tmp_path / "one", {"w": torch.ones(3)}, {"step": 2})
    assert read_meta(tmp_path / "one") == {"step": 2}
    assert torch.equal(read_tensors(tmp_path / "one")["w"], torch.ones(3))


def test_tensors_may_change_after_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write_tensors = threading.Event(), checkpoint.write_tensors

    def write_later(*args: Any) -> Any:
        assert go.wait(30)
        return write_tensors(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", write_later)
    tensors, meta = samples(), {"list": [1]}
    before = bits(tensors)
    future = save_async(tmp_path / "one", tensors, meta)
    for tensor in tensors.values():
        tensor.detach().zero_()
    meta["list"].append(2)
    assert not future.done()
    go.set()
    future.result()
    assert bits(read_tensors(tmp_path / "one")) == before
    assert read_meta(tmp_path / "one") == {"list": [1]}


def test_after_runs_when_complete(tmp_path: Path) -> None:
    seen = []
    save_async(
        tmp_path / "one",
        {"w": torch.ones(2)},
        {"step": 1},
        after=lambda: seen.append(read_meta(tmp_path / "one")),
    ).result()
    assert seen == [{"step": 1}]

    def fail() -> None:
        raise OSError("in after")

    with pytest.raises(OSError, match="in after"):
        save_async(tmp_path / "two", {}, {}, after=fail).result()


def test_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    tensors = samples()
    save(tmp_path / "one", tensors, META)
    save_async(tmp_path / "two", tensors, META).result()
    into = blank(tensors)
    load(tmp_path / "two", into)
    assert bits(into) == bits(read_tensors(tmp_path / "one")) == bits(tensors)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
    ]
    for path in (tmp_path / "one").iterdir():
        content = path.read_bytes()
        start = 0 if path.suffix == ".json" else 8
        length = len(content) if path.suffix == ".json" else int.from_bytes(content[:8], "little")
        json.loads(content[start : start + length])


@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "longer", "gone"])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    tensors, folder = samples(), tmp_path / "one"
    save(folder, tensors, META)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage in ("first", "middle", "last"):
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[damage]] ^= 4
    path.write_bytes(content[:-3] if damage == "cut" else content + b" " if damage == "longer" else content)
    if damage == "gone":
        path.unlink()
    into = blank(tensors)
    before = bits(into)
    for read in (lambda: load(folder, into), lambda: read_tensors(folder)):
        with pytest.raises(DamagedCheckpointError, match=rf"one/{name}: .*; use another checkpoint"):
            read()
    assert bits(into) == before


def test_strict(tmp_path: Path) -> None:
    save(
        tmp_path / "one",
        {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1), "d": torch.zeros(4)},
        {},
    )
    into = {"a": torch.ones(3, 2), "b": torch.ones(2).bfloat16(), "d": torch.ones(4), "e": torch.ones(1)}
    before = bits(into)
    with pytest.raises(CheckpointError) as info:
        load(tmp_path / "one", into)
    assert not isinstance(info.value, DamagedCheckpointError)
    assert str(info.value) == (
        f"{tmp_path}/one: does not fit: not in the checkpoint: e; only in the checkpoint: c; "
        "different: a (checkpoint torch.float32 (2, 3), here torch.float32 (3, 2)), "
        "b (checkpoint torch.float32 (2,), here torch.bfloat16 (2,)); use the configuration that it was saved with"
    )
    assert bits(into) == before


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        with pytest.raises(
            CheckpointError, match=r"phase: type torch\.complex64 cannot be stored; convert it"
        ):
            write(
                tmp_path / "one",
                {"phase": torch.zeros(2, dtype=torch.complex64)},
                {},
                asynchronous=asynchronous,
            )
        with pytest.raises(TypeError, match="not JSON serializable"):
            write(tmp_path / "one", {}, {"step": object()}, asynchronous=asynchronous)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_stays_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.parallel.checkpoint.write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "one", samples(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, asynchronous: bool) -> None:
    save(tmp_path / "one", {"w": torch.zeros(1000)}, {"step": 1})
    left, fsync = [calls], os.fsync

    def fail(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)  # of the tensors, of the manifest, of the folder, of its parent
    message = r": No space left on device: 4,000 bytes are needed, [\d,]+ are free in .*; free some space"
    for name in ("one", "two"):
        left[0] = calls
        with pytest.raises(CheckpointError, match=f"{tmp_path}/{name}: not saved{message}"):
            write(tmp_path / name, {"w": torch.ones(1000)}, {"step": 2}, asynchronous=asynchronous)
    monkeypatch.undo()
    step = 2 if calls == 3 else 1  # the last of them comes after the new name
    assert read_meta(tmp_path / "one") == {"step": step}
    assert torch.equal(read_tensors(tmp_path / "one")["w"], torch.full((1000,), step - 1.0))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("two")] == ["one"]
    assert [path.name for path in tmp_path.glob("two*")] == (["two"] if calls == 3 else [])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_file_size_limit(tmp_path: Path, asynchronous: bool) -> None:
    """A write that the system really cuts short."""
    save(tmp_path / "one", {"w": torch.zeros(10)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        message = r"two: not saved: File too large.*: 8,388,608 bytes are needed"
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / "two", {"w": torch.zeros(2 * MIB)}, {}, asynchronous=asynchronous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert read_meta(tmp_path / "one") == {"step": 1}


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/one: not saved: "):
        save(tmp_path / "file" / "one", samples(), {})


def reference() -> dict[str, Tensor]:
    return {
        "rows": torch.arange(35.0).view(7, 5),
        "columns": torch.arange(35.0).view(7, 5) + 100,
        "single": torch.arange(3.0)[:1],
        "copied": torch.arange(6, dtype=torch.bfloat16),
        "plain": torch.arange(4),
        "scalar": torch.tensor(2.5),
    }


def test_two_ranks(tmp_path: Path) -> None:
    """Two ranks save and one loads; one saves and two load; an error of one rank reaches both."""
    save(tmp_path / "one", reference(), {"from": 1})
    save(tmp_path / "damaged", {"w": torch.ones(5)}, {})
    with (tmp_path / "damaged" / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(10)
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for name in ("two", "two-async"):
        into = blank(reference())
        assert load(tmp_path / name, into) == {"from": 2}
        assert bits(into) == bits(reference()) == bits(read_tensors(tmp_path / name))
        files = json.loads((tmp_path / name / "manifest.json").read_text())["files"]
        assert sorted(files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    stored = json.loads((tmp_path / "two" / "manifest.json").read_text())["tensors"]
    chunks = {name: [(c["offsets"], c["shape"]) for c in entry["chunks"]] for name, entry in stored.items()}
    assert chunks["rows"] == [([0, 0], [4, 5]), ([4, 0], [3, 5])]
    assert chunks["columns"] == [([0, 0], [7, 3]), ([0, 3], [7, 2])]
    assert chunks["copied"] == [([0], [6])]
    assert chunks["plain"] == [([0], [4])]


def two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def spread(rows: int, columns: int) -> dict[str, Tensor]:
        whole = reference()
        for name, placement in {"rows": Shard(rows), "columns": Shard(columns), "single": Shard(0)}.items():
            whole[name] = distribute_tensor(whole[name], mesh, [placement])
        whole["copied"] = distribute_tensor(whole["copied"], mesh, [Replicate()])
        return whole

    save(folder / "two", spread(0, 1), {"from": 2})
    tensors = spread(0, 1)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    future = save_async(folder / "two-async", tensors, {"from": 2}, group=group)
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        dist.all_reduce(torch.ones(1))
    future.result()

    for name in ("one", "two"):  # the second with the other sharding
        into = spread(1, 0)
        for tensor in into.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        assert load(folder / name, into) == {"from": 1 if name == "one" else 2}
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in into.items()}
        assert bits(whole) == bits(reference())

    for name, error, what in (
        ("damaged", DamagedCheckpointError, "has 10 bytes"),
        ("nothing", CheckpointError, "no such checkpoint"),
    ):
        with pytest.raises(error, match=what):
            load(folder / name, {"w": torch.zeros(5)})
    if rank == 1:  # this rank alone cannot write

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint.write_tensors = full
    with pytest.raises(
        CheckpointError, match=r"three: not saved: No space left on device: 3\d\d bytes are needed"
    ):
        save(folder / "three", spread(0, 1), {})
    dist.barrier()
    assert not list(folder.glob("three*"))
    dist.destroy_process_group()


if __name__ == "__main__":
    two_ranks(int(sys.argv[1]), Path(sys.argv[2]))
