import hashlib
from pathlib import Path

import numpy as np
import pytest

from moesaic.data import shards
from moesaic.data.corpora import Source
from moesaic.data.errors import DataError
from moesaic.data.shards import (
    Fate,
    encode_shard,
    read_index,
    read_parts,
    read_shard,
    read_text,
)
from moesaic.data.tokenizer import Bytes

TEXTS = ["one\ntwo\n", "na\u00efve \u4f60", "drop me", "l1\nl2\nl3\nl4\n" * 5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work folder with shard 7 read."""
    Bytes().save(tmp_path / "tokenizer")
    sources = []
    for i, text in enumerate(TEXTS):
        path = tmp_path / f"{i}.txt"
        path.write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        sources.append(Source(f"{i}.txt", str(path), "text", path.stat().st_size, digest))
    read_shard(tmp_path, 7, sources, True)
    return tmp_path


def test_texts_come_back(folder: Path) -> None:
    found = read_index(folder, 7)
    assert found is not None
    assert [read_text(folder, 7, entry) for entry in found[0]] == TEXTS
    assert [entry.name for entry in found[0]] == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert [entry.key for entry in found[0]] == [hashlib.sha256(t.encode()).hexdigest() for t in TEXTS]
    assert read_text(folder, 7, found[0][1], 3) == "na"  # the limit cuts a character


def test_parts_have_marks_sides_and_sizes(folder: Path) -> None:
    encode_shard(folder, 7, [Fate.TRAIN, Fate.EVAL, Fate.DROP, Fate.BOTH], 0.3)
    parts = list(read_parts(folder, 7))
    assert [(p.entry, p.fate) for p in parts] == [
        (0, Fate.TRAIN),
        (1, Fate.EVAL),
        (3, Fate.TRAIN),
        (3, Fate.EVAL),
    ]
    decoded = [bytes(p.tokens[1:].tolist()).decode() for p in parts]
    assert decoded[:2] == TEXTS[:2]
    assert decoded[2] + decoded[3] == TEXTS[3]
    assert decoded[2].endswith("\n")  # a tail begins with a line
    assert abs(len(decoded[3]) / len(TEXTS[3]) - 0.3) < 0.1
    assert [p.size for p in parts] == [len(text.encode()) for text in decoded]
    assert all(p.tokens[0] == 256 and p.tokens.dtype == np.uint16 for p in parts)


def test_a_text_of_one_line_is_cut_within_it(folder: Path) -> None:
    assert shards._sides("abcdefghij", Fate.BOTH, 0.2) == [("abcdefgh", Fate.TRAIN), ("ij", Fate.EVAL)]
    assert shards._sides("a", Fate.BOTH, 0.2) == [("a", Fate.EVAL)]


def test_long_documents_are_encoded_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fates = [Fate.TRAIN, Fate.EVAL, Fate.DROP, Fate.BOTH]
    encode_shard(folder, 7, fates, 0.3)
    whole = [p.tokens.tolist() for p in read_parts(folder, 7)]
    monkeypatch.setattr(shards, "PIECE", 5)
    assert list(shards._pieces("ab\ncd\nefghijk")) == ["ab\n", "cd\n", "efghi", "jk"]
    encode_shard(folder, 7, fates, 0.3)
    assert [p.tokens.tolist() for p in read_parts(folder, 7)] == whole


def test_an_index_without_its_texts_counts_as_unread(folder: Path) -> None:
    texts = folder / "00007.text"
    texts.write_bytes(texts.read_bytes()[:-1])
    assert read_index(folder, 7) is None
    texts.unlink()
    assert read_index(folder, 7) is None
    assert read_index(folder, 8) is None


def test_unreadable_files_stop_or_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xff")
    source = Source("bad.txt", str(path), "text", 1, hashlib.sha256(b"\xff").hexdigest())
    with pytest.raises(
        DataError, match=r"bad\.txt: not UTF-8 text .*leave such out with data\.on_error=skip"
    ):
        read_shard(tmp_path, 0, [source], True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt"]  # nothing half-written stays
    read_shard(tmp_path, 0, [source], False)
    found = read_index(tmp_path, 0)
    assert found is not None
    assert found[0] == []
    assert found[1][0][0] == str(path)
    Bytes().save(tmp_path / "tokenizer")
    encode_shard(tmp_path, 0, [], 0.1)
    assert list(read_parts(tmp_path, 0)) == []
