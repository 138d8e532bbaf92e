"""Parquet files and datasets: their documents, their order, and each error."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesaic.data import tables
from moesaic.data.config import ByteTokenizer, Corpus, HuggingFaceData, ParquetData
from moesaic.data.corpora import Document, cut, list_sources, read
from moesaic.data.errors import DataError
from moesaic.data.prepare import prepare

TEXTS = [f"document {i} \u4f60 {'x' * (i * 37 % 91)}" for i in range(50)]


def write(path: Path, texts: list[Any], **options: Any) -> Path:
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7, **options
    )
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def config_of(folder: Path, **options: Any) -> ParquetData:
    options = {
        "path": str(folder),
        "tokenizer": ByteTokenizer(),
        "eval_fraction": 0.2,
        "workers": 1,
    } | options
    return ParquetData(cache=str(folder.parent / "cache"), **options)


def texts_of(stream: Any) -> list[bytes]:
    ids = np.asarray(stream[: len(stream)])
    return [bytes(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == 256)[1:])]


def documents(config: Any, size: int, *, skipped: list[tuple[str, str]] | None = None) -> list[Document]:
    def skip(name: str, reason: str) -> None:
        assert skipped is not None, reason
        skipped.append((name, reason))

    return [d for source in list_sources(config) for piece in cut(source, size) for d in read(piece, skip)]


@pytest.mark.parametrize("size", [1, 300, 10**6])
def test_rows_are_documents_in_order(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH", 3)
    write(folder / "b.parquet", TEXTS[30:])
    write(folder / "a.parquet", TEXTS[:30])
    found = documents(config_of(folder), size)
    assert [d.text for d in found] == TEXTS
    assert [d.name for d in found] == [f"a.parquet@{i}" for i in range(30)] + [
        f"b.parquet@{i}" for i in range(20)
    ]
    (source, _) = list_sources(config_of(folder))
    assert len(cut(source, 1)) == 5
    assert len(cut(source, 10**6)) == 1


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_of_text(folder: Path, kind: Any) -> None:
    column = pa.array(["one", "two", "one", " "]).cast(kind)
    pq.write_table(pa.table({"body": column}), folder / "a.parquet")
    assert [d.text for d in documents(config_of(folder, column="body"), 99)] == ["one", "two", "one"]


def test_streams_hold_every_document_and_follow_edits(folder: Path) -> None:
    write(folder / "a.parquet", TEXTS)
    first = prepare(config_of(folder))
    assert sorted(texts_of(first.train) + texts_of(first.eval)) == sorted(text.encode() for text in TEXTS)
    assert first.summary()["documents"] == 50
    assert prepare(config_of(folder, path=f"{folder}/*.parquet")).folder == first.folder
    write(folder / "a.parquet", [*TEXTS[1:], "another"])
    assert prepare(config_of(folder)).folder != first.folder


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def number(path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), path)


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        (spoil, "text", r"b\.parquet: not a whole parquet file .*data\.on_error=skip"),
        (number, "text", r"b\.parquet: data\.column = 'text' holds int64, not text"),
        (None, "txt", r"a\.parquet: no column data\.column = 'txt'; did you mean 'text'\?"),
        (None, "body", r"a\.parquet: no column data\.column = 'body'; columns: id, text"),
    ],
)
def test_what_cannot_be_read_is_named(
    folder: Path, change: Callable[[Path], None] | None, column: str, message: str
) -> None:
    write(folder / "a.parquet", TEXTS)
    if change:
        change(write(folder / "b.parquet", ["more", "texts"]))
    with pytest.raises(DataError, match=message):
        prepare(config_of(folder, column=column))
    if change:
        summary = prepare(config_of(folder, on_error="skip")).summary()
        assert summary["documents"] == 50
        assert [name for name, _ in summary["skipped"]] == [str(folder / "b.parquet")]


def test_rows_without_valid_text_are_named_by_number(folder: Path) -> None:
    bad = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes()), pa.py_buffer(b"a\xffb")
    )
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.array(["x", None]), bad])}), folder / "a.parquet")
    skipped: list[tuple[str, str]] = []
    assert [d.text for d in documents(config_of(folder), 99, skipped=skipped)] == ["x", "a", "b"]
    assert [name for name, _ in skipped] == [f"{folder}/a.parquet: row 1", f"{folder}/a.parquet: row 3"]
    assert "no text in data.column" in skipped[0][1]
    assert "not UTF-8" in skipped[1][1]


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    config: Corpus = HuggingFaceData(path=str(folder)) if module == "datasets" else config_of(folder)
    with pytest.raises(DataError, match=r"needs .*; pip install 'moesaic\[data\]'"):
        list_sources(config)


def dataset(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def hf(folder: Path, **options: Any) -> HuggingFaceData:
    options = {
        "tokenizer": ByteTokenizer(),
        "eval_fraction": 0.2,
        "workers": 1,
        "path": str(folder),
    } | options
    return HuggingFaceData(cache=str(folder.parent / "cache"), **options)


def test_a_dataset_on_disk(folder: Path) -> None:
    dataset(text=TEXTS).save_to_disk(folder / "one")
    datasets.DatasetDict({"train": dataset(text=TEXTS[:40]), "test": dataset(text=TEXTS[40:])}).save_to_disk(
        folder / "many"
    )
    assert [d.text for d in documents(hf(folder / "one"), 500)] == TEXTS
    assert [d.text for d in documents(hf(folder / "many"), 500)] == TEXTS[:40]
    assert [d.text for d in documents(hf(folder / "many", split="test"), 500)] == TEXTS[40:]
    first = prepare(hf(folder / "one"))
    assert sorted(texts_of(first.train) + texts_of(first.eval)) == sorted(text.encode() for text in TEXTS)
    dataset(text=TEXTS[1:]).save_to_disk(folder / "two")
    assert prepare(hf(folder / "two")).folder != first.folder


def test_batches_of_rows_are_cut(folder: Path) -> None:
    texts = [f"text {i}" for i in range(2500)]
    dataset(text=texts).save_to_disk(folder / "one")
    (source,) = list_sources(hf(folder / "one"))
    assert [(piece.start, piece.stop) for piece in cut(source, 1)] == [(0, 1), (1, 2), (2, 3)]
    found = documents(hf(folder / "one"), 1)
    assert [d.text for d in found] == texts
    assert found[-1].name.endswith("@2499")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_of_data_files(folder: Path, suffix: str) -> None:
    if suffix == "parquet":
        write(folder / "a.parquet", TEXTS)
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert [d.text for d in documents(hf(folder), 500)] == TEXTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "txt"}, r"data\.path: .*one: no column data\.column = 'txt'; did you mean 'text'\?"),
        ({"path": "nowhere"}, r"data\.path: nowhere: no such folder"),
        ({"split": "dev", "path": "many"}, r"data\.split: 'dev' is not in .*many; splits: train"),
        ({"split": "dev", "path": "files"}, r"data\.path: .*files: cannot be loaded .*'?dev"),
        ({"subset": "x", "path": "files"}, r"data\.path: .*files: cannot be loaded .*check it, data\.subset"),
        ({"path": "empty"}, r"data\.path: .*empty: cannot be loaded"),
    ],
)
def test_datasets_that_are_not_there(folder: Path, options: dict[str, str], message: str) -> None:
    dataset(text=TEXTS).save_to_disk(folder / "one")
    datasets.DatasetDict({"train": dataset(text=TEXTS)}).save_to_disk(folder / "many")
    (folder / "empty").mkdir()
    (folder / "files").mkdir()
    write(folder / "files" / "a.parquet", TEXTS)
    path = options.get("path", "one")
    config = replace(hf(folder), **options | {"path": path if path == "nowhere" else str(folder / path)})
    with pytest.raises(DataError, match=message) as caught:
        list_sources(config)
    assert len(str(caught.value).splitlines()) == 1


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"data\.name: owner/name: cannot be reached .*; check the name"):
        list_sources(hf(folder, path=None, name="owner/name"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path: give either path"),
        ({"path": "a", "name": "b"}, "path: give either path"),
        ({"path": "a", "revision": "b"}, "revision: a folder has none"),
        ({"path": "a", "split": "train[:5]"}, "split: .* is a slice"),
    ],
)
def test_fields_that_do_not_fit(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceData(**options)  # pyright: ignore[reportArgumentType]
