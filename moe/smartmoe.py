"""The routing trace published with SmartMoE (ATC 2023; repository thu-pacman/SmartMoE-AE, folder `moe_trace`), as ours.

Its files are called `table_iter<N>_rank<R>.log`. Each has a line per layer: the layer's number, a colon, and a list of
rows, each with the assignments to every expert. The rows of a layer are added up: they have one source. Numpy only.

Dims: N steps, L layers, S sources, E experts.
"""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from moesaic.moe.trace import RoutingTrace, TraceError

NAME = re.compile(r"table_iter(\d{1,15})_rank(\d{1,6})\.log")


def convert_smartmoe(folder: Path, *, k: int = 2) -> RoutingTrace:
    """The trace of all files in the folder. `k`: experts per token of the published gate.

    Raises TraceError, naming file and line, where a file is missing, or is not of this format.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise TraceError(
            f"{folder}: cannot be listed ({error.strerror}); give the folder moe_trace"
        ) from None
    found = {(int(m[1]), int(m[2])): folder / m[0] for m in map(NAME.fullmatch, names) if m}
    if not found:
        raise TraceError(
            f"{folder}: has no table_iter<N>_rank<R>.log; give the folder moe_trace of SmartMoE-AE"
        )
    steps = sorted({step for step, _ in found})
    sources = 1 + max(source for _, source in found)
    if sources > len(found):  # before a list of as many
        raise TraceError(
            f"{folder}: has files of rank {sources - 1}, but only {len(found)} files; fetch the others"
        )
    absent = [(n, s) for n in steps for s in range(sources) if (n, s) not in found]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise TraceError(
            f"{folder}: lacks table_iter{absent[0][0]}_rank{absent[0][1]}.log{more}; fetch all files"
        )
    first = found[steps[0], 0]
    layers, of_first = read_tables(first)
    counts = np.empty((len(steps), len(layers), sources, of_first.shape[1]), np.int64)
    for row, step in enumerate(steps):
        for source in range(sources):
            path = found[step, source]
            numbers, tables = read_tables(path)
            if numbers != layers or tables.shape != of_first.shape:
                raise TraceError(
                    f"{path}: has {len(numbers)} layers of {tables.shape[1]} experts, {first.name} {len(layers)} of "
                    f"{of_first.shape[1]}; fetch both again"
                )
            counts[row, :, source] = tables
    return RoutingTrace(counts, np.array(steps), np.array(layers), k)


def read_tables(path: Path) -> tuple[list[int], Int64[np.ndarray, "L E"]]:
    """Numbers of the layers in a file, ascending, and their counts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read ({error}); fetch it again") from None
    tables: dict[int, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            layer, counts = read_line(line, f"{path}:{number}")
            if layer in tables:
                raise TraceError(f"{path}:{number}: layer {layer} comes twice; fetch the file again")
            tables[layer] = counts
    if not tables:
        raise TraceError(f"{path}: is empty; fetch it again")
    layers = sorted(tables)
    if len({len(counts) for counts in tables.values()}) > 1:
        raise TraceError(f"{path}: layers have different numbers of experts; fetch it again")
    return layers, np.array([tables[layer] for layer in layers], np.int64)


def read_line(line: str, place: str) -> tuple[int, list[int]]:
    """A layer's number, and its rows added up."""
    layer, colon, text = line.partition(":")
    rows: list[list[float]] = []
    with suppress(ValueError, RecursionError):
        rows = json.loads(text)
    good = (
        colon
        and re.fullmatch(r"\d{1,6}", layer.strip(), re.ASCII)
        and isinstance(rows, list)
        and rows
        and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)
        and all(is_count(value) for row in rows for value in row)
    )
    if not good:
        raise TraceError(
            f"{place}: is not a layer's number, a colon and rows of counts; fetch the file again"
        )
    if len({sum(row) for row in rows}) > 1:
        raise TraceError(f"{place}: rows have different sums, so some of it is missing; fetch the file again")
    return int(layer), [int(sum(column)) for column in zip(*rows, strict=True)]


def is_count(value: object) -> bool:
    """Whether a number is whole, and can be one of assignments."""
    return (
        isinstance(value, int | float)
        and math.isfinite(value)
        and 0 <= value < 1 << 31
        and value == int(value)
    )
