"""The work of preparation, in pieces that processes share: a shard of sources becomes texts, then tokens.

A shard's files appear whole or not at all, under names that say what is done, so that an interrupted
preparation goes on where it was: `00000.text` with `00000.index` (its documents), then `00000.tokens`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

from moesaic.data.corpora import Source, read
from moesaic.data.errors import DataError
from moesaic.data.tokenizer import Tokenizer, load_tokenizer
from moesaic.kernels.files import Replaced

PIECE = 1 << 22
"""Characters that are encoded at once; a longer document is encoded in pieces that end with a line."""


class Fate(IntEnum):
    """Where a document goes."""

    DROP = 0
    TRAIN = 1
    EVAL = 2
    BOTH = 3
    """Its tail is held out."""


@dataclass(frozen=True)
class Entry:
    """A document of a shard, without its text."""

    name: str
    domain: str
    key: str
    start: int
    """Where its UTF-8 begins in the shard's texts."""
    size: int


@dataclass(frozen=True)
class Part:
    """The tokens of a document, or of one side of it, mark included."""

    entry: int
    fate: Fate
    tokens: np.ndarray
    size: int
    """UTF-8 bytes."""


def read_shard(folder: Path, number: int, sources: list[Source], stop: bool) -> None:
    """Read the sources' documents into the shard's texts. `stop`: raise DataError at what cannot be read."""
    skipped: list[tuple[str, str]] = []

    def skip(name: str, reason: str) -> None:
        if stop:
            raise DataError(
                f"{name}: {reason}; repair or remove it, or leave such out with data.on_error=skip"
            )
        skipped.append((name, reason))

    entries: list[tuple[str, str, str, int, int]] = []
    at = 0
    with Replaced(folder / f"{number:05}.text") as path, path.open("wb") as file:
        for source in sources:
            for document in read(source, skip):
                text = document.text.encode()
                entries.append((document.name, document.domain, document.key, at, len(text)))
                at += file.write(text)
    with Replaced(folder / f"{number:05}.index") as path:
        path.write_text(json.dumps({"size": at, "entries": entries, "skipped": skipped}), encoding="utf-8")


def read_index(folder: Path, number: int) -> tuple[list[Entry], list[tuple[str, str]]] | None:
    """Documents of the shard, and what was skipped. None where it has yet to be read."""
    try:
        index = json.loads((folder / f"{number:05}.index").read_text(encoding="utf-8"))
        if (folder / f"{number:05}.text").stat().st_size != index["size"]:
            return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return [Entry(*entry) for entry in index["entries"]], [(name, why) for name, why in index["skipped"]]


def read_text(folder: Path, number: int, entry: Entry, limit: int | None = None) -> str:
    """The document's text, or its beginning of about `limit` bytes."""
    with (folder / f"{number:05}.text").open("rb") as file:
        file.seek(entry.start)
        size = entry.size if limit is None else min(limit, entry.size)
        return file.read(size).decode(errors="ignore")  # a limit may cut a character


def encode_shard(folder: Path, number: int, fates: Sequence[int], tail: float) -> None:
    """Encode the shard's documents with the folder's tokenizer. `tail`: share that Fate.BOTH holds out."""
    found = read_index(folder, number)
    assert found is not None, "shards are encoded after all are read"
    texts: list[str] = []
    rows: list[tuple[int, int, int, int]] = []  # entry, fate, pieces, bytes
    for i, (entry, fate) in enumerate(zip(found[0], fates, strict=True)):
        for text, side in _sides(read_text(folder, number, entry), Fate(fate), tail):
            pieces = list(_pieces(text))
            texts += pieces
            rows.append((i, side, len(pieces), len(text.encode())))
    tokenizer = _tokenizer(folder / "tokenizer")
    dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
    mark = np.array([tokenizer.mark], dtype)
    encoded = iter(tokenizer.encode_batch(texts))
    parts: list[np.ndarray] = []
    table: list[tuple[int, int, int, int]] = []  # entry, fate, tokens, bytes
    for i, side, pieces, size in rows:
        part = [mark, *(next(encoded).astype(dtype) for _ in range(pieces))]
        parts += part
        table.append((i, side, sum(map(len, part)), size))
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    with Replaced(folder / f"{number:05}.tokens") as path, path.open("wb") as file:
        np.savez(file, tokens=tokens, table=np.array(table, np.int64).reshape(-1, 4))


def is_encoded(folder: Path, number: int) -> bool:
    """Whether `encode_shard` has finished."""
    return (folder / f"{number:05}.tokens").exists()


def read_parts(folder: Path, number: int) -> Iterator[Part]:
    """What `encode_shard` wrote, in the order of the shard's documents."""
    with np.load(folder / f"{number:05}.tokens", allow_pickle=False) as arrays:
        tokens, table = arrays["tokens"], arrays["table"]
    at = 0
    for entry, fate, count, size in table.tolist():
        yield Part(entry, Fate(fate), tokens[at : at + count], size)
        at += count


def _sides(text: str, fate: Fate, tail: float) -> list[tuple[str, Fate]]:
    """The text as what it is for; a tail begins with a line where it can."""
    if fate == Fate.DROP:
        return []
    if fate != Fate.BOTH:
        return [(text, fate)]
    cut = int(len(text) * (1 - tail))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return [(side, to) for side, to in ((text[:cut], Fate.TRAIN), (text[cut:], Fate.EVAL)) if side.strip()]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)
