"""From a config to a prepared corpus: find the files, prepare what the cache does not have yet, open it.

The name of a corpus's folder holds a hash of everything its content depends on, so that an edited file or option leads
to another folder and nothing stale is ever opened. What decides only how the tokens are used is not part of it:
sequence length, masking, number of workers.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

from moesaic.data.build import SAMPLE, Draft, Report, options_of
from moesaic.data.config import (
    BpeTokenizer,
    DataConfig,
    MixtureData,
    TextDataConfig,
    TokensData,
)
from moesaic.data.corpora import Source, list_sources
from moesaic.data.errors import DataError
from moesaic.data.mixture import Mixture, shares
from moesaic.data.prepared import FORMAT_VERSION, Prepared, open_prepared
from moesaic.data.tokenizer import Tokenizer, expected_vocab, given_tokenizer, load_tokenizer, train_bpe
from moesaic.data.tokens import build_tokens, list_tokens, open_tokens, tokens_tokenizer
from moesaic.data.workers import Workers
from moesaic.kernels.cache import cache_folder
from moesaic.kernels.files import Replaced

__all__ = ["Report", "cache_root", "prepare", "vocab_of"]


@overload
def prepare(config: TextDataConfig | TokensData, *, report: Report | None = None) -> Prepared: ...
@overload
def prepare(config: MixtureData, *, report: Report | None = None) -> Mixture: ...
@overload
def prepare(config: DataConfig, *, report: Report | None = None) -> Prepared | Mixture: ...
def prepare(config: DataConfig, *, report: Report | None = None) -> Prepared | Mixture:
    """The corpus as token streams, from the cache if it is there. DataError says what is wrong, and a remedy.

    May be killed at any moment and started again, and may run in several processes at once: one works, all
    get the result.
    """
    report = report or (lambda stage, done, total: None)
    root = cache_root(config)
    try:
        with Workers(config.workers or _cores()) as workers:
            match config:
                case MixtureData():
                    return _mixture(config, root, workers, report)
                case TokensData():
                    return _tokens(config, tokens_tokenizer(config), root, workers, report)
                case _:
                    return _text(config, _given(config), root, workers, report)
    except OSError as error:
        where = error.filename or root
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check that it can be read, and the cache be written"
        raise DataError(
            f"{where}: {error.strerror}; {remedy}, or choose another cache with data.cache or $MOESAIC_CACHE"
        ) from error


def cache_root(config: DataConfig) -> Path:
    """Folder of all prepared corpora."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return cache_folder()


def vocab_of(config: DataConfig) -> int:
    """Rows of the embedding table for this corpus, known without reading it. DataError where parts disagree."""
    match config:
        case TokensData():
            return tokens_tokenizer(config).vocab
        case MixtureData():
            vocabs = {name: vocab_of(config.part(name)) for name in config.parts}
            if len(set(vocabs.values())) > 1:
                told = ", ".join(f"{name} {vocab}" for name, vocab in vocabs.items())
                raise DataError(
                    f"data.parts: have vocabularies of different sizes ({told}); one model needs one"
                )
            return next(iter(vocabs.values()))
        case _:
            return expected_vocab(config.tokenizer)


def _text(
    config: TextDataConfig, given: Tokenizer | None, root: Path, workers: Workers, report: Report
) -> Prepared:
    """A corpus of text. With no tokenizer given, one is trained on it."""
    sources = _digested(list_sources(config), root / "digests.json", report)
    key = _key(config, sources, given)
    folder = root / f"{config.kind}-{key[:16]}"
    with _absent(folder, report) as absent:
        if absent:
            if given is not None:
                given.encode("")  # a file that the library cannot read fails here, before the work
            draft = Draft(config, sources, root, folder.name)
            draft.read(workers, report)
            tokenizer = given or draft.train(expected_vocab(config.tokenizer), report)
            draft.finish(tokenizer, key, folder, workers=workers, report=report)
    return open_prepared(folder, key)


def _tokens(
    config: TokensData, tokenizer: Tokenizer, root: Path, workers: Workers, report: Report
) -> Prepared:
    """A corpus that is tokens already: only where its documents are is kept in the cache."""
    sources = _digested(list_tokens(config), root / "digests.json", report)
    key = _key(config, sources, tokenizer)
    folder = root / f"{config.kind}-{key[:16]}"
    with _absent(folder, report) as absent:
        if absent:
            build_tokens(config, sources, tokenizer, key, folder, workers=workers, report=report)
    return open_tokens(folder, key, sources, config)


def _mixture(config: MixtureData, root: Path, workers: Workers, report: Report) -> Mixture:
    """Every part as a corpus of its own, after a tokenizer for all of them."""
    vocab_of(config)
    trained = isinstance(config.tokenizer, BpeTokenizer)
    shared = _shared_tokenizer(config, root, workers, report) if trained else None
    parts: dict[str, Prepared] = {}
    for name in sorted(config.parts):
        part = config.part(name)
        with _named(name, report) as said:
            if isinstance(part, TokensData):
                parts[name] = _tokens(part, tokens_tokenizer(part), root, workers, said)
            else:
                parts[name] = _text(part, shared or _given(part), root, workers, said)
    weights = {name: part.weight for name, part in config.parts.items()}
    return Mixture.of(parts, weights)


def _shared_tokenizer(config: MixtureData, root: Path, workers: Workers, report: Report) -> Tokenizer:
    """BPE of the text of all parts: of a sample in which each has the share that it has of the training sequences.

    A part that is smaller than its share of `SAMPLE` bytes gives all it has. The texts that were read for the sample
    become the drafts of the parts.
    """
    assert isinstance(config.tokenizer, BpeTokenizer)
    weights = shares({name: part.weight for name, part in config.parts.items()})
    listed: dict[str, list[Source]] = {}
    keys: dict[str, str] = {}
    for name in weights:
        part = config.part(name)
        assert not isinstance(part, TokensData)
        with _named(name, report) as said:
            listed[name] = _digested(list_sources(part), root / "digests.json", said)
            keys[name] = _key(part, listed[name], None)
    content = {"keys": keys, "weights": weights, "vocab": config.tokenizer.vocab}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = root / f"mixture-{key[:16]}"
    with _absent(folder, report) as absent:
        if absent:
            drafts: dict[str, Draft] = {}
            for name, sources in listed.items():
                part = config.part(name)
                assert not isinstance(part, TokensData)
                with _named(name, report) as said:
                    drafts[name] = Draft(part, sources, root, f"{folder.name}.{name}")
                    drafts[name].read(workers, said)
            report("tokenizer", 0, 1)
            total = sum(weights.values())
            sample = (
                text
                for name, draft in drafts.items()
                for text in draft.sample(SAMPLE * weights[name] // total)
            )
            tokenizer = train_bpe(sample, config.tokenizer.vocab)
            report("tokenizer", 1, 1)
            for draft in drafts.values():
                part_key = _key(draft.config, draft.sources, tokenizer)
                draft.rename(f"{draft.config.kind}-{part_key[:16]}")
            with Replaced(folder) as temporary:  # last: who finds it does not look for these drafts again
                tokenizer.save(temporary)
    return load_tokenizer(folder)


@contextmanager
def _named(part: str, report: Report) -> Iterator[Report]:
    """Errors and reports of a part of a mixture say which one it is."""
    try:
        yield lambda stage, done, total: report(f"{part}: {stage}", done, total)
    except DataError as error:
        raise DataError(f"data.parts.{part}: {error}") from error


def _given(config: TextDataConfig) -> Tokenizer | None:
    """The tokenizer where it does not depend on the corpus."""
    return None if isinstance(config.tokenizer, BpeTokenizer) else given_tokenizer(config.tokenizer)


def _key(config: TextDataConfig | TokensData, sources: list[Source], tokenizer: Tokenizer | None) -> str:
    content = {
        "format_version": FORMAT_VERSION,
        "options": options_of(config),
        "tokenizer": tokenizer.digest if tokenizer else asdict(config)["tokenizer"],
        "files": [(source.name, source.digest) for source in sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


@contextmanager
def _absent(folder: Path, report: Report) -> Iterator[bool]:
    """Whether the folder has to be made, by this process alone."""
    if folder.exists():
        yield False
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report):
        yield not folder.exists()  # another process may have been first


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
