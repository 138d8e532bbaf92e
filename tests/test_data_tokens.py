"""Corpora of tokens: read where they are, split by document, refused where they cannot be right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.data.config import ByteTokenizer, FileTokenizer, TokensData
from moesaic.data.errors import DataError
from moesaic.data.loader import Loader, eval_batches
from moesaic.data.prepare import prepare, vocab_of
from moesaic.data.tokenizer import CONTENT_FILE, train_bpe
from moesaic.data.tokens import Joined

MARK = 9


def documents(seed: int, count: int = 60) -> list[np.ndarray]:
    """Each begins with the mark."""
    draw = np.random.default_rng(seed)
    return [np.concatenate([[MARK], draw.integers(10, 300, 3 + i % 17)]) for i in range(count)]


def write(path: Path, parts: list[np.ndarray], dtype: str = "uint16") -> Path:
    np.concatenate(parts).astype(dtype).tofile(path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> TokensData:
    (tmp_path / "ids").mkdir()
    for shard in range(3):
        write(tmp_path / "ids" / f"{shard}.bin", documents(shard))
    return TokensData(
        path=str(tmp_path / "ids"),
        mark=MARK,
        vocab=300,
        eval_fraction=0.1,
        cache=str(tmp_path / "cache"),
        workers=1,
    )


def split(stream: Any) -> list[tuple[int, ...]]:
    ids = stream[: len(stream)]
    return [tuple(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == MARK)[1:])]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_is_in_one_stream(config: TokensData, dtype: Any, workers: int) -> None:
    for shard in range(3):
        write(Path(str(config.path)) / f"{shard}.bin", documents(shard), dtype)
    prepared = prepare(replace(config, dtype=dtype, workers=workers))
    expected = [tuple(d.tolist()) for shard in range(3) for d in documents(shard)]
    train, held = split(prepared.train), split(prepared.eval)
    assert 5 < len(held) < 40
    assert train == [d for d in expected if d not in set(held)]
    assert sorted(train + held) == sorted(expected)
    summary = prepared.summary()
    assert (summary["documents"], summary["tokens"]) == (180, sum(map(len, expected)))
    assert (summary["bytes"], summary["bytes_per_token"], summary["held_out_by"]) == (None, None, "hash")
    assert prepared.tokenizer.token_bytes() is None
    assert summary["longest"][0][1] == 20
    assert vocab_of(config) == prepared.tokenizer.vocab == 300
    size = sum(path.stat().st_size for path in Path(str(config.path)).iterdir())
    assert sum(path.stat().st_size for path in prepared.folder.iterdir()) < size + 20_000


def test_the_loader_reads_it_like_an_array(config: TokensData) -> None:
    stream = prepare(config).train
    whole = stream[: len(stream)]
    options = {"mark": MARK, "seq_len": 16, "sequences": 8, "seed": 3}
    for step in (0, 5, 40):
        ours, plain = Loader(stream, **options).batch(step), Loader(whole, **options).batch(step)
        assert (ours.tokens == plain.tokens).all()
        assert (ours.documents == plain.documents).all()
    settings = {"mark": MARK, "seq_len": 16, "sequences": 8, "limit_tokens": 100}
    for ours, plain in zip(eval_batches(stream, **settings), eval_batches(whole, **settings), strict=True):
        assert (ours.targets == plain.targets).all()


def test_the_cache_follows_the_files(config: TokensData) -> None:
    first = prepare(config)
    assert prepare(replace(config, seq_len=64)).folder == first.folder
    write(Path(str(config.path)) / "1.bin", documents(9))
    assert prepare(config).folder != first.folder
    (first.folder / "pieces.npz").write_bytes(b"")
    for shard in range(3):
        write(Path(str(config.path)) / f"{shard}.bin", documents(shard))
    with pytest.raises(DataError, match=r"pieces\.npz: is missing or damaged .*delete the folder"):
        prepare(config)


def test_held_out_files(config: TokensData, tmp_path: Path) -> None:
    held = write(tmp_path / "val.bin", documents(7, 20))
    prepared = prepare(replace(config, eval_path=str(held)))
    assert split(prepared.eval) == [tuple(d.tolist()) for d in documents(7, 20)]
    assert len(split(prepared.train)) == 180
    assert prepared.summary()["held_out_by"] == "files"
    with pytest.raises(DataError, match=r"data\.eval_path: .*0\.bin is in data\.path too"):
        prepare(replace(config, eval_path=f"{config.path}/0.bin"))
    with pytest.raises(DataError, match=r"data\.eval_path: .*: no such file or folder"):
        prepare(replace(config, eval_path=f"{config.path}/none.bin"))


def test_without_documents_the_end_is_held_out(config: TokensData) -> None:
    for shard in range(3):
        write(Path(str(config.path)) / f"{shard}.bin", [np.arange(10, 110)])
    prepared = prepare(config)
    assert (len(prepared.train), len(prepared.eval)) == (270, 30)
    assert prepared.eval[:3].tolist() == [80, 81, 82]
    assert prepared.summary()["held_out_by"] == "tail"


def odd(path: Path) -> None:
    path.write_bytes(b"\1\0\1")


def numpy_file(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.arange(5, dtype=np.uint16))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (odd, r"1\.bin: has 3 bytes, which is no whole number of uint16"),
        (lambda path: path.write_bytes(b""), r"1\.bin: is empty"),
        (numpy_file, r"1\.bin: is a \.npy file; write the ids alone"),
        (lambda path: write(path, [np.array([5, 300, 7])]), r"1\.bin: token 1 is 300, and there are 300 ids"),
    ],
)
def test_files_that_cannot_be_right(config: TokensData, spoil: Callable[[Path], None], message: str) -> None:
    spoil(Path(str(config.path)) / "1.bin")
    with pytest.raises(DataError, match=message + r".*data\.on_error=skip"):
        prepare(config)
    summary = prepare(replace(config, on_error="skip")).summary()
    assert summary["documents"] == 120
    assert [name for name, _ in summary["skipped"]] == ["train/1.bin"]


def test_nothing_left(config: TokensData) -> None:
    for shard in range(3):
        odd(Path(str(config.path)) / f"{shard}.bin")
    with pytest.raises(DataError, match="the train stream has no tokens"):
        prepare(replace(config, on_error="skip"))


def test_a_tokenizer_gives_bytes_and_has_to_fit(config: TokensData, tmp_path: Path) -> None:
    bpe = train_bpe(["some text " * 9], 290)
    bpe.save(tmp_path)
    given = FileTokenizer(path=str(tmp_path / CONTENT_FILE))
    texts = [f"text number {i} is some text" for i in range(50)]
    ids = [np.array([bpe.mark, *bpe.encode(text)]) for text in texts]
    for shard in range(3):
        write(Path(str(config.path)) / f"{shard}.bin", ids[shard::3])
    known = bpe.decode([]) == "" and replace(config, mark=bpe.mark, vocab=None, tokenizer=given)
    assert isinstance(known, TokensData)
    prepared = prepare(known)
    assert prepared.summary()["bytes"] == sum(map(len, texts))
    assert prepared.summary()["splits"]["train"]["documents"] < 50
    padded = prepare(replace(known, vocab=512))
    assert padded.tokenizer.vocab == vocab_of(replace(known, vocab=512)) == 512
    with pytest.raises(DataError, match=r"data\.vocab: 200, but data\.tokenizer has"):
        prepare(replace(known, vocab=200))
    with pytest.raises(DataError, match=r"data\.mark: 5, but documents of data\.tokenizer start with"):
        prepare(replace(known, mark=5))
    with pytest.raises(DataError, match=r"data\.vocab: 300, but data\.tokenizer has 257 ids"):
        prepare(replace(config, tokenizer=ByteTokenizer()))


def test_another_token_as_the_mark(tmp_path: Path) -> None:
    from moesaic.data.tokenizer import load_tokenizer, read_tokenizer

    bpe = train_bpe(["some text " * 9], 290)
    bpe.save(tmp_path)
    path = tmp_path / CONTENT_FILE
    path.write_text(path.read_text().replace("<|doc|>", "<|endoftext|>"))
    tokenizer = read_tokenizer(path, mark="<|endoftext|>")
    assert tokenizer.mark == bpe.mark
    assert tokenizer.mark not in tokenizer.encode("a <|endoftext|>")
    assert tokenizer.decode([tokenizer.mark, *tokenizer.encode("some text")]) == "some text"
    tokenizer.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").digest == tokenizer.digest
    assert read_tokenizer(path).mark != tokenizer.mark
    with pytest.raises(DataError, match=r"holds no token '<\|end\|>' .*<\|endoftext\|>"):
        read_tokenizer(path, mark="<|end|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mark": -1, "vocab": 3}, "mark: -1 is negative"),
        ({"mark": 3, "vocab": 3}, "vocab: 3 leaves no room for mark = 3"),
        ({"mark": 3}, "vocab: missing"),
        ({"mark": 3, "vocab": 70000}, "dtype: uint16 holds no id of 65536"),
    ],
)
def test_fields_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokensData(path="x", **options)  # pyright: ignore[reportArgumentType]


def test_pieces_read_like_an_array() -> None:
    files = [np.arange(10), np.arange(100, 110)]
    stream = Joined(files, np.array([[1, 2, 3], [0, 0, 4], [1, 9, 1]]))
    assert stream[:].tolist() == [102, 103, 104, 0, 1, 2, 3, 109]
    assert stream[np.array([[7, 0], [3, 2]])].tolist() == [[109, 102], [0, 104]]
    with pytest.raises(IndexError, match="positions 8 to 8 of a stream of 8"):
        stream[np.array([8])]
