"""From a config to a prepared corpus: find the files, read, train the tokenizer, encode, write. Once.

The folder's name holds a hash of everything its content depends on, so that an edited file or option leads to
another folder and nothing stale is ever opened. What decides only how the tokens are used is not part of it:
sequence length, masking, number of workers.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.config import BpeTokenizer, ByteTokenizer, DataConfig, FileTokenizer
from moesaic.data.corpora import Source, cut, list_sources
from moesaic.data.errors import DataError
from moesaic.data.prepared import FORMAT_VERSION, MANIFEST, Prepared, open_prepared
from moesaic.data.shards import (
    Entry,
    Fate,
    Replaced,
    encode_shard,
    is_encoded,
    read_index,
    read_parts,
    read_shard,
    read_text,
)
from moesaic.data.tokenizer import Bytes, Tokenizer, load_tokenizer, read_tokenizer, train_bpe
from moesaic.data.workers import Workers

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); the units differ by stage."""

MIN_SHARD, MAX_SHARD, SHARDS = 1 << 19, 1 << 25, 512
"""Bytes of source per shard, and how many there are when neither bound holds."""
SAMPLE, SAMPLE_DOCUMENT = 1 << 24, 1 << 20
"""Bytes of training text that BPE is trained on, and at most of one document."""
IGNORED = ("seq_len", "mask_documents", "cache", "workers", "tokenizer", "path", "packages")
"""Fields that the key leaves out: they do not change the content, or are in it as digests."""
LONGEST = 10


def prepare(config: DataConfig, *, report: Report | None = None) -> Prepared:
    """The corpus as token streams, from the cache if it is there. DataError says what is wrong, and a remedy.

    May be killed at any moment and started again, and may run in several processes at once: one works, all
    get the result.
    """
    report = report or (lambda stage, done, total: None)
    root = cache_root(config)
    try:
        tokenizer = _given_tokenizer(config)
        sources = _digested(list_sources(config), root / "digests.json", report)
        key = _key(config, sources, tokenizer)
        folder = root / f"{config.kind}-{key[:16]}"
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{folder.name}.lock", report):
                if not folder.exists():  # another process may have been first
                    _build(config, sources, tokenizer, key, folder, report)
    except OSError as error:
        where = error.filename or root
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check that it can be read, and the cache be written"
        raise DataError(
            f"{where}: {error.strerror}; {remedy}, or choose another cache with data.cache or $MOESAIC_CACHE"
        ) from error
    return open_prepared(folder, key)


def cache_root(config: DataConfig) -> Path:
    """Folder of all prepared corpora."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("MOESAIC_CACHE") or "~/.cache/moesaic").expanduser()


def in_eval(key: str, fraction: float) -> bool:
    """Whether a document with this hash is held out."""
    return int.from_bytes(bytes.fromhex(key)[:8], "big") / 2**64 < fraction


def _build(
    config: DataConfig,
    sources: list[Source],
    tokenizer: Tokenizer | None,
    key: str,
    folder: Path,
    report: Report,
) -> None:
    """Make the folder. The finished shards of an interrupted attempt are in the work folder, and used."""
    if tokenizer is not None:
        tokenizer.encode("")  # a file that the library cannot read fails here, before the work
    shards = _cut_shards(sources)
    layout = hashlib.sha256(
        repr([[(s.name, s.start) for s in shard] for shard in shards]).encode()
    ).hexdigest()
    work = folder.with_name(f"{folder.name}.{layout[:8]}.work")  # another layout's shards are of no use
    work.mkdir(exist_ok=True)
    with Workers(config.workers or _cores()) as workers:
        waiting = [n for n in range(len(shards)) if read_index(work, n) is None]
        tasks = [(work, n, shards[n], config.on_error == "stop") for n in waiting]
        workers.run(read_shard, tasks, _progress("read", waiting, len(shards), report))
        entries: list[list[Entry]] = []
        skipped: list[tuple[str, str]] = []
        for n in range(len(shards)):
            found = read_index(work, n)
            assert found is not None
            entries.append(found[0])
            skipped += found[1]
        fates, split = _decide(entries, config.eval_fraction)
        if split == "none":
            raise DataError(
                f"data: the corpus is empty: {len(sources)} files, {len(skipped)} of their parts skipped, "
                "no document with text; give files with text"
            )
        tokenizer = _tokenizer(config, tokenizer, work, entries, fates, report)
        waiting = [n for n in range(len(shards)) if not is_encoded(work, n)]
        tasks = [(work, n, fates[n], config.eval_fraction) for n in waiting]
        workers.run(encode_shard, tasks, _progress("encode", waiting, len(shards), report))
    done = work / "done"
    shutil.rmtree(done, ignore_errors=True)
    tokenizer.save(done)
    written = _write_streams(work, done, entries, tokenizer, report)
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "kind": config.kind,
        "options": _options(config),
        "split": split,
        "tokenizer": {f: getattr(tokenizer, f) for f in ("name", "vocab", "mark", "digest")},
        **written,
        "duplicates": sum(row.count(Fate.DROP) for row in fates),
        "skipped": skipped,
        "files": [(source.name, source.size, source.digest) for source in sources],
        "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
    }
    (done / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*done.iterdir(), done):
        _flush(path)
    done.rename(folder)
    for leftover in folder.parent.glob(f"{folder.name}.*.work"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def _tokenizer(
    config: DataConfig,
    given: Tokenizer | None,
    work: Path,
    entries: list[list[Entry]],
    fates: list[list[int]],
    report: Report,
) -> Tokenizer:
    """The tokenizer, which the work folder has from now on, for the workers and after an interruption."""
    folder = work / "tokenizer"
    if folder.exists():
        return load_tokenizer(folder)
    if given is None:
        assert isinstance(config.tokenizer, BpeTokenizer)
        report("tokenizer", 0, 1)
        given = train_bpe(_sample(work, entries, fates, config.eval_fraction), config.tokenizer.vocab)
        report("tokenizer", 1, 1)
    with Replaced(folder) as temporary:
        given.save(temporary)
    return given


def _sample(work: Path, entries: list[list[Entry]], fates: list[list[int]], tail: float) -> Iterator[str]:
    """Training text up to SAMPLE bytes, in the order of hashes: held-out text never shapes the tokenizer."""
    chosen = sorted(
        (entry.key, entry.domain, n, i)
        for n, shard in enumerate(entries)
        for i, entry in enumerate(shard)
        if fates[n][i] in (Fate.TRAIN, Fate.BOTH)
    )
    left = SAMPLE
    for _, _, n, i in chosen:
        entry = entries[n][i]
        usable = entry.size if fates[n][i] == Fate.TRAIN else int(entry.size * (1 - tail))
        limit = min(usable, SAMPLE_DOCUMENT, left)
        left -= limit
        if limit <= 0:
            return
        yield read_text(work, n, entry, limit)


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


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer where it does not depend on the corpus."""
    match config.tokenizer:
        case ByteTokenizer():
            return Bytes()
        case FileTokenizer(path=path):
            return read_tokenizer(Path(path))
        case BpeTokenizer():
            return None


def _key(config: DataConfig, sources: list[Source], tokenizer: Tokenizer | None) -> str:
    content = {
        "format_version": FORMAT_VERSION,
        "options": _options(config),
        "tokenizer": tokenizer.digest if tokenizer else asdict(config.tokenizer),
        "files": [(source.name, source.digest) for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _options(config: DataConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in IGNORED}


def _digested(sources: list[Source], memo_path: Path, report: Report) -> list[Source]:
    """The sources with size and sha256. Files whose size and time are remembered are not read again."""
    try:
        memo: dict[str, list[Any]] = json.loads(memo_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memo = {}
    digested: list[Source] = []
    changed = False
    for i, source in enumerate(sources):
        path = os.path.abspath(source.path)  # noqa: PTH100 (resolve() asks the disk about every folder)
        stat = Path(path).stat()
        size, modified, digest = memo.get(path, (None, None, ""))
        if (size, modified) != (stat.st_size, stat.st_mtime_ns):
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time() - stat.st_mtime > 2:  # younger, it may change again within a tick of the clock
                memo[path] = [stat.st_size, stat.st_mtime_ns, digest]
                changed = True
            report("hash", i + 1, len(sources))
        digested.append(replace(source, size=stat.st_size, digest=digest))
    if changed:
        memo_path.parent.mkdir(parents=True, exist_ok=True)
        with Replaced(memo_path) as temporary:
            temporary.write_text(json.dumps(memo), encoding="utf-8")
    return digested


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
        room -= piece.stop - piece.start if piece.stop else piece.size
    return shards


def _progress(stage: str, waiting: list[int], total: int, report: Report) -> Callable[[int], None]:
    """Reports finished shards; those of an earlier attempt count from the start."""
    counts: dict[str, int] = defaultdict(lambda: total - len(waiting))
    report(stage, counts[stage], total)

    def done(_: int) -> None:
        counts[stage] += 1
        report(stage, counts[stage], total)

    return done


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """One process at a time; a killed one lets go. The file stays, as removing it would race."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("wait", 0, 1)  # another process prepares this corpus
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    """To the disk, before the name that promises it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
