"""Trace files: what is saved comes back, and nothing else is taken for a trace."""

import re
from pathlib import Path

import numpy as np
import pytest

from moesaic.moe.trace import RoutingTrace, TraceError, load_trace


def sample(seed: int = 0, dtype: type = np.int64) -> RoutingTrace:
    counts = np.random.default_rng(seed).integers(0, 99, (3, 2, 4, 5)).astype(dtype)
    return RoutingTrace(counts, np.array([0, 1, 7]), np.array([1, 3]), 2)


def test_a_trace_comes_back_as_it_was(tmp_path: Path):
    for dtype in (np.int32, np.int64):
        trace = sample(dtype=dtype)
        trace.save(tmp_path / "a.npz")
        back = load_trace(tmp_path / "a.npz")
        for name in ("counts", "steps", "layers"):
            np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
        assert back.k == 2
        assert (back.sources, back.experts) == (4, 5)
    assert back.counts.dtype == np.int32
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_large_counts_are_kept(tmp_path: Path):
    trace = sample()
    trace.counts[0, 0, 0, 0] = 1 << 40
    trace.save(tmp_path / "a.npz")
    assert load_trace(tmp_path / "a.npz").counts[0, 0, 0, 0] == 1 << 40


def test_a_file_that_changes_is_read_again(tmp_path: Path):
    path = tmp_path / "a.npz"
    sample(0).save(path)
    first = load_trace(path)
    assert load_trace(path) is first
    with pytest.raises(ValueError, match="read-only"):
        first.counts[:] = 0
    RoutingTrace(np.ones((9, 2, 4, 5), np.int64), np.arange(9), np.arange(2), 2).save(path)
    assert len(load_trace(path).steps) == 9


def test_steps_begin_anew_and_layers_are_found_by_number():
    trace = sample()
    np.testing.assert_array_equal(trace.at(2, 3), trace.counts[2, 1])
    np.testing.assert_array_equal(trace.at(3, 1), trace.counts[0, 0])
    np.testing.assert_array_equal(trace.at(4, 2), trace.counts[1, 0])  # unknown: row 2 modulo 2
    np.testing.assert_array_equal(trace.at(4, 7), trace.counts[1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.ones((3, 2, 4), np.int64)}, "counts: shape (3, 2, 4) is not (steps, layers"),
        ({"counts": np.ones((3, 2, 0, 5), np.int64)}, "counts: shape (3, 2, 0, 5)"),
        ({"counts": np.full((3, 2, 4, 5), -1)}, "counts: -1 at (0, 0, 0, 0) is negative"),
        ({"counts": np.ones((3, 2, 4, 5))}, "counts is of type float64"),
        ({"counts": np.array([{}], object)}, "is damaged, or no .npz file (Object arrays cannot be loaded"),
        ({"steps": np.arange(4)}, "steps: shape (4,) does not go with counts"),
        ({"steps": np.array([2, 1, 0])}, "steps: must ascend"),
        ({"layers": np.array([-1, 0])}, "layers: must ascend from 0"),
        ({"k": np.int64(0)}, "k: 0 is not in 1 to the 5 experts"),
        ({"k": np.array([1, 2])}, "k: shape (2,) is not a number"),
        ({"version": np.int64(2)}, "version 2 is not the one that this moesaic reads, 1"),
        ({"steps": None}, "is no routing trace, for it has no steps"),
    ],
)
def test_a_foreign_file_is_refused(change: dict, message: str, tmp_path: Path):
    trace = sample()
    arrays = {"version": np.int64(1), "k": np.int64(2)}
    arrays |= {"counts": trace.counts, "steps": trace.steps, "layers": trace.layers}
    arrays = {name: array for name, array in (arrays | change).items() if array is not None}
    np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        load_trace(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_other_files_are_refused(tmp_path: Path):
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("not a trace")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, message in (
        ("array.npy", "single array"),
        ("text.npz", "damaged"),
        ("empty.npz", "damaged"),
        ("none.npz", "No such file or directory"),
        (".", "damaged, or no .npz file"),
        ("nul\0", "null"),
    ):
        with pytest.raises(TraceError, match=re.escape(message)):
            load_trace(tmp_path / name)


def test_a_damaged_file_is_refused_or_harmless(tmp_path: Path):
    sample().save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    random, refused = np.random.default_rng(3), 0
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: random.integers(len(data))]
        else:
            for at in random.integers(len(data), size=number % 3 * 2):
                data[at] = random.integers(256)
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(load_trace(path).counts, sample().counts)
        except TraceError:
            refused += 1
    assert refused > 200


def test_where_it_cannot_be_written(tmp_path: Path):
    with pytest.raises(TraceError, match=r"none/a\.npz: cannot be written \(No such file"):
        sample().save(tmp_path / "none" / "a.npz")
