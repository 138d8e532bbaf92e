import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.data import build as module
from moesaic.data import prepare as preparing
from moesaic.data.build import in_eval
from moesaic.data.config import (
    BpeTokenizer,
    ByteTokenizer,
    FileTokenizer,
    JsonlData,
    PythonData,
    TextData,
)
from moesaic.data.errors import DataError
from moesaic.data.prepare import cache_root, prepare
from moesaic.data.prepared import Prepared
from moesaic.data.tokenizer import CONTENT_FILE, train_bpe


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def texts_of(prepared: Prepared, split: str) -> list[str]:
    stream = getattr(prepared, split)
    tokenizer = prepared.tokenizer
    starts = np.flatnonzero(stream == tokenizer.mark)
    assert starts[0] == 0
    return [tokenizer.decode(document) for document in np.split(stream, starts[1:])]


@pytest.fixture
def corpus(tmp_path: Path) -> TextData:
    """60 documents of about 1 kB, one a duplicate and one empty."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        words = " ".join(f"word{(i * j) % 97} \u00e9" for j in range(100 + i))
        (folder / f"{i:02}.txt").write_text(words + "\n", encoding="utf-8")
    (folder / "98.txt").write_bytes((folder / "03.txt").read_bytes())
    (folder / "99.txt").write_text("\n")
    return TextData(
        path=str(folder),
        tokenizer=BpeTokenizer(vocab=300),
        eval_fraction=0.1,
        cache=str(tmp_path / "cache"),
        workers=1,
    )


def originals(config: TextData) -> dict[str, str]:
    assert isinstance(config.path, str)
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(config.path).iterdir())}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BpeTokenizer(vocab=300), BpeTokenizer(vocab=70_000)])
def test_streams_hold_every_document_once(corpus: TextData, tokenizer: Any) -> None:
    prepared = prepare(replace(corpus, tokenizer=tokenizer))
    expected = [text for name, text in originals(corpus).items() if name not in ("98.txt", "99.txt")]
    held = {text for text in expected if in_eval(key(text), 0.1)}
    assert 1 <= len(held) < 20
    assert texts_of(prepared, "train") == [text for text in expected if text not in held]
    assert texts_of(prepared, "eval") == sorted(held, key=key)
    assert np.asarray(prepared.train).dtype == (np.uint32 if prepared.tokenizer.vocab > 65536 else np.uint16)
    for split in ("train", "eval"):
        sizes = prepared.tokenizer.token_bytes()
        assert sizes is not None
        counted = sizes[getattr(prepared, split)].sum()
        assert counted == prepared.manifest["counts"][split]["text"]["bytes"]


def test_manifest_records_where_the_text_came_from(corpus: TextData) -> None:
    manifest = prepare(corpus).manifest
    assert [name for name, _, _ in manifest["files"]] == list(originals(corpus))
    for (_, size, digest), text in zip(manifest["files"], originals(corpus).values(), strict=True):
        assert (size, digest) == (len(text.encode()), key(text))
    assert manifest["duplicates"] == 1
    assert manifest["split"] == "hash"
    assert manifest["tokenizer"]["vocab"] == 300
    assert len(manifest["held_out"]) == manifest["counts"]["eval"]["text"]["documents"]


def test_split_follows_the_first_eight_bytes() -> None:
    assert in_eval("1999999999990000" + "f" * 48, 0.1)
    assert not in_eval("1999999999999aaa" + "0" * 48, 0.1)


def test_second_time_reads_nothing(corpus: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in originals(corpus):
        os.utime(Path(str(corpus.path), path), (1e9, 1e9))
    first = prepare(corpus)
    monkeypatch.setattr(hashlib, "file_digest", pytest.fail)
    monkeypatch.setattr(preparing, "Draft", pytest.fail)
    again = prepare(replace(corpus, seq_len=99, mask_documents=False, workers=2))
    assert again.folder == first.folder


def test_an_edit_within_the_tick_of_the_clock_is_seen(corpus: TextData) -> None:
    """Same size, same time of modification: what was written a moment ago is always read again."""
    path = Path(str(corpus.path), "00.txt")
    first = prepare(corpus)
    stat = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("word0", "word1"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert prepare(corpus).folder != first.folder


def test_key_depends_on_content_and_options_not_on_the_place(corpus: TextData, tmp_path: Path) -> None:
    first = prepare(corpus).folder
    moved = Path(str(corpus.path)).rename(tmp_path / "moved")
    assert prepare(replace(corpus, path=str(moved))).folder == first
    changed: list[TextData] = [
        replace(corpus, path=f"{moved}/0*.txt"),
        replace(corpus, path=str(moved), eval_fraction=0.2),
        replace(corpus, path=str(moved), tokenizer=ByteTokenizer()),
        replace(corpus, path=str(moved), tokenizer=BpeTokenizer(vocab=301)),
        replace(corpus, path=str(moved), on_error="skip"),
    ]
    assert len({first, *(prepare(config).folder for config in changed)}) == 6


def test_result_does_not_depend_on_workers_or_shards(
    corpus: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(corpus)
    monkeypatch.setattr(module, "MIN_SHARD", 20_000)
    two = prepare(replace(corpus, cache=str(tmp_path / "other"), workers=2))
    for name in ("train.bin", "eval.bin", "tokenizer.json", "manifest.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_one_file_has_its_tail_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    prepared = prepare(
        TextData(path=str(path), tokenizer=ByteTokenizer(), eval_fraction=0.1, cache=str(tmp_path))
    )
    (train,), (held,) = texts_of(prepared, "train"), texts_of(prepared, "eval")
    assert train + held == path.read_text()
    assert held.startswith("line ")
    assert abs(len(held) / path.stat().st_size - 0.1) < 0.01
    assert prepared.summary()["held_out_by"] == "tail"


def test_bpe_never_sees_held_out_text(tmp_path: Path) -> None:
    """The tail alone repeats one word; a tokenizer that had seen it would have it as a token."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} " for i in range(5000)) + "\n" + "zygomorphic " * 400)
    config = TextData(
        path=str(path), tokenizer=BpeTokenizer(vocab=300), eval_fraction=0.5, cache=str(tmp_path)
    )
    assert len(prepare(config).tokenizer.encode("zygomorphic")) == len("zygomorphic")
    path.write_text("zygomorphic " * 400 + "\n" + "".join(f"{i} " for i in range(5000)))
    assert len(prepare(config).tokenizer.encode("zygomorphic")) < 4


def test_bpe_never_sees_held_out_documents(corpus: TextData) -> None:
    held = next(i for i in range(999) if in_eval(key("zygomorphic " * i), 0.1) and i > 300)
    kept = next(i for i in range(999) if not in_eval(key("zygomorphic " * i), 0.1) and i > 300)
    path = Path(str(corpus.path), "zygomorphic.txt")
    lengths: list[int] = []
    for times in (held, kept):
        path.write_text("zygomorphic " * times)
        lengths.append(len(prepare(corpus).tokenizer.encode("zygomorphic")))
    assert lengths[0] > lengths[1]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [f"text number {i}" for i in range(50)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepared = prepare(
        JsonlData(path=str(path), tokenizer=ByteTokenizer(), eval_fraction=0.1, cache=str(tmp_path))
    )
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "eval")) == sorted(lines)
    assert prepared.summary()["kind"] == "jsonl"


def test_file_tokenizer_is_part_of_the_key(corpus: TextData, tmp_path: Path) -> None:
    path = tmp_path / CONTENT_FILE
    config = replace(corpus, tokenizer=FileTokenizer(path=str(path)))
    train_bpe(["some text"], 300).save(tmp_path)
    first = prepare(config)
    assert first.tokenizer.name == "file:tokenizer.json"
    train_bpe(["other text"], 300).save(tmp_path)
    assert prepare(config).folder != first.folder
    path.write_text('{"model": {"type": "Nonsense", "vocab": {"a": 0}}}')
    with pytest.raises(DataError, match=r"file:tokenizer\.json: not a tokenizer"):
        prepare(config)


def test_skip_counts_what_it_leaves_out(corpus: TextData) -> None:
    bad = Path(str(corpus.path), "bad.txt")
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8.*data\.on_error=skip"):
        prepare(corpus)
    summary = prepare(replace(corpus, on_error="skip")).summary()
    assert [name for name, _ in summary["skipped"]] == [str(bad)]
    assert summary["documents"] == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "the corpus is empty: 1 files, 0 of their parts skipped, no document with text"),
        ("a", "1 bytes of text are too few to hold out some for train; give more text"),
    ],
)
def test_too_little_text(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(TextData(path=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache")))


def test_cache_that_cannot_be_written(corpus: TextData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"file.*: .*; check that .* or choose another cache with data\.cache"
    ):
        prepare(replace(corpus, cache=str(tmp_path / "file" / "cache")))


def test_full_disk(corpus: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_shard", fail)
        with pytest.raises(
            DataError, match="No space left on device; free some space, or choose another cache"
        ):
            prepare(corpus)
    assert prepare(corpus).summary()["documents"] == 60


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root(PythonData(cache=str(tmp_path))) == tmp_path
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "x"))
    assert cache_root(PythonData()) == tmp_path / "x"
    monkeypatch.setenv("MOESAIC_CACHE", "")
    assert cache_root(PythonData()) == Path.home() / ".cache" / "moesaic"


SCRIPT = """
import json, sys, time
from moesaic.data import build, prepare
from moesaic.data.config import BpeTokenizer, TextData

build.MIN_SHARD = 20_000
path, cache, workers, stop_at = sys.argv[1:]

def report(*progress):
    print(json.dumps(progress), flush=True)
    if json.dumps(progress[:2]) == stop_at:
        time.sleep(600)

if __name__ == "__main__":
    bpe = BpeTokenizer(vocab=300)
    config = TextData(path=path, cache=cache, workers=int(workers), tokenizer=bpe, eval_fraction=0.1)
    print(prepare.prepare(config, report=report).folder, flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, config: TextData, workers: int, stop_at: str) -> "subprocess.Popen[str]":
    arguments = [str(config.path), str(config.cache), str(workers), stop_at]
    return subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("stage", "done", "workers"),
    [("read", 2, 1), ("read", 1, 2), ("tokenizer", 0, 1), ("encode", 2, 1), ("write", 1, 1)],
)
def test_a_killed_preparation_continues_where_it_was(
    corpus: TextData,
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    done: int,
    workers: int,
) -> None:
    monkeypatch.setattr(module, "MIN_SHARD", 20_000)
    expected = prepare(replace(corpus, cache=str(tmp_path / "uninterrupted")))
    with start(script, corpus, workers, json.dumps([stage, done])) as process:
        assert process.stdout is not None
        total = next(
            total for name, now, total in map(json.loads, process.stdout) if [name, now] == [stage, done]
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert bool(children) == (workers > 1)
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))

    (work,) = Path(str(corpus.cache)).glob("*.work")
    finished = {kind: {int(p.stem) for p in work.glob(f"*.{kind}")} for kind in ("index", "tokens")}
    total = len(finished["index"]) if stage == "tokenizer" else total
    assert total >= 4
    assert len(finished["index"]) >= (done if stage == "read" else total)
    assert len(finished["tokens"]) >= {"encode": done, "write": total}.get(stage, 0)

    ran: dict[str, set[int]] = {"index": set(), "tokens": set()}
    for kind, name in (("index", "read_shard"), ("tokens", "encode_shard")):
        original = getattr(module, name)

        def spy(folder: Path, number: int, *rest: Any, kind: str = kind, original: Any = original) -> None:
            ran[kind].add(number)
            original(folder, number, *rest)

        monkeypatch.setattr(module, name, spy)
    prepared = prepare(corpus)
    for kind in ran:
        assert ran[kind] == set(range(total)) - finished[kind]
    for name in ("train.bin", "eval.bin", "tokenizer.json", "manifest.json"):
        assert (prepared.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert not work.exists()


def test_two_processes_at_once_prepare_once(corpus: TextData, script: Path) -> None:
    processes = [start(script, corpus, 1, "") for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    wrote = [any('"write"' in line for line in output) for output in outputs]
    assert sorted(wrote) == [False, True]
    assert texts_of(prepare(corpus), "train")


def test_a_process_waits_for_another_and_says_so(corpus: TextData, script: Path) -> None:
    """The other one's shards have another layout and must not be taken for this one's."""
    with start(script, corpus, 1, '["tokenizer", 0]') as process:
        assert process.stdout is not None
        assert any(json.loads(line)[0] == "tokenizer" for line in process.stdout)
        reports: list[str] = []

        def report(stage: str, done: int, total: int) -> None:
            reports.append(stage)
            if stage == "wait":
                process.kill()  # its lock goes with it

        assert prepare(corpus, report=report).summary()["documents"] == 60
        assert not list(Path(str(corpus.cache)).glob("*.work"))
    assert reports.index("wait") < reports.index("tokenizer")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "still running"
        time.sleep(0.02)
