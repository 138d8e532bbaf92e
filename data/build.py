"""From the sources of a corpus to token streams: read, train the tokenizer, encode, write.

A `Draft` is the folder where that happens. What an interrupted attempt finished is in it, and used.
"""

import hashlib
import json
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.config import DataConfig, TextDataConfig
from moesaic.data.corpora import Source, cut
from moesaic.data.errors import DataError
from moesaic.data.prepared import FORMAT_VERSION, MANIFEST
from moesaic.data.shards import (
    Entry,
    Fate,
    encode_shard,
    is_encoded,
    read_index,
    read_parts,
    read_shard,
    read_text,
)
from moesaic.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from moesaic.data.workers import Workers
from moesaic.kernels.files import Replaced

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); the units differ by stage."""

MIN_SHARD, MAX_SHARD, SHARDS = 1 << 19, 1 << 25, 512
"""Bytes of source per shard, and how many there are when neither bound holds."""
SAMPLE, SAMPLE_DOCUMENT = 1 << 24, 1 << 20
"""Bytes of training text that BPE is trained on, and at most of one document."""
IGNORED = ("seq_len", "mask_documents", "cache", "workers", "tokenizer", "path", "packages", "eval_path")
"""Fields that no key has: they do not change the content, or are in it as digests."""
LONGEST = 10


class Draft:
    """A corpus on its way to streams. `name` begins the names of its folder."""

    def __init__(self, config: TextDataConfig, sources: list[Source], root: Path, name: str) -> None:
        self.config, self.sources = config, sources
        self.shards = _cut_shards(sources)
        layout = hashlib.sha256(
            repr([[(s.name, s.start) for s in shard] for shard in self.shards]).encode()
        ).hexdigest()
        self.folder = root / f"{name}.{layout[:8]}.work"  # another layout's shards are of no use
        self.entries: list[list[Entry]] = []
        """Documents of each shard, once they are read."""
        self.skipped: list[tuple[str, str]] = []

    def rename(self, name: str) -> None:
        """Go on under another name, unless a draft of that name has begun."""
        folder = self.folder.with_name(name + "." + self.folder.name.rsplit(".", 2)[1] + ".work")
        with suppress(OSError):  # such as one that another process has just begun
            self.folder.rename(folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = folder

    def read(self, workers: Workers, report: Report) -> None:
        """Read all documents and decide where each goes. DataError where there is none."""
        self.folder.mkdir(exist_ok=True)
        waiting = [n for n in range(len(self.shards)) if read_index(self.folder, n) is None]
        tasks = [(self.folder, n, self.shards[n], self.config.on_error == "stop") for n in waiting]
        workers.run(read_shard, tasks, _progress("read", waiting, len(self.shards), report))
        for n in range(len(self.shards)):
            found = read_index(self.folder, n)
            assert found is not None
            self.entries.append(found[0])
            self.skipped += found[1]
        if self.decided[1] == "none":
            raise DataError(
                f"data: the corpus is empty: {len(self.sources)} files, {len(self.skipped)} of their parts "
                "skipped, no document with text; give files with text"
            )

    @cached_property
    def decided(self) -> tuple[list[list[int]], str]:
        """Fates of the documents, and what decided them."""
        return _decide(self.entries, self.config.eval_fraction)

    def sample(self, limit: int) -> Iterator[str]:
        """Training text up to `limit` bytes, in the order of hashes: held-out text never shapes the tokenizer."""
        fates, _ = self.decided
        chosen = sorted(
            (entry.key, entry.domain, n, i)
            for n, shard in enumerate(self.entries)
            for i, entry in enumerate(shard)
            if fates[n][i] in (Fate.TRAIN, Fate.BOTH)
        )
        left = limit
        for _, _, n, i in chosen:
            entry = self.entries[n][i]
            usable = (
                entry.size if fates[n][i] == Fate.TRAIN else int(entry.size * (1 - self.config.eval_fraction))
            )
            size = min(usable, SAMPLE_DOCUMENT, left)
            left -= size
            if size <= 0:
                return
            yield read_text(self.folder, n, entry, size)

    def train(self, vocab: int, report: Report) -> Tokenizer:
        """A tokenizer of `vocab` ids for this text. An interrupted attempt's is in the folder, and used."""
        folder = self.folder / "tokenizer"
        if folder.exists():
            return load_tokenizer(folder)
        report("tokenizer", 0, 1)
        tokenizer = train_bpe(self.sample(SAMPLE), vocab)
        report("tokenizer", 1, 1)
        return tokenizer

    def finish(
        self, tokenizer: Tokenizer, key: str, folder: Path, *, workers: Workers, report: Report
    ) -> None:
        """Encode, and make the folder."""
        if not (self.folder / "tokenizer").exists():
            with Replaced(self.folder / "tokenizer") as temporary:
                tokenizer.save(temporary)
        fates, split = self.decided
        waiting = [n for n in range(len(self.shards)) if not is_encoded(self.folder, n)]
        tasks = [(self.folder, n, fates[n], self.config.eval_fraction) for n in waiting]
        workers.run(encode_shard, tasks, _progress("encode", waiting, len(self.shards), report))
        done = self.folder / "done"
        shutil.rmtree(done, ignore_errors=True)
        tokenizer.save(done)
        written = _write_streams(self.folder, done, self.entries, tokenizer, report)
        manifest = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "kind": self.config.kind,
            "options": options_of(self.config),
            "split": split,
            "tokenizer": {f: getattr(tokenizer, f) for f in ("name", "vocab", "mark", "digest")},
            **written,
            "duplicates": sum(row.count(Fate.DROP) for row in fates),
            "skipped": self.skipped,
            "files": [(source.name, source.size, source.digest) for source in self.sources],
            "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        }
        publish(done, folder, manifest)
        for leftover in folder.parent.glob(f"{folder.name}.*.work"):
            shutil.rmtree(leftover, ignore_errors=True)


def publish(done: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Give the finished folder `done` its manifest, and then its name: it is complete or absent."""
    (done / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*done.iterdir(), done):
        _flush(path)
    done.rename(folder)


def options_of(config: DataConfig) -> dict[str, Any]:
    """The options that decide the content and are not in it already, as digests are."""
    return {name: value for name, value in asdict(config).items() if name not in IGNORED}


def in_eval(key: str, fraction: float) -> bool:
    """Whether a document with this hash is held out."""
    return int.from_bytes(bytes.fromhex(key)[:8], "big") / 2**64 < fraction


def _decide(entries: list[list[Entry]], fraction: float) -> tuple[list[list[int]], str]:
    """Each document's fate, and what decided: `hash`, `tail`, or `none` where there is no document.

    Duplicates are dropped. By hash, unless that would hold out nothing or all, or less than one document is
    to be expected: then the tail of every document is held out.
    """
    seen: set[tuple[str, str]] = set()
    fates: list[list[int]] = []
    for shard in entries:
        fates.append([])
        for entry in shard:
            new = (entry.domain, entry.key) not in seen
            seen.add((entry.domain, entry.key))
            side = Fate.EVAL if in_eval(entry.key, fraction) else Fate.TRAIN
            fates[-1].append(side if new else Fate.DROP)
    if not seen:
        return fates, "none"
    both = any(Fate.EVAL in row for row in fates) and any(Fate.TRAIN in row for row in fates)
    if both and len(seen) * fraction >= 1:
        return fates, "hash"
    return [[Fate.BOTH if fate else Fate.DROP for fate in row] for row in fates], "tail"


def _write_streams(
    work: Path, done: Path, entries: list[list[Entry]], tokenizer: Tokenizer, report: Report
) -> dict[str, Any]:
    """Join the shards: training documents in the order of names, held-out ones in the order of hashes.

    So any beginning of the held-out stream is a fair sample of it. Returns what the manifest says about both.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {"train": {}, "eval": {}}
    held_out: list[tuple[str, str, str, np.ndarray]] = []
    longest: list[tuple[int, str]] = []
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    streams = {split: {"dtype": dtype.name, "tokens": 0, "sha256": ""} for split in counts}
    digests = {split: hashlib.sha256() for split in counts}
    with (done / "train.bin").open("wb") as train, (done / "eval.bin").open("wb") as held:
        for n, shard in enumerate(entries):
            for part in read_parts(work, n):
                entry = shard[part.entry]
                split = "train" if part.fate == Fate.TRAIN else "eval"
                count = counts[split].setdefault(entry.domain, {"documents": 0, "bytes": 0, "tokens": 0})
                for field, more in (("documents", 1), ("bytes", part.size), ("tokens", len(part.tokens))):
                    count[field] += more
                streams[split]["tokens"] += len(part.tokens)
                longest = sorted([*longest, (len(part.tokens), entry.name)], reverse=True)[:LONGEST]
                if split == "train":
                    train.write(part.tokens.tobytes())
                    digests[split].update(part.tokens.tobytes())
                else:
                    held_out.append((entry.key, entry.domain, entry.name, part.tokens.copy()))
            report("write", n + 1, len(entries))
        for *_, tokens in sorted(held_out, key=lambda document: document[:3]):
            held.write(tokens.tobytes())
            digests["eval"].update(tokens.tobytes())
    for split, stream in streams.items():
        stream["sha256"] = digests[split].hexdigest()
        if not stream["tokens"]:
            sizes = sum(entry.size for shard in entries for entry in shard)
            raise DataError(
                f"data: {sizes} bytes of text are too few to hold out some for {split}; give more text"
            )
    return {
        "streams": streams,
        "counts": counts,
        "longest": [(name, tokens) for tokens, name in longest],
        "held_out": [name for _, _, name, _ in held_out],
    }


def _cut_shards(sources: list[Source]) -> list[list[Source]]:
    """Consecutive sources of similar total size: a function of the corpus alone, whatever the workers."""
    size = min(max(sum(source.size for source in sources) // SHARDS, MIN_SHARD), MAX_SHARD)
    shards: list[list[Source]] = []
    room = 0
    for piece in (piece for source in sources for piece in cut(source, size)):
        if room <= 0:
            shards.append([])
            room = size
        shards[-1].append(piece)
        room -= piece.size
    return shards


def _progress(stage: str, waiting: list[int], total: int, report: Report) -> Callable[[int], None]:
    """Reports finished shards; those of an earlier attempt count from the start."""
    counts: dict[str, int] = defaultdict(lambda: total - len(waiting))
    report(stage, counts[stage], total)

    def done(_: int) -> None:
        counts[stage] += 1
        report(stage, counts[stage], total)

    return done


def _flush(path: Path) -> None:
    """To the disk, before the name that promises it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
