"""Which of several implementations is fastest for a shape: measured once, remembered in a file of the cache.

The file makes a choice last: a run that is resumed on the same machine computes with the kernels that it began with.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moesaic.kernels.cache import cache_folder
from moesaic.kernels.files import Replaced

ROUNDS = 3
_chosen: dict[tuple[Path, str], str] = {}


def choices_file() -> Path:
    """Where choices are kept: `$MOESAIC_CACHE/kernels/choices.json`."""
    return cache_folder() / "kernels" / "choices.json"


def fastest(key: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The candidate with the shortest of three runs, after one that is not counted; from the file where it is there.

    `key` names everything that the choice depends on: device, versions, shape. A candidate that fails, for want of
    memory or because its library refuses the shape, loses; where all fail, the first one's error is raised. Without a
    file to write to, the choice lasts as long as the process.
    """
    known = remembered(key, candidates)
    if known is None:
        seconds: dict[str, float] = {}
        failures: list[Exception] = []
        for name, run in candidates.items():
            try:
                seconds[name] = _seconds(run)
            except Exception as failure:
                failures.append(failure)
        if not seconds:
            raise failures[0]
        known = min(seconds, key=seconds.__getitem__)
        path = choices_file()
        _chosen[path, key] = known
        with suppress(OSError):  # a full or read-only disk costs a measurement, not the run
            _keep(path, key, known, dict.fromkeys(candidates) | seconds)
    return known


def remembered(key: str, candidates: Collection[str]) -> str | None:
    """What was chosen of these before, if anything was."""
    path = choices_file()
    known = _chosen.get((path, key)) or _read(path).get(key, {}).get("chosen")
    if known is None or known not in candidates:
        return None
    _chosen[path, key] = known
    return known


def _seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for turn in range(ROUNDS + 1):
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What is known; nothing where the file is missing or damaged, for it can be measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {key: value for key, value in found.items() if isinstance(value, dict)}
        if isinstance(found, dict)
        else {}
    )


def _keep(path: Path, key: str, chosen: str, seconds: Mapping[str, float | None]) -> None:
    """Add a choice, with what was measured; None stands for what failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    milliseconds = {name: None if value is None else round(1e3 * value, 4) for name, value in seconds.items()}
    entries = _read(path) | {key: {"chosen": chosen, "ms": milliseconds}}
    with Replaced(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")


@cache
def machine(device: torch.device) -> str:
    """What a choice depends on beside the shape: the device and the libraries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return f"{name}, torch {torch.__version__}, triton {version}"
