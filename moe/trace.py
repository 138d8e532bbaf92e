"""A routing trace: how many assignments every source made to every expert, layer by layer and step by step.

Every way to place experts can be compared on the same trace, in training (`moe/replay.py`) and without. Knows no tokens
and no text; numpy only.

Dims: N steps, L layers, S sources, E experts.
"""

import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from moesaic.kernels.files import Replaced

VERSION = 1
"""Of the file's format."""
ARRAYS = ("version", "counts", "steps", "layers", "k")


class TraceError(ValueError):
    """A trace, or a file that should be one, is not what it must be; the message says what and what to do."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Counts of one run, or of one that never was.

    Saved as `.npz` of five arrays of integers: the fields below, and `version`. No pickle is written or read.
    """

    counts: Int[np.ndarray, "N L S E"]
    """Assignments that the tokens of source s made to expert e. Sources are ranks, in order."""
    steps: Int64[np.ndarray, " N"]
    """Number of each step, from 0 and ascending; a trace may leave steps out."""
    layers: Int64[np.ndarray, " L"]
    """Number of each sparse layer in its model, from 0 and ascending."""
    k: int
    """Experts per token."""

    def __post_init__(self) -> None:
        if self.counts.ndim != 4 or 0 in self.counts.shape:
            raise TraceError(
                f"counts: shape {self.counts.shape} is not (steps, layers, sources, experts), each positive"
            )
        for name, numbers, size in (
            ("steps", self.steps, self.counts.shape[0]),
            ("layers", self.layers, self.counts.shape[1]),
        ):
            if numbers.shape != (size,):
                raise TraceError(
                    f"{name}: shape {numbers.shape} does not go with counts of shape {self.counts.shape}"
                )
            if numbers[0] < 0 or (np.diff(numbers) <= 0).any():
                raise TraceError(f"{name}: must ascend from 0 or more, got {numbers[:8].tolist()}...")
        if self.counts.min() < 0:
            where = np.unravel_index(int(self.counts.argmin()), self.counts.shape)
            raise TraceError(
                f"counts: {self.counts[where]} at {tuple(map(int, where))} is negative; counts are 0 or more"
            )
        if not 1 <= self.k <= self.counts.shape[3]:
            raise TraceError(f"k: {self.k} is not in 1 to the {self.counts.shape[3]} experts")

    @property
    def sources(self) -> int:
        return self.counts.shape[2]

    @property
    def experts(self) -> int:
        return self.counts.shape[3]

    def at(self, step: int, layer: int) -> Int[np.ndarray, "S E"]:
        """Counts of a step and a layer of any run: steps begin anew at the end of the trace.

        A layer that the trace knows has its own row. One that it does not know has row `layer` modulo L.
        """
        row = int(np.searchsorted(self.layers, layer))
        if row == len(self.layers) or self.layers[row] != layer:
            row = layer % len(self.layers)
        return self.counts[step % len(self.steps), row]

    def save(self, path: Path) -> None:
        """Write all of the file or nothing. TraceError where it cannot be written."""
        wide = self.counts.max() >= 1 << 31
        try:
            with Replaced(path, durable=True) as temporary, temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    version=np.int64(VERSION),
                    counts=self.counts.astype(np.int64 if wide else np.int32),
                    steps=self.steps.astype(np.int64),
                    layers=self.layers.astype(np.int64),
                    k=np.int64(self.k),
                )
        except OSError as error:
            raise TraceError(
                f"{path}: cannot be written ({error.strerror}); give another path, or free some space"
            ) from None


def load_trace(path: str | Path) -> RoutingTrace:
    """Read a trace. TraceError, naming the file, where it is missing, damaged or something else.

    Read once for as long as it does not change: all layers of a model share it.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(
            f"{path}: cannot be read ({reason}); give the .npz that `moesaic trace generate` or `convert` wrote, or "
            "routing.npz of a run with log.routing"
        ) from None
    return _load(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int, size: int) -> RoutingTrace:
    arrays = _arrays(path)
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise TraceError(
            f"{path}: is no routing trace, for it has no {', '.join(missing)}; see `moesaic trace convert`"
        )
    version = arrays["version"]
    if version.ndim or int(version) != VERSION:
        raise TraceError(
            f"{path}: version {version.tolist()} is not the one that this moesaic reads, {VERSION}; "
            "write it again with `moesaic trace`, or use the moesaic that wrote it"
        )
    try:
        if arrays["k"].ndim:
            raise TraceError(f"k: shape {arrays['k'].shape} is not a number")
        trace = RoutingTrace(arrays["counts"], arrays["steps"], arrays["layers"], int(arrays["k"]))
    except TraceError as error:
        raise TraceError(f"{path}: {error}; write the file again") from None
    for array in (trace.counts, trace.steps, trace.layers):
        array.setflags(write=False)  # shared by all who read the file
    return trace


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file by name."""
    damaged = f"{path}: is damaged, or no .npz file"
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise TraceError(f"{path}: is a single array, not a routing trace; see `moesaic trace convert`")
        with loaded as file:
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except TraceError:
        raise
    except (
        OSError,
        ValueError,  # of headers, and of pickles
        KeyError,
        EOFError,
        SyntaxError,
        MemoryError,  # a header that asks for more than there is
        OverflowError,
        NotImplementedError,
        RuntimeError,  # an encrypted archive
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise TraceError(f"{damaged} ({reason}); generate, convert or record it again") from None
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer) or array.dtype == np.uint64:
            raise TraceError(
                f"{path}: {name} is of type {array.dtype}, not of integers; write the file again"
            )
    return arrays
