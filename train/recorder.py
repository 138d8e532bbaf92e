"""What a run's routers decided, as a routing trace: `routing.npz` in the run's folder.

While the run goes on, `routing.raw` grows: a line of JSON (`version` of this format, `k`, `layers`, `sources`,
`experts`), then one record per step, all of one size: the step's number as int64, counts (layers, sources, experts) as
int32, little-endian. A kill tears the last record at most. When the run ends or is stopped, what is there is written as
`routing.npz` (`moe/trace.py`). Sources are ranks: a rank's counts are those of its own tokens.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int64

from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.trace import RoutingTrace
from moesaic.parallel.ranks import Ranks
from moesaic.train.step import Sums

VERSION = 1


class RoutingRecorder:
    """Records every step. All ranks make one and call it alike; the first writes, and what it refuses all refuse."""

    def __init__(self, folder: Path, model: Transformer.Config, ranks: Ranks, *, step: int) -> None:
        """`step`: the first that will be recorded. Records of it and of later ones are dropped: they come again.

        Raises ValueError, naming the file, where it cannot be continued.
        """
        sparse = {n: ffn for n, ffn in enumerate(model.ffns()) if isinstance(ffn, MoE.Config)}
        some = next(iter(sparse.values()))  # all have the same sizes: `RunConfig.check`
        self.ranks, self.layers, self.k = ranks, list(sparse), some.router.k
        self.raw, self.trace = folder / "routing.raw", folder / "routing.npz"
        shape = (len(sparse), ranks.size, some.num_experts)
        fields: Any = [("step", "<i8"), ("counts", "<i4", shape)]
        self.record = np.dtype(fields)
        self.file: BinaryIO | None = None
        ranks.shared(lambda: self._open(step))

    def append(self, step: int, sums: Sums) -> None:
        """Record a step; it is on its way to the disk when this returns. Collective."""
        mine = torch.stack([sums.own[layer] for layer in self.layers]).to("cpu", torch.float64)  # (L, E)
        counts = torch.zeros(self.record["counts"].shape, dtype=torch.float64)
        counts[:, self.ranks.rank] = mine
        record = np.empty((), self.record)
        record["step"], record["counts"] = step, self.ranks.sum(counts).numpy()  # exact, up to 2^53
        if self.file is not None:
            self._write(record.tobytes())

    def sync(self) -> None:
        """Have all records on the disk, before a checkpoint says that these steps are done."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write the trace of all records. The run may still be continued."""
        if self.file is None:
            return
        offset = self._header().find(b"\n") + 1
        self.file.close()
        if self.raw.stat().st_size > offset:
            records = np.memmap(self.raw, self.record, "r", offset)
            layers = np.array(self.layers, np.int64)
            RoutingTrace(records["counts"], records["step"].astype(np.int64), layers, self.k).save(self.trace)

    def _header(self) -> bytes:
        facts = {"version": VERSION, "k": self.k, "layers": self.layers}
        facts |= dict(zip(("sources", "experts"), self.record["counts"].shape[1:], strict=True))
        return json.dumps(facts).encode() + b"\n"

    def _open(self, step: int) -> None:
        """Keep the records before `step`, of a file that was begun alike."""
        header = self._header()
        try:
            self.file = self.raw.open("a+b", buffering=0)
            self.file.seek(0)
            found = self.file.readline()
            kept = 0
            if found == header:
                steps = self._steps(len(header))
                kept = len(header) + int((steps < step).sum()) * self.record.itemsize
            elif found.endswith(b"\n") and step > 0:
                raise ValueError(
                    f"{self.raw}: was recorded with {found.decode(errors='replace').strip()}, and the run now has "
                    f"{header.decode().strip()}; move it away, set log.routing=false, or resume on as many ranks"
                )
            self.file.truncate(kept)
        except OSError as error:
            raise ValueError(
                f"{self.raw}: cannot be opened ({error.strerror}); set log.routing=false, or make room"
            ) from None
        if kept == 0:
            self._write(header)

    def _steps(self, offset: int) -> Int64[np.ndarray, " N"]:
        """Numbers of the whole records, in order."""
        count = (self.raw.stat().st_size - offset) // self.record.itemsize
        if count == 0:
            return np.empty(0, np.int64)
        return np.memmap(self.raw, self.record, "r", offset, count)["step"].astype(np.int64)

    def _write(self, data: bytes) -> None:
        assert self.file is not None
        try:
            written = self.file.write(data)
        except OSError as error:
            raise ValueError(
                f"{self.raw}: cannot be written ({error.strerror}); free some space and continue with --resume"
            ) from None
        if written != len(data):
            raise ValueError(
                f"{self.raw}: cannot be written (the disk is full); free some space and --resume"
            )
