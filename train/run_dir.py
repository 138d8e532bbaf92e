"""The folder of one run: what was asked, where it ran, what it said, what it measured.

    dir/name/
        config.yaml         the resolved run; config.1.yaml, ... are older ones that a resumed start replaced
        environment.json    one entry per start: versions, machine, repository, command, and how it ended
        data.json           what the text was made of: files and digests
        tokenizer/          what turns text into ids and back
        log.txt             everything that was said, with times
        metrics.jsonl       one record per line (`train/writers.py`)
        checkpoints/        `train/checkpoints.py`
        routing.npz         with log.routing: who sent how many tokens to which expert (`train/recorder.py`), from
                            routing.raw, which grows along the run
        profile/            with --profile: where the time of some steps went
        tensorboard/        event files
        samples.txt         texts the model wrote
        report.html         all of this as one page (`train/report.py`)

A run is never overwritten, and one process at a time may train it. This module knows nothing of models or training:
configurations are YAML text here.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

import yaml

from moesaic.kernels.files import Replaced

RESUMABLE = (
    "name",
    "dir",
    "train.steps",
    "train.threads",
    "train.micro_batch_tokens",
    "data.workers",
    "data.cache",
    "parallel",
    "kernels",
    "checkpoint",
    "eval",
    "log",
)
"""Keys (with everything below them) that a resumed run may change. All others would make it another run."""

_LOCK = ".lock"
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Change:
    """One key whose value differs between two configurations. A key that is absent reads `(not set)`."""

    key: str
    old: str
    new: str

    @property
    def allowed(self) -> bool:
        return any(self.key == name or self.key.startswith(name + ".") for name in RESUMABLE)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


class RunDir:
    """An open run folder, locked for this process until `close` (or the end of the process).

    Made by `create` or `resume`. `changes` holds what a resumed start changed in the configuration.
    """

    def __init__(self, path: Path, lock: TextIO | None, changes: Sequence[Change] = ()) -> None:
        self.path = path
        self.changes = tuple(changes)
        self._lock = lock
        log = os.devnull if lock is None else path / "log.txt"
        self._log = Path(log).open("a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    @classmethod
    def peer(cls, path: Path) -> "RunDir":
        """The run in `path`, which another rank has opened: its paths. What is said or recorded here goes nowhere."""
        return cls(path, None)

    @property
    def config(self) -> Path:
        return self.path / _CONFIG

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path, config: str) -> "RunDir":
        """Start a new run in `path`; `config` is the resolved run as YAML. ValueError where a run exists already."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot make the run's folder ({error.strerror}); give another dir=..."
            ) from None
        lock = _acquire(path)
        try:
            refuse_existing(path)
        except ValueError:
            lock.close()
            raise
        _write(path / _CONFIG, config)
        return cls(path, lock)

    @classmethod
    def resume(cls, path: Path, config: str) -> "RunDir":
        """Continue the run in `path`.

        Differences outside `RESUMABLE` are refused. Accepted ones are in `changes`: the new configuration becomes
        `config.yaml`, the old one stays as `config.<n>.yaml`.
        """
        stored = path / _CONFIG
        if not holds_run(path):
            raise ValueError(f"{path}: holds no run to continue; start it without --resume")
        lock = _acquire(path)
        try:
            changes = _compare(stored, config)
        except ValueError:
            lock.close()
            raise
        if changes:
            number = 1
            while (kept := path / f"config.{number}.yaml").exists():
                number += 1
            _write(kept, stored.read_text(encoding="utf-8"))
            _write(stored, config)
        return cls(path, lock, changes)

    def say(self, message: str) -> None:
        """Append `message` to log.txt, each line with the time."""
        now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
        self._log.write("".join(f"{now}  {line}".rstrip() + "\n" for line in message.splitlines() or [""]))
        self._log.flush()

    def record_start(self, environment: Mapping[str, Any]) -> None:
        """Append one entry (see `train/environment.py`) to environment.json."""
        if self._lock is None:
            return
        starts: list[Any] = []
        if self.environment.exists():
            starts = json.loads(self.environment.read_text(encoding="utf-8"))
        _write(self.environment, json.dumps([*starts, dict(environment)], indent=2) + "\n")

    def record_end(self, outcome: str) -> None:
        """Add to the entry of this start how and when it ended. A start that was killed has neither."""
        if self._lock is None:
            return
        *earlier, start = json.loads(self.environment.read_text(encoding="utf-8"))
        ended = datetime.now().astimezone().isoformat(timespec="seconds")
        _write(
            self.environment,
            json.dumps([*earlier, start | {"ended": ended, "outcome": outcome}], indent=2) + "\n",
        )

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Append (prompt, continuation) pairs to samples.txt."""
        if self._lock is None:
            return
        with self.samples.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for number, (prompt, text) in enumerate(samples, 1):
                file.write(f"=== step {step}, sample {number}\n{prompt}{text}\n\n")

    def close(self) -> None:
        """Release the lock. The run may be continued by another process from now on."""
        self._log.close()
        if self._lock is not None:
            self._lock.close()


def holds_run(path: Path) -> bool:
    """Whether there is a run to continue."""
    return (path / _CONFIG).is_file()


def refuse_existing(path: Path) -> None:
    """Raise ValueError where a new run would lie over something."""
    if path.is_dir() and any(
        entry.name != _LOCK and not fnmatch(entry.name, _CONFIG + "*.tmp") for entry in path.iterdir()
    ):
        raise ValueError(
            f"{path}: exists already, and a run is never overwritten; continue it with --resume, "
            f"or start another one with name=..."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key, in dotted form, whose value differs between two resolved configurations."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [*before, *(key for key in after if key not in before)]
    missing = object()
    return [
        Change(key, *(("(not set)" if key not in side else repr(side[key])) for side in (before, after)))
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def _compare(stored: Path, config: str) -> list[Change]:
    try:
        old = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{stored}: cannot be read as YAML ({reason}); the run cannot be continued"
        ) from None
    if not isinstance(old, dict):
        raise ValueError(f"{stored}: is not a mapping; the run cannot be continued")
    changes = differences(old, yaml.safe_load(config))
    refused = [change for change in changes if not change.allowed]
    if refused:
        raise ValueError(
            f"{stored.parent}: a resumed run cannot change " + "; ".join(map(str, refused)) + ". "
            f"Give these keys their old values, or start another run with name=... "
            f"(--resume accepts changes of {', '.join(RESUMABLE)})"
        )
    return changes


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _acquire(path: Path) -> TextIO:
    """Lock the folder; the kernel releases it however the process ends."""
    try:
        file = (path / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot write into the run's folder ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"{path}: another process trains this run ({holder}); stop it first, or start another run with name=..."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _write(path: Path, text: str) -> None:
    """Write all of the file or nothing."""
    with Replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
