"""A run from a config file, and a config file from a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.launch.build import build, plain
from moesaic.launch.layers import read_layers
from moesaic.launch.yaml_text import ConfigError, describe, dump

if TYPE_CHECKING:
    from moesaic.train.config import RunConfig


def read_run(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = 1
) -> RunConfig:
    """The checked run of a config file, or of a shipped config's name, under `a.b=value` overrides.

    Raises ConfigError naming the file or field, the value and the remedy; `world_size` processes will run it;
    None: as many as its layout asks for.
    """
    mapping = read_layers(str(path_or_name), overrides)
    from moesaic.train.config import (
        FORMAT_VERSION,
        RunConfig,
    )  # slow: brings torch; a broken file should not wait for it

    version = mapping.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"version: {describe(version)} is not the format that this moesaic reads; "
            f"write version: {FORMAT_VERSION}, or use the moesaic that wrote the file"
        )
    run = build(RunConfig, mapping)
    try:
        run.check(world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return run


def run_to_yaml(run: RunConfig) -> str:
    """The resolved config: YAML text that reads back to an equal run, whatever the defaults become."""
    return dump(plain(run))
