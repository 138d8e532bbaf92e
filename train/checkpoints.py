"""The checkpoints of a run: when one is due, which stay, and which one a resumed run continues from.

Knows folders and steps; what is inside a checkpoint is the business of `moesaic.parallel.checkpoint`.
"""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.storage import CheckpointError, DamagedCheckpointError, discard, remove_leftovers

_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and which of its checkpoints stay."""

    every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    milestones: int | None = None
    """At multiples of this many steps a checkpoint is made too, and stays forever. None: none is."""
    asynchronous: bool = True
    """Write in the background while training goes on, from a copy of the tensors taken first."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every: {self.every} is negative; give a number of steps, or 0")
        if self.keep < 1:
            raise ValueError(f"keep: {self.keep} would delete every checkpoint; give at least 1")
        if self.milestones is not None and self.milestones < 1:
            raise ValueError(
                f"milestones: {self.milestones} is not positive; give a number of steps, or leave it out"
            )


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    matches = (_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


class Checkpoints:
    """The checkpoints in one folder, `step_00000200` and so on.

    With a process group, every rank makes one and calls its methods in the same order; all ranks see one
    folder. What killed processes left half written there is removed first.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.config = config
        self._say = say
        self._pending: Future[None] | None = None
        distributed = dist.is_available() and dist.is_initialized()
        self._first_rank = not distributed or dist.get_rank() == 0
        # Saving in the background must not meet the collectives of training.
        group = dist.new_group(backend="gloo") if distributed else None
        assert not isinstance(group, int)  # as it is on a rank outside the group
        self._group = group
        if self._first_rank:
            remove_leftovers(folder)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step, whether it exists or not."""
        return self.folder / f"step_{step:08d}"

    def due(self, step: int, last_step: int) -> bool:
        """Whether to save now that `step` steps are done, of a run that ends after `last_step`."""
        every, milestones = self.config.every, self.config.milestones
        return step == last_step or (
            step > 0
            and ((every > 0 and step % every == 0) or (milestones is not None and step % milestones == 0))
        )

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Save, then remove the checkpoints that need not stay, and those of later steps.

        Later ones are there when they were damaged, so that the run was resumed from an earlier one. Waits
        for the save before; where that failed, saves this one first and then raises its error. An asynchronous
        save raises its own from the next `save` or `wait`. A save that fails raises CheckpointError, removes what
        it wrote and leaves the others alone.
        """
        from moesaic.parallel import checkpoint  # slow to import, and not needed by a run's first step

        try:
            self.wait()
        except CheckpointError:
            # the run ends here: what it did since must not be lost if there is room again
            checkpoint.save(self.path(step), tensors, meta, group=self._group)
            self._prune(step)
            raise
        if self.config.asynchronous:
            self._pending = checkpoint.save_async(
                self.path(step), tensors, meta, group=self._group, after=lambda: self._prune(step)
            )
        else:
            checkpoint.save(self.path(step), tensors, meta, group=self._group)
            self._prune(step)

    def wait(self) -> None:
        """Return when nothing is being written any more; raise CheckpointError if the last save failed."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            if self._pending.done():
                self._pending = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending. Each was written completely, but may be damaged since."""
        return saved_steps(self.folder)

    def restore(self, into: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into these tensors and return its `meta`; None if there is none.

        Damaged ones are left out, with a word to `say`. Raises CheckpointError when all are damaged, or when
        one that is whole does not fit the tensors, which then are unchanged.
        """
        from moesaic.parallel import checkpoint
        from moesaic.parallel.ranks import waiting_for

        self.wait()
        steps = [self.steps()]
        if self._group is not None:
            with waiting_for("the first rank's list of checkpoints", self._group):
                dist.broadcast_object_list(steps, src=0, group=self._group)
        for step in reversed(steps[0]):
            try:
                return checkpoint.load(self.path(step), into, group=self._group)
            except DamagedCheckpointError as error:
                if self._first_rank:
                    self._say(f"the checkpoint of step {step} is damaged and left out: {error}")
        if steps[0]:
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged (steps {', '.join(map(str, steps[0]))});"
                " put copies back, or delete this folder to train from the start"
            )
        return None

    def _prune(self, saved: int) -> None:
        """Remove what need not stay, now that the checkpoint of step `saved` is complete."""
        if not self._first_rank:
            return
        steps = self.steps()
        past = [step for step in steps if step <= saved]
        stay = set(past[-self.config.keep :])
        if self.config.milestones is not None:
            stay |= {step for step in past if step % self.config.milestones == 0}
        for step in steps:
            if step not in stay:
                discard(self.path(step))
