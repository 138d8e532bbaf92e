"""Checkpoint folders: their files, checksums, and how one comes to stand under its name.

A checkpoint is a folder with one safetensors file per rank that had something to write, and `manifest.json`:
format version, the caller's values, size and SHA-256 of every file, and for every tensor its type, shape and
chunks. A chunk is a box of a tensor, stored under the key `<name>|<offsets>`. Nothing is pickled.

A folder is written beside its final name, as `<name>.tmp-<8 hex digits>`, and renamed when everything in it
is on disk. So a folder under a final name is whole, or was damaged later, which its checksums show.

Knows bytes and folders; which rank writes what is decided in `moesaic.parallel.checkpoint`.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "moesaic-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that can be stored, by their names in safetensors files."""
CODES = {dtype: code for code, dtype in DTYPES.items()}

_NO_DIGEST = "0" * 64
_DRAFT = re.compile(r"(.+)\.tmp-[0-9a-f]{8}")
_REPLACED = ".replaced"


class CheckpointError(ValueError):
    """A checkpoint could not be written, read, or fitted to the tensors at hand."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, unreadable or changed; another checkpoint may be whole."""


@dataclass(frozen=True)
class FileEntry:
    """A tensor file as it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the content."""


@dataclass(frozen=True)
class Chunk:
    """Where a box of a tensor is stored."""

    offsets: tuple[int, ...]
    """First index of the box in every dim of the tensor."""
    shape: tuple[int, ...]
    """Size of the box."""
    file: str
    """Name of its file within the folder."""
    start: int
    """Its first byte in that file."""


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor: its chunks cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    meta: dict[str, Any]
    """The caller's values."""
    files: dict[str, FileEntry]
    """By file name."""
    tensors: dict[str, TensorEntry]
    """By tensor name."""


def write_tensors(path: Path, chunks: Sequence[tuple[str, Tensor]]) -> tuple[FileEntry, list[int]]:
    """Write a safetensors file, and wait until it is on disk. Return its entry, and each chunk's first byte.

    Chunks are (key, tensor) with tensors of any device and stride.
    """
    order = sorted(
        range(len(chunks)), key=lambda i: -chunks[i][1].element_size()
    )  # widest first: all are aligned
    header: dict[str, Any] = {}
    ends = [0]
    for i in order:
        key, tensor = chunks[i]
        ends.append(ends[-1] + tensor.nbytes)
        header[key] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": ends[-2:],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    with path.open("xb") as file:
        file.write(head)
        for i in order:
            data = _bytes(chunks[i][1].detach().cpu().contiguous())
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    starts = dict(zip(order, ends, strict=False))
    return (
        FileEntry(len(head) + ends[-1], digest.hexdigest()),
        [len(head) + starts[i] for i in range(len(chunks))],
    )


def read_box(
    file: BufferedReader, dtype: torch.dtype, chunk: Chunk, offsets: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Read the part of a chunk that starts at `offsets` (relative to the chunk) and has this shape."""
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    # Only the wanted indices of the first dim are read; further dims are cut afterwards.
    rows, first = (shape[0], offsets[0]) if shape else (1, 0)
    row = math.prod(chunk.shape[1:])
    box = torch.empty(rows * row, dtype=dtype)
    file.seek(chunk.start + first * row * dtype.itemsize)
    if file.readinto(_bytes(box)) != box.nbytes:
        raise DamagedCheckpointError(f"{file.name}: ends before its tensors do; use another checkpoint")
    box = box.view(rows, *chunk.shape[1:]) if shape else box.view(())
    for dim in range(1, len(shape)):
        box = box.narrow(dim, offsets[dim], shape[dim])
    return box


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, and wait until it is on disk."""
    content = {
        "sha256": _NO_DIGEST,  # of this file, with zeros in this place
        "format": FORMAT,
        "version": VERSION,
        "meta": manifest.meta,
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "tensors": {
            name: {
                "dtype": CODES[entry.dtype],
                "shape": entry.shape,
                "chunks": [asdict(chunk) for chunk in entry.chunks],
            }
            for name, entry in manifest.tensors.items()
        },
    }
    blank = json.dumps(content, indent=1).encode()
    text = blank.replace(_NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)
    with (folder / MANIFEST).open("xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read and verify the manifest of a checkpoint; its tensor files are not looked at."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        content = json.loads(text)
        claim = content["sha256"].encode()
        whole = hashlib.sha256(text.replace(claim, _NO_DIGEST.encode(), 1)).hexdigest().encode() == claim
    except (ValueError, KeyError, TypeError, AttributeError):
        content, whole = {}, False
    if not whole:
        raise DamagedCheckpointError(f"{path}: was changed after it was written; use another checkpoint")
    found = content.get("format"), content.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: its format is {found[0]} {found[1]}, and this version reads {FORMAT} {VERSION};"
            " use the version of moesaic that wrote it"
        )
    tensors = {
        name: TensorEntry(
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            tuple(
                Chunk(tuple(c["offsets"]), tuple(c["shape"]), c["file"], c["start"]) for c in entry["chunks"]
            ),
        )
        for name, entry in content["tensors"].items()
    }
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    return Manifest(content["meta"], files, tensors)


def verify(folder: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Raise DamagedCheckpointError, naming the file, unless each of these files is what was written."""
    for name in files:
        path, entry = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry.size else None
        except OSError as error:
            raise _unreadable(path, error) from error
        if digest is None:
            raise DamagedCheckpointError(
                f"{path}: has {size} bytes instead of {entry.size}; use another checkpoint"
            )
        if digest != entry.sha256:
            raise DamagedCheckpointError(
                f"{path}: was changed after it was written (its checksum differs); use another checkpoint"
            )


class Draft:
    """A checkpoint folder while it is written.

    A lock on it tells a live draft from what a killed process left behind.
    """

    def __init__(self, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        self.final = final
        self.path = _draft_name(final)
        self.path.mkdir()
        self._lock = _lock(self.path)

    def publish(self) -> None:
        """Give the folder its final name, in place of what had it before."""
        _sync(self.path)
        replaced = self.final.with_name(self.final.name + _REPLACED)
        if self.final.exists():
            if replaced.exists():
                discard(replaced)
            self.final.rename(replaced)  # killed after this line: remove_leftovers() takes it back
        self.path.rename(self.final)
        _sync(self.final.parent)
        self._unlock()
        if replaced.exists():
            discard(replaced)

    def abandon(self) -> None:
        """Remove the folder, if it was not published, and take back what it was about to replace."""
        self._unlock()
        shutil.rmtree(self.path, ignore_errors=True)  # what stays is a leftover
        remove_leftovers(self.final.parent)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def discard(folder: Path) -> None:
    """Remove a checkpoint. Killed on the way, it leaves no half checkpoint under the name."""
    doomed = _draft_name(folder)
    with suppress(FileNotFoundError):  # another process cleaned up
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what stays is a leftover


def remove_leftovers(parent: Path) -> None:
    """Clean up, in a folder of checkpoints, after processes that were killed while they wrote to it.

    Drafts that a living process writes are left alone.
    """
    writing = set()
    for path in sorted(parent.glob("*.tmp-*")):
        match = _DRAFT.fullmatch(path.name)
        if match is None:
            continue
        lock = _lock(path)
        if lock is None:
            writing.add(match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)  # what stays is tried again at the next start
            os.close(lock)
    for path in sorted(parent.glob("*" + _REPLACED)):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if final.name in writing:
            continue
        if final.exists():
            discard(path)
        else:
            path.rename(final)


def _draft_name(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None where another holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks on folders: nobody can hold one
    return descriptor


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _unreadable(path: Path, error: OSError) -> DamagedCheckpointError:
    reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return DamagedCheckpointError(f"{path}: {reason}; use another checkpoint")
