"""Where the text comes from: the files of a corpus, and the documents in them.

Listing is cheap and done by one process; reading is done by workers, which need a `Source` and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moesaic.data.config import HuggingFaceCorpus, JsonlCorpus, ParquetCorpus, PythonCorpus, TextCorpus
from moesaic.data.errors import DataError
from moesaic.data.python_corpus import list_python, read_source, read_topics, titled_docstrings
from moesaic.data.tables import count_groups, list_dataset, need_pyarrow, read_column

MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """A file, or a range of the lines or of the groups of rows of one."""

    name: str
    """Unique in the corpus and free of the folder where it happens to lie."""
    path: str
    kind: Literal["text", "jsonl", "python", "python+prose", "topics", "parquet", "arrow", "tokens"]
    size: int = 0
    """Bytes, about."""
    digest: str = ""
    """sha256 of the file."""
    start: int = 0
    stop: int = 0
    """A jsonl source holds the lines that begin at a byte in [start, stop), a table these groups of its rows."""
    field: str = ""
    """Key or column of the text."""


@dataclass(frozen=True)
class Document:
    """A text that is never cut, except by the end of a sequence."""

    name: str
    domain: str
    """`code`, `prose` or `text`."""
    text: str
    key: str
    """sha256 that decides the split. Two documents of one domain and key are duplicates."""


Skip = Callable[[str, str], None]
"""Called with the name and the reason for every file or line that cannot be read."""


TextCorpora = PythonCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | HuggingFaceCorpus


def list_sources(config: TextCorpora) -> list[Source]:
    """The files of the corpus in the order of their names. DataError where there are none."""
    match config:
        case PythonCorpus():
            kind = "python+prose" if config.prose else "python"
            sources = [
                Source(name, str(path), "topics" if name == "pydoc_data/topics.py" else kind)
                for name, path in list_python(config.packages, prose=config.prose)
            ]
        case TextCorpus():
            sources = [Source(name, str(path), "text") for name, path in find_files(config.path, "*")]
        case JsonlCorpus():
            sources = [
                Source(name, str(path), "jsonl", field=config.field)
                for name, path in find_files(config.path, "*.jsonl")
            ]
        case ParquetCorpus():
            need_pyarrow("parquet")
            sources = [
                Source(name, str(path), "parquet", field=config.column)
                for name, path in find_files(config.path, "*.parquet")
            ]
        case HuggingFaceCorpus():
            files = {path: path.name for path in list_dataset(config)}
            sources = [
                Source(name, str(path), "arrow", field=config.column) for name, path in _unique_names(files)
            ]
    return sorted(sources, key=lambda source: source.name)


def cut(source: Source, size: int) -> list[Source]:
    """Ranges of about `size` bytes of a jsonl file or of a table; any other file whole."""
    if source.kind == "jsonl":
        starts = range(0, source.size, size)
        ranges = [(start, min(start + size, source.size)) for start in starts]
        return [replace(source, start=start, stop=stop, size=stop - start) for start, stop in ranges]
    if source.kind not in ("parquet", "arrow"):
        return [source]
    pieces: list[Source] = []
    for group, more in enumerate(count_groups(source.path, source.kind, source.field)):
        if pieces and pieces[-1].size < size:
            pieces[-1] = replace(pieces[-1], stop=group + 1, size=pieces[-1].size + more)
        else:
            pieces.append(replace(source, start=group, stop=group + 1, size=more))
    return pieces or [source]  # reading will say why


def read(source: Source, skip: Skip) -> Iterator[Document]:
    """The documents of a source that are not empty. `skip` may raise to stop at what cannot be read."""
    if source.kind == "jsonl":
        yield from _read_lines(source, skip)
        return
    if source.kind in ("parquet", "arrow"):
        for row, text in read_column(
            source.path, source.kind, source.field, groups=range(source.start, source.stop), skip=skip
        ):
            yield Document(f"{source.name}@{row}", "text", text, _sha256(text))
        return
    content = Path(source.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != source.digest:
        raise DataError(f"{source.path}: changed while it was being prepared; start again")
    try:
        text = content.decode() if source.kind == "text" else read_source(content)
    except (UnicodeDecodeError, SyntaxError) as error:
        skip(source.path, f"not UTF-8 text ({error})")
        return
    if source.kind == "topics":
        for name, topic in read_topics():
            yield Document(f"{source.name}#{name}", "prose", topic, _sha256(topic))
        return
    if not text.strip():
        return
    key = _sha256(text)
    yield Document(source.name, "text" if source.kind == "text" else "code", text, key)
    if source.kind == "python+prose":
        try:
            prose = titled_docstrings(source.name, text)
        except (SyntaxError, ValueError, RecursionError) as error:
            skip(source.path, f"cannot be parsed as Python ({error})")
            return
        if prose:  # its source decides the split, so that no text is in both
            yield Document(f"{source.name}#docstrings", "prose", prose, key)


def _read_lines(source: Source, skip: Skip) -> Iterator[Document]:
    with Path(source.path).open("rb") as file:
        at = source.start
        if at:  # a line that begins before `start` belongs to the range before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        while at < source.stop and (line := file.readline()):
            if line.strip():
                try:
                    text = _text(line, source.field)
                except ValueError as error:
                    skip(f"{source.path}: line {_line_number(source.path, at)}", str(error))
                else:
                    if text.strip():
                        yield Document(f"{source.name}@{at}", "text", text, _sha256(text))
            at += len(line)


def _text(line: bytes, field: str) -> str:
    """The text of a line of JSON. ValueError says what is wrong."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        found = (
            f"its keys are {sorted(value)[:8]}"
            if isinstance(value, dict)
            else f"it is a {type(value).__name__}"
        )
        raise ValueError(f"no text under data.field = {field!r} ({found})")
    text: str = value[field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair, which is not valid Unicode") from error
    return text


def _line_number(path: str, at: int) -> int:
    """Lines are counted from 1, and only for a message."""
    number = 1
    with Path(path).open("rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_files(
    paths: str | tuple[str, ...], pattern: str, *, key: str = "data.path"
) -> list[tuple[str, Path]]:
    """(name, path) of every file that the user's files, folders and glob patterns mean, each once.

    Of a folder, the files whose names match `pattern`. DataError, about the config's `key`, where there is none.
    """
    found: dict[Path, str] = {}
    for entry in (paths,) if isinstance(paths, str) else paths:
        path = Path(entry).expanduser()
        if path.is_file():
            files, root = [path], path.parent
        elif path.is_dir():
            files, root = [f for f in path.rglob(pattern) if not _hidden(f.relative_to(path))], path
        elif MAGIC & set(entry):
            plain = next(i for i, part in enumerate(path.parts) if MAGIC & set(part))
            root = Path(*path.parts[:plain])
            files = root.glob(os.path.join(*path.parts[plain:]))  # noqa: PTH118 (a pattern, not a path)
        else:
            raise DataError(f"{key}: {entry}: no such file or folder")
        files = sorted(f for f in files if f.is_file())
        if not files:
            raise DataError(f"{key}: {entry}: no file there matches; name files, a folder or a pattern")
        for file in files:
            found.setdefault(file.resolve(), file.relative_to(root).as_posix())
    if not found:
        raise DataError(f"{key}: names no file; give files, folders or glob patterns")
    return _unique_names(found)


def _unique_names(found: dict[Path, str]) -> list[tuple[str, Path]]:
    """Files of different roots may share a relative name: number all but the first."""
    seen: dict[str, int] = {}
    files: list[tuple[str, Path]] = []
    for path, name in found.items():
        seen[name] = seen.get(name, 0) + 1
        files.append((name if seen[name] == 1 else f"{name}~{seen[name]}", path))
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
