"""Save and load tensors by logical name, on any number of ranks.

`torch.distributed.checkpoint` plans: what each rank writes, what is written once although many ranks hold
it, and which parts of which chunks a rank reads to fill the shards it has now. Files and bytes are the
business of `moesaic.parallel.storage`. Tensors may be plain (equal on all ranks) or DTensors; a checkpoint
written by one layout loads into any other.

With a process group, `save`, `save_async` and `load` are collective: all ranks of `group` (None: the default
group) call them with the same names, and an error on one rank is raised on all. `read_*` are local.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from json import dumps, loads
from os import PathLike
from pathlib import Path
from shutil import disk_usage
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from moesaic.parallel.ranks import waiting_for
from moesaic.parallel.storage import (
    CODES,
    CheckpointError,
    Chunk,
    DamagedCheckpointError,
    Draft,
    FileEntry,
    Manifest,
    TensorEntry,
    read_box,
    read_manifest,
    verify,
    write_manifest,
    write_tensors,
)

T = TypeVar("T")

# One process without a process group is a supported case, not a mistake to be warned about at every save.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint; when this returns, it is on disk.

    The folder appears under its name only when it is complete, and then replaces one that had the name.
    `meta` is stored as JSON: its keys are strings, and tuples come back as lists. Raises CheckpointError,
    after removing what was written, where it cannot be written (disk full, no permission) or a type cannot
    be stored.
    """
    _save(folder, tensors, _json(meta), group, staged=None)


def save_async(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    after: Callable[[], None] | None = None,
) -> Future[None]:
    """Like `save`, but return when the tensors are copied, and write the copy in a thread.

    Tensors may be changed as soon as this returns. Errors are raised by the future's `result()`. `after` is
    called in the thread when the checkpoint is complete; its error is the future's. Until the future is done,
    nothing else may use `group`, which needs a CPU backend. The interpreter waits for the thread at its exit.
    """
    values = _json(meta)
    staged = threading.Event()

    def work() -> None:
        try:
            _save(folder, tensors, values, group, staged=staged.set)
        finally:
            staged.set()
        if after is not None:
            after()

    executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = executor.submit(work)
    executor.shutdown(wait=False)
    staged.wait()
    return future


def load(
    folder: Path, into: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Load a checkpoint into these tensors, in place, and return its `meta`.

    Names, shapes and types must be exactly those of the checkpoint: CheckpointError lists what differs.
    Every file is compared with its checksum before any tensor is changed: DamagedCheckpointError names one
    that differs.
    """
    manifest = _agreed(lambda: _checked(folder, into, group), group)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp_load(dict(into), storage_reader=_Reader(folder, manifest), planner=planner, process_group=group)
    except CheckpointException as error:
        raise _cause(error, f"{folder}: not loaded") from error
    return manifest.meta


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta` of a checkpoint. Its manifest is verified, its tensor files are not."""
    return read_manifest(folder).meta


def read_tensors(folder: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors (None: all) in CPU memory; the files that hold them are verified first."""
    manifest = read_manifest(folder)
    wanted = list(manifest.tensors) if names is None else list(names)
    unknown = [name for name in wanted if name not in manifest.tensors]
    if unknown:
        raise CheckpointError(
            f"{folder}: has no tensor {_few(unknown)}; it has {_few(list(manifest.tensors))}"
        )
    entries = {name: manifest.tensors[name] for name in wanted}
    verify(folder, manifest, sorted({chunk.file for entry in entries.values() for chunk in entry.chunks}))
    tensors = {}
    for name, entry in entries.items():
        tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            box = tensors[name]
            for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.shape, strict=True)):
                box = box.narrow(dim, offset, length)
            with (folder / chunk.file).open("rb") as file:
                box.copy_(read_box(file, entry.dtype, chunk, [0] * box.ndim, chunk.shape))
    return tensors


class _Writer(StorageWriter):
    """Writes each rank's share to one file; the coordinator adds the manifest and publishes the folder."""

    def __init__(self, folder: Path, meta: dict[str, Any], staged: Callable[[], None] | None) -> None:
        self._folder = folder
        self._meta = meta
        self._staged = staged
        self.draft: Draft | None = None  # on the coordinator, once the plan is made

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.draft = Draft(self._folder)
        paths = [str(self.draft.path / f"rank-{rank:05d}.safetensors") for rank in range(len(plans))]
        return [replace(plan, storage_data=path) for plan, path in zip(plans, paths, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        tensors = [self._tensor(item, planner) for item in plan.items]
        if self._staged is not None:
            # Copied after planning: only what this rank writes, and whatever kind of sharding it came from.
            tensors = [torch.empty_like(t, device="cpu").copy_(t) for t in tensors]
            self._staged()
        results = []
        if tensors:  # a rank whose tensors all are copies of another's writes no file
            path = Path(plan.storage_data)
            keys = [f"{i.index.fqn}|{','.join(map(str, i.index.offset or ()))}" for i in plan.items]
            entry, starts = write_tensors(path, list(zip(keys, tensors, strict=True)))
            for item, tensor, start in zip(plan.items, tensors, starts, strict=True):
                chunk = Chunk(tuple(item.index.offset or ()), tuple(tensor.shape), path.name, start)
                results.append(WriteResult(item.index, tensor.nbytes, (chunk, entry)))
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.draft is not None
        files: dict[str, FileEntry] = {}
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            chunk, entry = result.storage_data
            files[chunk.file] = entry
            chunks[result.index.fqn].append(chunk)
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = TensorEntry(stored.properties.dtype, tuple(stored.size), tuple(chunks[name]))
        write_manifest(self.draft.path, Manifest(self._meta, files, tensors))
        self.draft.publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True

    @staticmethod
    def _tensor(item: WriteItem, planner: SavePlanner) -> Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor.detach()


class _Reader(StorageReader):
    """Reads the parts of chunks that the planner asks for, from files that are already verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._tensors = manifest.tensors
        self._chunks = {(n, c.offsets): c for n, entry in manifest.tensors.items() for c in entry.chunks}

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
                )
                for name, entry in self._tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        def stored(item: ReadItem) -> Chunk:
            return self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

        with ExitStack() as stack:
            files = {
                name: stack.enter_context((self._folder / name).open("rb"))
                for name in sorted({stored(item).file for item in plan.items})
            }
            for item in plan.items:
                assert item.type == LoadItemType.TENSOR
                chunk, dtype = stored(item), self._tensors[item.storage_index.fqn].dtype
                box = read_box(files[chunk.file], dtype, chunk, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item)
                target.detach().copy_(box)
                planner.commit_tensor(item, target)
        future: TorchFuture[None] = TorchFuture()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True


def _save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Any],
    group: dist.ProcessGroup | None,
    *,
    staged: Callable[[], None] | None,
) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{name}: type {tensor.dtype} cannot be stored; convert it to one of {_few(CODES)}"
            )
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    writer = _Writer(folder, meta, staged)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp_save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except BaseException as error:
        if writer.draft is not None:
            writer.draft.abandon()
        if isinstance(error, CheckpointException):
            raise _cause(error, f"{folder}: not saved", needed=needed, parent=folder.parent) from error
        raise


def _cause(
    error: CheckpointException, what: str, *, needed: int = 0, parent: Path | None = None
) -> BaseException:
    """What to raise for an error that came through torch.distributed.checkpoint, which wraps all kinds."""
    cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, CheckpointError) or not isinstance(cause, Exception):
        return cause
    if not isinstance(cause, OSError):
        return CheckpointError(f"{what}: {type(cause).__name__}: {cause}")
    what = f"{what}: {cause.strerror or cause}" + (f" ({cause.filename})" if cause.filename else "")
    if parent is None:
        return DamagedCheckpointError(f"{what}; use another checkpoint")
    while not parent.exists():
        parent = parent.parent
    free = disk_usage(parent).free
    return CheckpointError(
        f"{what}: {needed:,} bytes are needed, {free:,} are free in {parent};"
        " free some space, keep fewer checkpoints, or save elsewhere"
    )


def _checked(folder: Path, into: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Manifest:
    """The manifest, when it fits the tensors and this rank's share of the files is whole."""
    manifest = read_manifest(folder)
    stored = {name: (str(e.dtype), e.shape) for name, e in manifest.tensors.items()}
    here = {name: (str(t.dtype), tuple(t.shape)) for name, t in into.items()}
    differences = {
        "not in the checkpoint": [name for name in here if name not in stored],
        "only in the checkpoint": [name for name in stored if name not in here],
        "different": [
            f"{name} (checkpoint {' '.join(map(str, stored[name]))}, here {' '.join(map(str, here[name]))})"
            for name in stored
            if name in here and stored[name] != here[name]
        ],
    }
    if any(differences.values()):
        listed = "; ".join(f"{what}: {_few(names)}" for what, names in differences.items() if names)
        raise CheckpointError(
            f"{folder}: does not fit: {listed}; use the configuration that it was saved with"
        )
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if _distributed() else (0, 1)
    verify(folder, manifest, sorted(manifest.files)[rank::ranks])
    return manifest


def _agreed(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do work on every rank; a CheckpointError on one rank is raised on all."""
    result, error = None, None
    try:
        result = work()
    except CheckpointError as raised:
        error = raised
    if _distributed():
        errors: list[CheckpointError | None] = [None] * dist.get_world_size(group)
        with waiting_for("what all ranks say of a checkpoint", group):
            dist.all_gather_object(errors, error, group=group)
        error = next((each for each in errors if each is not None), None)
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the values as they will be read."""
    return loads(dumps(dict(meta)))


def _few(names: Iterable[object]) -> str:
    """A list that stays readable."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
