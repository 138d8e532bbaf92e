"""Files and folders that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from moesaic.kernels.files import Replaced


def write_half(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    raise OSError(28, "No space left on device", path)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"), Replaced(path, durable=durable) as temporary:
        write_half(temporary)
    assert (names(tmp_path), path.read_text()) == (["x"], "old")
    with Replaced(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert (names(tmp_path), path.read_text()) == (["x"], "new")


def test_a_folder_comes_whole_and_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(OSError, match="No space left"), Replaced(path) as temporary:
        write_half(temporary / "one")
    assert names(tmp_path) == []
    with Replaced(path) as temporary:
        temporary.mkdir()
        (temporary / "one").write_text("1")
    assert (names(tmp_path), names(path)) == (["folder"], ["one"])


def test_what_cannot_take_its_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"), Replaced(tmp_path / "taken") as temporary:
        temporary.write_text("a file")
    assert names(tmp_path) == ["taken"]


def test_a_durable_file_is_synchronised_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "x").exists()))
    with Replaced(tmp_path / "x", durable=True) as temporary:
        temporary.write_text("text")
    assert seen == [False]
