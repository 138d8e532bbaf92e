"""What a run's folder tells, read back as plain values for a report.

It may be read at any time, also while the run goes on. What is missing or damaged but not essential becomes a note
with file and remedy. This module knows nothing of models: whoever does gives the counts of parameters.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from moesaic.train.charts import LoadMap, Series
from moesaic.train.rank_charts import RankMap
from moesaic.train.writers import each_record

COLUMNS = 300
"""Points in time of a map."""
_SHOWN = re.compile(
    r"train/(loss|bits_per_byte|lr|grad_norm)|eval/(loss|bits_per_byte)|experts/(max_vio|load_entropy|dead)"
    r"|time/(seconds|tokens_per_second|memory)|traffic/(rows_max_over_mean|rows_alone_max_over_mean|copies_used|bytes_\w+)|plan/(copies|changed)|layer_\d+/(max_vio|load_entropy|router_entropy|dead)"
)
_SENT = "traffic/bytes_"
_OF_RANKS = ("time/waited", "time/waited_for_copies", "traffic/rows", "traffic/rows_alone")
_LOAD = re.compile(r"layer_(\d+)/load")
_SAMPLE = re.compile(r"^=== step (\d+), sample (\d+)\n", re.MULTILINE)
_TEXTS, _LETTERS = 12, 4000  # the newest texts, and the first characters of each
_NOTHING = Series(np.empty(0), np.empty(0))


class ReportError(ValueError):
    """No report can be drawn; the message names the file and the remedy."""


@dataclass(frozen=True)
class SampleText:
    """A text the model wrote after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What a run's folder tells."""

    folder: Path
    name: str
    config_text: str
    config: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    """Entries of environment.json."""
    series: Mapping[str, Series]
    """The scalars of metrics.jsonl that a report shows."""
    loads: LoadMap | None
    """None for a dense run."""
    of_ranks: Mapping[str, RankMap]
    """What ranks that own experts had in each step, by the names of `_OF_RANKS`; empty for other runs."""
    step: int
    """Of the last record."""
    tokens: float
    samples: Sequence[SampleText]
    notes: Sequence[str]
    """What is missing or damaged: file and remedy."""
    parameters: int | None = None
    active_parameters: int | None = None

    def of(self, name: str) -> Series:
        """The series of this name; an empty one where nothing was recorded."""
        return self.series.get(name, _NOTHING)

    def last(self, name: str) -> float | None:
        """The last finite value."""
        values = self.of(name).finite().values
        return float(values[-1]) if len(values) else None

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that all ranks together sent in a step, by class; a mean over the records."""
        found = {name: self.of(name).finite().values for name in self.series if name.startswith(_SENT)}
        return {name.removeprefix(_SENT): values.mean() for name, values in found.items() if len(values)}

    @property
    def copied(self) -> bool:
        """Whether experts were copied."""
        return self.sent.get("copies", 0) > 0

    @property
    def steps(self) -> int | None:
        """Steps that were asked for."""
        return _whole(self.config, "steps")

    @property
    def outcome(self) -> str:
        """How the last start ended, such as `finished` or `stopped by SIGINT`; what can be told where it was killed."""
        if self.starts and isinstance(outcome := self.starts[-1].get("outcome"), str):
            return outcome
        if self.steps is None or self.step >= self.steps:
            return "finished"
        return f"not finished: step {self.step:,} of {self.steps:,}"

    @property
    def layers(self) -> list[int]:
        """Layers with routers."""
        return sorted({int(name[6 : name.index("/")]) for name in self.series if name.startswith("layer_")})

    @property
    def best(self) -> tuple[float, float | None, float] | None:
        """The evaluation with the lowest loss: loss, bits per byte, tokens. None where there was none."""
        loss = self.of("eval/loss")
        if not np.isfinite(loss.values).any():
            return None
        at = int(np.nanargmin(loss.values))
        bits = self.of("eval/bits_per_byte").values
        return float(loss.values[at]), float(bits[at]) if at < len(bits) else None, float(loss.tokens[at])


def read_log(folder: Path) -> RunLog:
    """Everything of a run's folder that a report shows. ReportError where there is no run, or nothing was recorded."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ReportError(
            f"{folder}: is no run (no config.yaml in it); give the folder that `moesaic train` wrote"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReportError(
            f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); repair it"
        ) from None
    if not isinstance(config, dict):
        raise ReportError(f"{path}: is not a mapping; put the run's configuration back")
    notes: list[str] = []
    batch = _whole(config, "batch_tokens") or 1
    micro_batches = batch // (_whole(config, "micro_batch_tokens") or batch)
    numbers = _Numbers(folder / "metrics.jsonl", notes, max(1, micro_batches))
    per_step = numbers.tokens_per_step or batch
    return RunLog(
        folder=folder,
        name=str(config.get("name", folder.name)),
        config_text=text,
        config=config,
        starts=_read_starts(folder / "environment.json", notes),
        series=numbers.series(per_step),
        loads=numbers.loads(),
        of_ranks=numbers.of_ranks(),
        step=numbers.step,
        tokens=numbers.step * per_step,
        samples=_read_samples(folder / "samples.txt", notes),
        notes=notes,
    )


@dataclass(frozen=True)
class _Scalar:
    steps: "array[int]"
    values: "array[float]"


@dataclass(frozen=True)
class _Load:
    layer: int
    sums: np.ndarray
    """(COLUMNS, E): the shares of the records of a column, added up."""


class _OfRanks:
    """Numbers of ranks, added up by column. A run may go on with another number of ranks."""

    def __init__(self) -> None:
        self.sums = np.zeros((COLUMNS, 0))
        self.counts = np.zeros((COLUMNS, 0))
        self.ends = np.zeros(COLUMNS)

    def add(self, column: int, step: int, values: np.ndarray) -> None:
        missing = len(values) - self.sums.shape[1]
        if missing > 0:
            self.sums, self.counts = (np.pad(a, ((0, 0), (0, missing))) for a in (self.sums, self.counts))
        known = np.isfinite(values)
        self.sums[column, : len(values)] += np.where(known, values, 0)
        self.counts[column, : len(values)] += known
        self.ends[column] = step

    def map(self, per_step: float) -> RankMap | None:
        if not self.counts.any():
            return None
        used = self.ends > 0  # by any record: where the run waited for nobody, nothing is known
        sums, counts = self.sums[used].T, self.counts[used].T
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        return RankMap(self.ends[used] * per_step, means)


class _Numbers:
    """One pass over metrics.jsonl. Scalars are kept whole, loads and waits as sums over at most `COLUMNS` columns."""

    def __init__(self, path: Path, notes: list[str], micro_batches: int) -> None:
        if not path.is_file():
            raise ReportError(f"{path}: is not there; a report needs it, and a run that took a step has it")
        with path.open("rb") as file:
            self.lines = sum(1 for _ in file)
        self.step = 0
        self.micro_batches = micro_batches
        self.tokens_per_step: float | None = None
        self._kept: dict[str, _Scalar | _Load | Literal["unused"]] = {}
        self._counts = np.zeros(COLUMNS)
        self._ends = np.zeros(COLUMNS)
        self._of_ranks = {name: _OfRanks() for name in _OF_RANKS}
        whole, damaged, number = 0, [], 0
        for number, record in enumerate(each_record(path), 1):
            if record is None:
                damaged.append(number)
            else:
                self._add(record, whole)
                whole += 1
        if not whole:
            raise ReportError(
                f"{path}: holds no record; a run writes the first after `log.every` steps, try again then"
            )
        if damaged == [number]:
            notes.append(f"{path}: its last line is unfinished and was left out; --resume writes it again")
        elif damaged:
            shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            notes.append(
                f"{path}: {len(damaged)} lines are damaged and were left out ({shown}); put a copy back"
            )

    def _add(self, record: Mapping[str, Any], index: int) -> None:
        step = self.step = record["step"]
        if step and isinstance(tokens := record.get("tokens"), int | float):
            self.tokens_per_step = tokens / step
        column = min(index * COLUMNS // self.lines, COLUMNS - 1)
        has_load = False
        for name, value in (*record.items(), *_of_lists(record, self.micro_batches)):
            kept = self._kept.get(name)
            if kept is None:
                kept = self._kept[name] = _keeper(name, value)
            if isinstance(kept, _Scalar):
                kept.steps.append(step)
                kept.values.append(value if isinstance(value, int | float) else np.nan)
            elif isinstance(kept, _Load):
                kept.sums[column] += value
                has_load = True
        if has_load:
            self._counts[column] += 1
            self._ends[column] = step
        speed = record.get("time/tokens_per_second")
        if isinstance(speed, int | float) and speed and self.tokens_per_step:  # not an evaluation
            seconds = self.tokens_per_step / speed
            for name, of in self._of_ranks.items():
                if isinstance(numbers := record.get(name, []), list):
                    whole = seconds if name.startswith("time/") else sum(numbers) / max(1, len(numbers))
                    of.add(column, step, np.array(numbers, dtype=float) / (whole or 1))

    def series(self, per_step: float) -> dict[str, Series]:
        return {
            name: Series(np.array(kept.steps, dtype=float) * per_step, np.array(kept.values))
            for name, kept in self._kept.items()
            if isinstance(kept, _Scalar)
        }

    def loads(self) -> LoadMap | None:
        used = self._counts > 0
        if not used.any():
            return None
        ends = self._ends[used] * (self.tokens_per_step or 1)
        kept = [load for load in self._kept.values() if isinstance(load, _Load)]
        means = {load.layer: load.sums[used].T / self._counts[used] * load.sums.shape[1] for load in kept}
        return LoadMap(ends, means)

    def of_ranks(self) -> dict[str, RankMap]:
        maps = {name: of.map(self.tokens_per_step or 1) for name, of in self._of_ranks.items()}
        return {name: found for name, found in maps.items() if found is not None}


def _of_lists(record: Mapping[str, Any], micro_batches: int) -> Iterator[tuple[str, float]]:
    """Scalars that follow from numbers of ranks."""
    alone = record.get("traffic/rows_alone")
    if isinstance(alone, list) and (mean := sum(alone) / max(1, len(alone))):
        yield "traffic/rows_alone_max_over_mean", max(alone) / mean
    copies = record.get("traffic/copies")
    if isinstance(copies, list):
        yield "traffic/copies_used", sum(copies) / micro_batches


def _keeper(name: str, value: Any) -> "_Scalar | _Load | Literal['unused']":
    """Where the values of a name go."""
    if _SHOWN.fullmatch(name):
        return _Scalar(array("q"), array("d"))
    if (found := _LOAD.fullmatch(name)) and isinstance(value, list) and value:
        return _Load(int(found.group(1)), np.zeros((COLUMNS, len(value))))
    return "unused"


def _whole(config: Mapping[str, Any], name: str) -> int | None:
    """A whole number of the section `train`."""
    section = config.get("train")
    value = section.get(name) if isinstance(section, dict) else None
    return value if isinstance(value, int) else None


def _read_starts(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append(
            f"{path}: is not there, so versions and command are unknown; the next start writes it again"
        )
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        notes.append(
            f"{path}: cannot be read as JSON ({error}), so versions and command are unknown; repair it"
        )
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _read_samples(path: Path, notes: list[str]) -> list[SampleText]:
    """The newest texts."""
    if not path.is_file():
        notes.append(
            f"{path}: is not there; a run writes its texts when it finishes, `moesaic generate` at any time"
        )
        return []
    parts = _SAMPLE.split(path.read_text(encoding="utf-8", errors="replace"))[1:]
    found = [
        SampleText(int(step), text.rstrip("\n")) for step, text in zip(parts[::3], parts[2::3], strict=True)
    ]
    return [
        SampleText(one.step, one.text if len(one.text) <= _LETTERS else one.text[:_LETTERS] + " ...")
        for one in found[-_TEXTS:]
    ]
