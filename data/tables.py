"""Documents in columns: parquet files, and the Arrow files in which the datasets library keeps its datasets.

A file is read by groups of rows (those of parquet, the record batches of Arrow), so that it may be larger than memory.
Needs the extra `data`; pyarrow and datasets are imported within the functions that use them.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moesaic.data.config import HuggingFaceCorpus
from moesaic.data.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

Format = Literal["parquet", "arrow"]
Skip = Callable[[str, str], None]
BATCH = 1000
"""Rows of a parquet group that are in memory at once."""


def need_pyarrow(kind: str) -> None:
    """DataError that names the extra where pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError(f"data.kind: {kind}: needs pyarrow; pip install 'moesaic[data]'") from error


def count_groups(path: str, form: Format, column: str) -> list[int]:
    """Bytes of text in each group of rows, about. Empty where the file cannot be read or has no such column."""
    import pyarrow

    try:
        if form == "arrow":
            return [batch.column(column).nbytes for batch in _record_batches(path)]
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            index = file.schema_arrow.get_field_index(column)
            if index < 0:
                return []
            leaf = next(
                i for i in range(len(file.schema)) if file.schema.column(i).path.partition(".")[0] == column
            )
            groups = (file.metadata.row_group(g) for g in range(file.num_row_groups))
            return [group.column(leaf).total_uncompressed_size for group in groups]
    except (pyarrow.ArrowException, OSError, KeyError):
        return []


def read_column(
    path: str, form: Format, column: str, *, groups: range, skip: Skip
) -> Iterator[tuple[int, str]]:
    """(row, text) of the rows of these groups whose text is not empty; rows are counted from 0 in the file.

    What cannot be read goes to `skip`: a damaged file, one without the column, a row without valid text.
    """
    import pyarrow

    try:
        for row, batch in _batches(path, form, column, groups):
            kind = batch.type.value_type if pyarrow.types.is_dictionary(batch.type) else batch.type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise _UnusableError(f"data.column = {column!r} holds {batch.type}, not text")
            for i in range(len(batch)):
                try:
                    text = batch[i].as_py()
                except UnicodeDecodeError as error:
                    skip(f"{path}: row {row + i}", f"not UTF-8 text ({error})")
                    continue
                if text is None:
                    skip(f"{path}: row {row + i}", f"no text in data.column = {column!r}")
                elif text.strip():
                    yield row + i, text
    except _UnusableError as error:
        skip(path, str(error))
    except (pyarrow.ArrowException, OSError) as error:
        skip(path, f"not a whole {form} file ({_first_line(error)})")


class _UnusableError(Exception):
    """A file that can be read but has no column of text."""


def _batches(
    path: str, form: Format, column: str, groups: range
) -> Iterator[tuple[int, "pyarrow.Array[pyarrow.Scalar]"]]:
    """The column of these groups in pieces, each with the number of its first row."""
    if form == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(column, file.schema_arrow.names)
            row = sum(file.metadata.row_group(g).num_rows for g in range(groups.start))
            for batch in file.iter_batches(BATCH, row_groups=list(groups), columns=[column]):
                yield row, batch.column(0)
                row += batch.num_rows
        return
    row = 0
    for number, batch in enumerate(_record_batches(path)):
        _check_column(column, batch.schema.names)
        if number in groups:
            yield row, batch.column(column)
        row += batch.num_rows


def _record_batches(path: str) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow

    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
        yield from stream


def _check_column(column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        found = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(columns)}"
        raise _UnusableError(f"no column data.column = {column!r}; {found}")


def list_dataset(corpus: HuggingFaceCorpus) -> list[Path]:
    """The Arrow files of a dataset, in order; a dataset of the hub is downloaded into the library's own cache."""
    need_pyarrow("huggingface")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.kind: huggingface: needs the datasets library; pip install 'moesaic[data]'"
        ) from error
    where = f"data.path: {corpus.path}" if corpus.path is not None else f"data.name: {corpus.name}"
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = _load(corpus)
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{where}: cannot be reached ({_first_line(error)}); check the name and the network, or give data.path, "
            "a folder that save_to_disk wrote"
        ) from error
    except Exception as error:  # the library raises whatever its readers do
        raise DataError(
            f"{where}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "check it, data.subset and data.split"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    try:
        _check_column(corpus.column, dataset.column_names)
    except _UnusableError as error:
        raise DataError(f"{where}: {error}") from error
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if len(set(files)) != len(files) or sum(
        b.num_rows for f in files for b in _record_batches(str(f))
    ) != len(dataset):
        raise DataError(
            f"{where}: is a selection of rows of its files; write it out with save_to_disk, and give that folder"
        )
    return files


def _load(corpus: HuggingFaceCorpus) -> "datasets.Dataset":
    """One split, memory-mapped."""
    import datasets

    if corpus.path is not None:
        folder = Path(corpus.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"data.path: {corpus.path}: no such folder")
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
            if isinstance(loaded, datasets.Dataset):
                return loaded
            if corpus.split not in loaded:
                raise DataError(
                    f"data.split: {corpus.split!r} is not in {corpus.path}; splits: {', '.join(map(str, loaded))}"
                )
            return loaded[corpus.split]
        name = str(folder)
    else:
        assert corpus.name is not None
        name = corpus.name
    loaded = datasets.load_dataset(
        name, corpus.subset, split=corpus.split, revision=corpus.revision, keep_in_memory=False
    )
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
