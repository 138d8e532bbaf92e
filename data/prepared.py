"""A prepared corpus on disk: streams of token ids, their tokenizer, and a manifest of where they came from.

A folder holds `train.bin` and `eval.bin` (each one stream of ids, every document begun by the mark), the
tokenizer and `manifest.json`. It is complete or absent; a folder that does not fit its manifest is refused.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.errors import DataError
from moesaic.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VERIFIED_BYTES = 64 << 20
"""Streams up to this size are compared with their digest when opened; longer ones by size alone."""


@dataclass(frozen=True)
class Prepared:
    """An open corpus."""

    folder: Path
    train: np.ndarray
    """Memory map of the training stream, uint16 or uint32."""
    eval: np.ndarray
    """Memory map of the held-out stream, its documents in the order of their hashes."""
    manifest: dict[str, Any]
    """Files with digests, counts, versions: everything that a run has to record about its data."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError where it is not the one the streams were made with."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.digest != self.manifest["tokenizer"]["digest"]:
            raise _damaged(self.folder, "about_tokenizer.json", "is another tokenizer's")
        return tokenizer

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON; `documents`, `bytes`, `tokens` and `bytes_per_token` at each level."""
        manifest = self.manifest
        splits: dict[str, dict[str, Any]] = {
            split: _total(list(domains.values())) | {"domains": {d: _total([n]) for d, n in domains.items()}}
            for split, domains in manifest["counts"].items()
        }
        return {
            "folder": str(self.folder),
            "kind": manifest["kind"],
            "tokenizer": {key: manifest["tokenizer"][key] for key in ("name", "vocab")},
            **_total(list(splits.values())),
            "splits": splits,
            "held_out_by": manifest["split"],
            "files": len(manifest["files"]),
            "duplicates": manifest["duplicates"],
            "skipped": manifest["skipped"],
            "longest": manifest["longest"],
        }


def open_prepared(folder: Path, key: str) -> Prepared:
    """Open a folder that was prepared under this key. DataError names what does not fit, and the remedy."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, found = manifest["format_version"], manifest["key"]
        streams = {split: manifest["streams"][split] for split in ("train", "eval")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, MANIFEST, f"is missing or damaged ({error!r})") from error
    if version != FORMAT_VERSION:
        raise _damaged(folder, MANIFEST, f"has format version {version}, this moesaic reads {FORMAT_VERSION}")
    if found != key:
        raise _damaged(folder, MANIFEST, f"is of another corpus (key {found[:16]}, not {key[:16]})")
    train, held_out = (_open_stream(folder, f"{split}.bin", about) for split, about in streams.items())
    return Prepared(folder, train, held_out, manifest)


def _open_stream(folder: Path, name: str, about: dict[str, Any]) -> np.ndarray:
    path, dtype = folder / name, np.dtype(about["dtype"])
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise _damaged(folder, name, "is missing")
    if size != about["tokens"] * dtype.itemsize:
        raise _damaged(folder, name, f"has {size} bytes instead of {about['tokens'] * dtype.itemsize}")
    if size <= VERIFIED_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise _damaged(folder, name, "has another sha256 than its manifest says")
    return np.memmap(path, dtype, mode="r")


def _total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {key: sum(n[key] for n in counts) for key in ("documents", "bytes", "tokens")}
    return total | {"bytes_per_token": total["bytes"] / total["tokens"]}


def _damaged(folder: Path, name: str, what: str) -> DataError:
    return DataError(f"{folder / name}: {what}; delete the folder {folder} and prepare the corpus again")
