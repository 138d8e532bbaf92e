"""Corpora that are tokens already: flat files of ids, mapped into memory where they are.

Each file is read once, by `scan`, to check its ids and find its documents. The cache keeps the result: which pieces of
the files make up the training stream and which the held-out one. The tokens themselves are never copied.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int

from moesaic.data.build import LONGEST, Report, options_of, publish
from moesaic.data.config import ByteTokenizer, TokensData
from moesaic.data.corpora import Source, find_files
from moesaic.data.errors import DataError
from moesaic.data.prepared import FORMAT_VERSION, Prepared, damaged, read_manifest
from moesaic.data.tokenizer import Bytes, Ids, Tokenizer, read_tokenizer
from moesaic.data.workers import Workers
from moesaic.kernels.files import Replaced

PIECES = "pieces.npz"
CHUNK = 1 << 22
"""Tokens that are counted at once."""
TRAIN, HELD_OUT = "train/", "eval/"
"""How the names of sources begin."""


class Joined:
    """Pieces of arrays as one stream. Reads like an array at positions and slices of step 1."""

    def __init__(self, files: list[np.ndarray], pieces: Int[np.ndarray, "P 3"]) -> None:
        """A piece is (index of its file, first token, number of tokens)."""
        self.files, self.pieces = files, pieces
        self._ends = pieces[:, 2].cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, at: Any, /) -> np.ndarray:
        positions = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        flat = positions.ravel()
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"positions {flat.min()} to {flat.max()} of a stream of {len(self)} tokens")
        piece = np.searchsorted(self._ends, flat, side="right")
        file, start, count = self.pieces[piece].T
        offsets = start + flat - (self._ends[piece] - count)
        out = np.empty(len(flat), self.files[0].dtype)
        for each in np.unique(file):
            chosen = file == each
            out[chosen] = self.files[each][offsets[chosen]]
        return out.reshape(positions.shape)


def list_tokens(config: TokensData) -> list[Source]:
    """The files, training ones first, in the order of their names. DataError where there are none."""
    train = find_files(config.path, "*.bin")
    held_out = (
        find_files(config.eval_path, "*.bin", key="data.eval_path") if config.eval_path is not None else []
    )
    both = {path.resolve() for _, path in train} & {path.resolve() for _, path in held_out}
    if both:
        raise DataError(f"data.eval_path: {min(both)} is in data.path too; a file is for one of them")
    return [
        Source(prefix + name, str(path), "tokens")
        for prefix, files in ((TRAIN, train), (HELD_OUT, held_out))
        for name, path in sorted(files)
    ]


def tokens_tokenizer(config: TokensData) -> Tokenizer:
    """The tokenizer that the ids were made with, as far as it is known. DataError where it does not fit."""
    if config.tokenizer is None:
        assert config.vocab is not None, "checked by the config"
        return Ids(config.vocab, config.mark)
    if isinstance(config.tokenizer, ByteTokenizer):
        tokenizer = Bytes()
    else:
        given = config.tokenizer
        tokenizer = read_tokenizer(Path(given.path), mark=given.mark, vocab=config.vocab)
    if config.vocab not in (None, tokenizer.vocab):
        raise DataError(f"data.vocab: {config.vocab}, but data.tokenizer has {tokenizer.vocab} ids")
    if config.mark != tokenizer.mark:
        raise DataError(
            f"data.mark: {config.mark}, but documents of data.tokenizer start with {tokenizer.mark}; "
            "name the right token with data.tokenizer.mark"
        )
    return tokenizer


def build_tokens(
    config: TokensData,
    sources: list[Source],
    tokenizer: Tokenizer,
    key: str,
    folder: Path,
    *,
    workers: Workers,
    report: Report,
) -> None:
    """Scan the files, decide what is held out, and make the folder."""
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir(exist_ok=True)
    waiting = [n for n in range(len(sources)) if not (work / f"{n:05}.npz").exists()]
    tasks = [(work, n, sources[n], config, tokenizer.vocab) for n in waiting]
    finished = len(sources) - len(waiting)

    def done(_: int) -> None:
        nonlocal finished
        finished += 1
        report("scan", finished, len(sources))

    report("scan", finished, len(sources))
    workers.run(scan, tasks, done)
    scans = [_read_scan(work, n) for n in range(len(sources))]
    pieces, split = _split(
        config, sources, [starts for starts, _, _, _ in scans], [k for _, k, _, _ in scans]
    )
    sizes = tokenizer.token_bytes()
    files = [
        _map(source, config) if len(scans[n][0]) else np.empty(0, config.dtype)
        for n, source in enumerate(sources)
    ]
    held_out = _histogram(Joined(files, pieces["eval"]), tokenizer.vocab)
    total = sum((counts for _, _, counts, _ in scans), np.zeros(tokenizer.vocab, np.int64))
    counts: dict[str, Any] = {}
    streams: dict[str, Any] = {}
    for name, histogram in (("train", total - held_out), ("eval", held_out)):
        tokens = int(pieces[name][:, 2].sum())
        if not tokens:
            raise DataError(f"data: the {name} stream has no tokens; give more files, or data.eval_path")
        size = None if sizes is None else int(histogram @ sizes)
        documents = max(1, int(histogram[config.mark]))
        counts[name] = {"tokens": {"documents": documents, "bytes": size, "tokens": tokens}}
        streams[name] = {"dtype": config.dtype, "tokens": tokens, "sha256": _digest(sources, pieces[name])}
    finished_folder = work / "done"
    shutil.rmtree(finished_folder, ignore_errors=True)
    tokenizer.save(finished_folder)
    np.savez(finished_folder / PIECES, train=pieces["train"], eval=pieces["eval"])
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "kind": config.kind,
        "options": options_of(config),
        "split": split,
        "tokenizer": {f: getattr(tokenizer, f) for f in ("name", "vocab", "mark", "digest")},
        "streams": streams,
        "counts": counts,
        "longest": _longest(sources, [starts for starts, _, _, _ in scans]),
        "duplicates": 0,
        "skipped": [
            (source.name, reason) for source, (_, _, _, reason) in zip(sources, scans, strict=True) if reason
        ],
        "files": [(source.name, source.size, source.digest) for source in sources],
    }
    publish(finished_folder, folder, manifest)
    shutil.rmtree(work, ignore_errors=True)


def open_tokens(folder: Path, key: str, sources: list[Source], config: TokensData) -> Prepared:
    """Map the files. DataError where the folder does not fit them."""
    manifest = read_manifest(folder, key)
    try:
        with np.load(folder / PIECES, allow_pickle=False) as arrays:
            pieces = {split: arrays[split] for split in ("train", "eval")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise damaged(folder, PIECES, f"is missing or damaged ({error!r})") from error
    used = set(np.concatenate([pieces["train"][:, 0], pieces["eval"][:, 0]]).tolist())
    files = [
        _map(source, config) if n in used else np.empty(0, config.dtype) for n, source in enumerate(sources)
    ]
    for split, about in manifest["streams"].items():
        if _digest(sources, pieces[split]) != about["sha256"]:
            raise damaged(folder, PIECES, "has another sha256 than its manifest says")
    return Prepared(folder, Joined(files, pieces["train"]), Joined(files, pieces["eval"]), manifest)


def scan(folder: Path, number: int, source: Source, config: TokensData, vocab: int) -> None:
    """Check a file and find its documents. Raise DataError at what cannot be used, or note it, by `on_error`."""
    reason = _problem(source, config, vocab)
    if reason and config.on_error == "stop":
        raise DataError(
            f"{source.path}: {reason}; repair or remove it, or leave such out with data.on_error=skip"
        )
    starts, keys, counts = np.empty(0, np.int64), np.empty(0, np.uint64), np.zeros(vocab, np.int64)
    if not reason:
        tokens = _map(source, config)
        blocks = range(0, len(tokens), CHUNK)
        marks = [at + np.flatnonzero(tokens[at : at + CHUNK] == config.mark) for at in blocks]
        starts = np.unique(np.concatenate([[0], *marks]))
        ends = [*starts[1:].tolist(), len(tokens)]
        hashes = (
            hashlib.sha256(tokens[a:b].tobytes()).digest()[:8]
            for a, b in zip(starts.tolist(), ends, strict=True)
        )
        keys = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
        counts = _histogram(tokens, vocab)
        starts = np.concatenate([starts, [len(tokens)]])
    with Replaced(folder / f"{number:05}.npz") as path, path.open("wb") as file:
        np.savez(file, starts=starts, keys=keys, counts=counts, reason=np.array(reason))


def _problem(source: Source, config: TokensData, vocab: int) -> str:
    """Why a file cannot be used; empty if it can."""
    width = np.dtype(config.dtype).itemsize
    with Path(source.path).open("rb") as file:
        beginning = file.read(6)
    if source.size == 0:
        return "is empty"
    if beginning == b"\x93NUMPY":
        return "is a .npy file; write the ids alone, with array.tofile"
    if source.size % width:
        return f"has {source.size} bytes, which is no whole number of {config.dtype} (data.dtype)"
    tokens = _map(source, config)
    for at in range(0, len(tokens), CHUNK):
        block = tokens[at : at + CHUNK]
        if int(block.max()) >= vocab:
            first = int(np.argmax(block >= vocab))
            return (
                f"token {at + first} is {block[first]}, and there are {vocab} ids "
                "(data.vocab or data.tokenizer); perhaps data.dtype is another"
            )
    return ""


def _map(source: Source, config: TokensData) -> np.ndarray:
    return np.asarray(np.memmap(source.path, np.dtype(config.dtype).newbyteorder("<"), mode="r"))


def _read_scan(folder: Path, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Starts of the documents and the end of the last, their keys, counts of ids, why the file is left out."""
    with np.load(folder / f"{number:05}.npz", allow_pickle=False) as arrays:
        return arrays["starts"], arrays["keys"], arrays["counts"], str(arrays["reason"])


def _split(
    config: TokensData, sources: list[Source], starts: list[np.ndarray], keys: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], str]:
    """Pieces of both streams, and what decided: `files`, `hash`, or `tail`, the end of the stream.

    By hash, as for text, unless that would hold out nothing or all or less than one document is to be expected.
    Held-out documents are in the order of their hashes, so that any beginning is a fair sample.
    """
    whole = [np.array([[n, 0, ends[-1]]]) for n, ends in enumerate(starts) if len(ends)]
    if config.eval_path is not None:
        held = {n for n, source in enumerate(sources) if source.name.startswith(HELD_OUT)}
        sides = [[piece for piece in whole if (piece[0, 0] in held) == side] for side in (False, True)]
        return {"train": _stack(sides[0]), "eval": _stack(sides[1])}, "files"
    documents = _stack(
        [
            np.stack([np.full(len(ends) - 1, n), ends[:-1], np.diff(ends)], 1)
            for n, ends in enumerate(starts)
            if len(ends)
        ]
    )
    every_key = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    held_out = every_key / 2.0**64 < config.eval_fraction
    if held_out.any() and not held_out.all() and len(np.unique(every_key)) * config.eval_fraction >= 1:
        order = np.argsort(every_key[held_out], kind="stable")
        return {"train": _merge(documents[~held_out]), "eval": documents[held_out][order]}, "hash"
    stream = _stack(whole)
    cut = int(stream[:, 2].sum() * (1 - config.eval_fraction))
    return {"train": _within(stream, 0, cut), "eval": _within(stream, cut, None)}, "tail"


def _stack(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty((0, 3), np.int64), *pieces]).astype(np.int64)


def _merge(pieces: np.ndarray) -> np.ndarray:
    """Neighbours that are adjacent in their file as one piece."""
    ends = pieces[:, 1] + pieces[:, 2]
    first = np.concatenate([[True], (pieces[1:, 0] != pieces[:-1, 0]) | (pieces[1:, 1] != ends[:-1])])
    merged = pieces[first]
    merged[:, 2] = np.add.reduceat(pieces[:, 2], np.flatnonzero(first))
    return merged


def _within(pieces: np.ndarray, start: int, stop: int | None) -> np.ndarray:
    """The pieces of the stream's tokens in [start, stop)."""
    ends = pieces[:, 2].cumsum()
    begins = ends - pieces[:, 2]
    low = np.maximum(begins, start)
    high = np.minimum(ends, ends[-1:] if stop is None else stop)
    cut = np.stack([pieces[:, 0], pieces[:, 1] + low - begins, high - low], 1)
    return cut[high > low]


def _histogram(tokens: "np.ndarray | Joined", vocab: int) -> np.ndarray:
    """How often each id occurs."""
    counts = np.zeros(vocab, np.int64)
    for at in range(0, len(tokens), CHUNK):
        counts += np.bincount(tokens[at : at + CHUNK], minlength=vocab)
    return counts


def _longest(sources: list[Source], starts: list[np.ndarray]) -> list[tuple[str, int]]:
    found: list[tuple[int, str]] = []
    for source, ends in zip(sources, starts, strict=True):
        lengths = np.diff(ends)
        most = np.argsort(-lengths, kind="stable")[:LONGEST]
        found += [(int(lengths[i]), f"{source.name}@{ends[i]}") for i in most]
    return [(name, tokens) for tokens, name in sorted(found, reverse=True)[:LONGEST]]


def _digest(sources: list[Source], pieces: np.ndarray) -> str:
    """Decides the content of a stream."""
    files = json.dumps([source.digest for source in sources])
    return hashlib.sha256(files.encode() + pieces.astype("<i8").tobytes()).hexdigest()
