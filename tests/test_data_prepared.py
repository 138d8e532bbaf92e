import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesaic.data.config import ByteTokenizer, TextData
from moesaic.data.errors import DataError
from moesaic.data.prepare import prepare
from moesaic.data.prepared import Prepared, open_prepared
from moesaic.data.tokenizer import train_bpe


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(100):
        (texts / f"{i:03}.txt").write_text(f"document {i}\n" * (i + 1))
    config = TextData(
        path=str(texts), tokenizer=ByteTokenizer(), eval_fraction=0.2, cache=str(tmp_path / "cache")
    )
    return prepare(config)


def test_open_gives_the_streams(prepared: Prepared) -> None:
    again = open_prepared(prepared.folder, prepared.manifest["key"])
    assert isinstance(again.train, np.memmap)
    assert again.train.dtype == np.uint16
    np.testing.assert_array_equal(again.train, prepared.train)
    np.testing.assert_array_equal(again.eval, prepared.eval)
    assert again.tokenizer.name == "bytes"
    with pytest.raises(ValueError, match="read-only"):
        again.train[0] = 1


def test_summary_adds_up(prepared: Prepared) -> None:
    summary = prepared.summary()
    sizes = [len(f"document {i}\n" * (i + 1)) for i in range(100)]
    assert (summary["documents"], summary["bytes"], summary["tokens"]) == (100, sum(sizes), sum(sizes) + 100)
    assert summary["bytes_per_token"] == sum(sizes) / (sum(sizes) + 100)
    for split, mapped in (("train", prepared.train), ("eval", prepared.eval)):
        stream = np.asarray(mapped)
        assert summary["splits"][split]["tokens"] == len(stream)
        assert summary["splits"][split]["documents"] == (stream == 256).sum()
        assert summary["splits"][split]["domains"]["text"]["bytes"] == (stream < 256).sum()
    assert summary["longest"][0] == ["099.txt", sizes[99] + 1]
    assert len(summary["longest"]) == 10
    assert summary["files"] == 100
    assert summary["held_out_by"] == "hash"
    assert json.loads(json.dumps(summary)) == summary


def cut_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:-20])


def old_version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"format_version": 1', '"format_version": 0'))


def other_key(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    key = json.loads(text)["key"]
    (folder / "manifest.json").write_text(text.replace(key, "f" * 64))


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)


def cut_stream(folder: Path) -> None:
    content = (folder / "eval.bin").read_bytes()
    (folder / "eval.bin").write_bytes(content[:-2])


def other_stream(folder: Path) -> None:
    (folder / "eval.bin").unlink()
    (folder / "eval.bin").mkdir()


DAMAGE = [
    (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: is missing or damaged"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json: is missing or damaged"),
    (cut_manifest, r"manifest\.json: is missing or damaged"),
    (old_version, r"manifest\.json: has format version 0, this moesaic reads 1"),
    (other_key, r"manifest\.json: is of another corpus \(key ffff"),
    (flip_bit, r"train\.bin: has another sha256"),
    (cut_stream, r"eval\.bin: has \d+ bytes instead of \d+"),
    (lambda folder: (folder / "eval.bin").unlink(), r"eval\.bin: is missing"),
    (other_stream, r"eval\.bin: is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named_with_a_remedy(
    prepared: Prepared, damage: Callable[[Path], None], message: str
) -> None:
    damage(prepared.folder)
    with pytest.raises(DataError, match=f"{message}.*; delete the folder {prepared.folder} and prepare"):
        open_prepared(prepared.folder, prepared.manifest["key"])


def test_another_tokenizer_is_refused(prepared: Prepared) -> None:
    train_bpe(["text"], 300).save(prepared.folder)
    again = open_prepared(prepared.folder, prepared.manifest["key"])
    with pytest.raises(DataError, match=r"about_tokenizer\.json: is another tokenizer's; delete the folder"):
        _ = again.tokenizer
