"""The published trace's format: what is read, and what is refused. The files here are made up."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesaic.moe.smartmoe import convert_smartmoe
from moesaic.moe.trace import TraceError

STEPS, LAYERS, SOURCES, ROWS, EXPERTS = (1, 11, 101), 3, 12, 4, 6


def write(folder: Path) -> np.ndarray:
    """Files of all steps and sources; returns the rows (N, L, S, rows, E)."""
    shape = (len(STEPS), LAYERS, SOURCES, ROWS)
    tables = np.random.default_rng(0).multinomial(50, np.full(EXPERTS, 1 / EXPERTS), shape)
    for n, step in enumerate(STEPS):
        for source in range(SOURCES):
            rows = tables[n, :, source].astype(float).tolist()
            lines = [f"{layer}:{json.dumps(row)}\n" for layer, row in enumerate(rows)]
            (folder / f"table_iter{step}_rank{source}.log").write_text("".join(lines))
    (folder / "README.md").write_text("not a table")
    return tables


def test_files_become_a_trace(tmp_path: Path):
    tables = write(tmp_path)
    trace = convert_smartmoe(tmp_path, k=2)
    np.testing.assert_array_equal(trace.counts, tables.sum(3))
    np.testing.assert_array_equal(trace.steps, STEPS)
    np.testing.assert_array_equal(trace.layers, range(LAYERS))
    assert trace.k == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "lacks table_iter11_rank3.log; fetch"),
        (lambda path: path.write_text(""), "table_iter11_rank3.log: is empty"),
        (
            lambda path: path.write_text(path.read_text()[:-9]),
            "rank3.log:3: is not a layer's number, a colon",
        ),
        (
            lambda path: path.write_text(path.read_text().replace("1:", "0:", 1)),
            "rank3.log:2: layer 0 comes twice",
        ),
        (lambda path: path.write_text(path.read_text().split("\n", 1)[1]), "has 2 layers of 6 experts"),
        (lambda path: path.write_text("0:[[1.5]]"), "rank3.log:1: is not a layer's number"),
        (lambda path: path.write_text("0:[[-1]]"), "rank3.log:1: is not a layer's number"),
        (lambda path: path.write_text("0:[[NaN]]"), "rank3.log:1: is not a layer's number"),
        (lambda path: path.write_text("0:[[1, 2], [3]]"), "rank3.log:1: is not a layer's number"),
        (lambda path: path.write_text("0:[[1, 2], [3, 1]]"), "rank3.log:1: rows have different sums"),
        (lambda path: path.write_text("0:[[1, 2]]\n1:[[3]]"), "layers have different numbers of experts"),
        (lambda path: path.write_text("0:" + "[" * 100_000), "rank3.log:1: is not a layer's number"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "rank3.log: cannot be read"),
        (
            lambda path: path.rename(path.with_name("table_iter11_rank999999.log")),
            "files of rank 999999, but only 36",
        ),
    ],
)
def test_damage_is_named(change: Callable[[Path], object], message: str, tmp_path: Path):
    write(tmp_path)
    change(tmp_path / "table_iter11_rank3.log")
    with pytest.raises(TraceError, match=re.escape(message)):
        convert_smartmoe(tmp_path)


def test_other_folders_are_refused(tmp_path: Path):
    with pytest.raises(TraceError, match="has no table_iter<N>_rank<R>"):
        convert_smartmoe(tmp_path)
    with pytest.raises(TraceError, match="cannot be listed"):
        convert_smartmoe(tmp_path / "none")
