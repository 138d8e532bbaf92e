"""Files, checksums and names of checkpoint folders."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.parallel.storage import (
    CheckpointError,
    Chunk,
    DamagedCheckpointError,
    Draft,
    FileEntry,
    Manifest,
    TensorEntry,
    discard,
    read_box,
    read_manifest,
    remove_leftovers,
    verify,
    write_manifest,
    write_tensors,
)

TENSORS = {
    "flags|0": torch.tensor([True, False, True]),
    "bytes|0": torch.arange(5, dtype=torch.uint8),
    "half|0,0": torch.randn(3, 5).bfloat16(),
    "scalar|": torch.tensor(-0.1),
    "double|0,0": torch.randn(7, 2, dtype=torch.float64).t(),
    "empty|0,0": torch.empty(0, 3),
    "count|": torch.tensor(2**62 + 1),
}


def manifest(meta: dict[str, object]) -> Manifest:
    chunks = (
        Chunk((0, 0), (2, 3), "rank-00000.safetensors", 72),
        Chunk((2, 0), (1, 3), "rank-00001.safetensors", 80),
    )
    files = {
        "rank-00000.safetensors": FileEntry(96, "0" * 64),
        "rank-00001.safetensors": FileEntry(92, "f" * 64),
    }
    return Manifest(meta, files, {"w": TensorEntry(torch.float32, (3, 3), chunks)})


def folder_with(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(content)
    return path


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_file_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    entry, starts = write_tensors(path, list(TENSORS.items()))
    assert entry == FileEntry(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for (name, tensor), start in zip(TENSORS.items(), starts, strict=True):
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert start % tensor.element_size() == 0
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert path.read_bytes()[start : start + tensor.nbytes] == content


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [
        ((0, 0, 0), (5, 4, 3)),
        ((2, 0, 0), (2, 4, 3)),
        ((1, 1, 2), (3, 2, 1)),
        ((4, 3, 0), (1, 1, 3)),
        ((0, 0, 0), (0, 4, 3)),
    ],
)
def test_part_of_a_chunk(tmp_path: Path, offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
    tensor = torch.arange(60, dtype=torch.int16).view(5, 4, 3)
    _, starts = write_tensors(tmp_path / "file", [("other", torch.ones(3)), ("t", tensor)])
    expected = tensor
    for dim in range(3):
        expected = expected.narrow(dim, offsets[dim], shape[dim])
    with (tmp_path / "file").open("rb") as file:
        box = read_box(file, torch.int16, Chunk((0, 0, 0), (5, 4, 3), "file", starts[1]), offsets, shape)
    assert torch.equal(box, expected)


def test_part_of_a_short_file(tmp_path: Path) -> None:
    _, starts = write_tensors(tmp_path / "file", [("t", torch.ones(8))])
    with (tmp_path / "file").open("r+b") as file:
        file.truncate((tmp_path / "file").stat().st_size - 1)
    with (
        (tmp_path / "file").open("rb") as file,
        pytest.raises(DamagedCheckpointError, match="file: ends before"),
    ):
        read_box(file, torch.float32, Chunk((0,), (8,), "file", starts[0]), (0,), (8,))


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = manifest(
        {"step": 3, "rate": 0.1, "name": "caf\u00e9 \u2603", "nested": {"list": [1, None, True]}}
    )
    write_manifest(tmp_path, written)
    assert read_manifest(tmp_path) == written


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest({"step": 1, "e": 1e-3, "text": "\u00e9"}))
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: was changed"):
            read_manifest(tmp_path)
    path.write_bytes(content)
    read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{}", b'{"sha256": 3}', b'{"sha256": ""}', b"\xff\x00"]
)
def test_no_manifest_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: was changed"):
        read_manifest(tmp_path)


def test_other_format_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.parallel.storage.VERSION", 2)
    write_manifest(tmp_path, manifest({}))
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"format is moesaic-checkpoint 2, and this version reads .* 1;"
    ) as info:
        read_manifest(tmp_path)
    assert not isinstance(info.value, DamagedCheckpointError)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: missing"):
        read_manifest(tmp_path)
    with pytest.raises(DamagedCheckpointError, match=r"rank-00001\.safetensors: missing"):
        verify(tmp_path, manifest({}), ["rank-00001.safetensors"])


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: cannot be read \(Is a directory\)"):
        read_manifest(tmp_path)


def test_draft_appears_when_published(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "deep" / "one")
    (draft.path / "file").write_text("new")
    assert names(tmp_path / "deep") == [draft.path.name]
    assert draft.path.name.startswith("one.tmp-")
    draft.publish()
    assert names(tmp_path / "deep") == ["one"]
    assert (tmp_path / "deep" / "one" / "file").read_text() == "new"


def test_draft_replaces(tmp_path: Path) -> None:
    final = folder_with(tmp_path / "one", "old")
    folder_with(tmp_path / "one.replaced", "older")
    draft = Draft(final)
    (draft.path / "file").write_text("new")
    assert (final / "file").read_text() == "old"
    draft.publish()
    assert (final / "file").read_text() == "new"
    assert names(tmp_path) == ["one"]


def test_draft_that_cannot_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = folder_with(tmp_path / "one", "old")
    draft = Draft(final)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path == draft.path:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        draft.publish()
    assert names(tmp_path) == ["one.replaced", draft.path.name]
    draft.abandon()
    assert names(tmp_path) == ["one"]
    assert (final / "file").read_text() == "old"


def test_leftovers(tmp_path: Path) -> None:
    folder_with(tmp_path / "one", "1")
    folder_with(tmp_path / "one.replaced", "old 1")
    folder_with(tmp_path / "one.tmp-0123abcd", "half")
    folder_with(tmp_path / "two.replaced", "2")
    folder_with(tmp_path / "two.tmp-0123abcd", "half")
    folder_with(tmp_path / "notes.tmp-mine", "kept")
    folder_with(tmp_path / "three.replaced", "3")
    live = Draft(tmp_path / "three")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["notes.tmp-mine", "one", "three.replaced", live.path.name, "two"]
    assert (tmp_path / "one" / "file").read_text() == "1"
    assert (tmp_path / "two" / "file").read_text() == "2"
    live.abandon()
    assert names(tmp_path) == ["notes.tmp-mine", "one", "three", "two"]
    remove_leftovers(tmp_path / "nothing")


def test_discard_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "one", "1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # killed before it
        discard(folder)
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
    discard(folder)  # as when another process was faster


def test_bytes_of_all_types_survive(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.int8, torch.int32):
        tensor: Tensor = bits.view(dtype)
        path = tmp_path / str(dtype)
        _, starts = write_tensors(path, [("t", tensor)])
        with path.open("rb") as file:
            shape = tuple(tensor.shape)
            box = read_box(file, dtype, Chunk((0,), shape, path.name, starts[0]), (0,), shape)
        assert box.dtype == dtype
        assert torch.equal(box.view(torch.uint8), bits)
