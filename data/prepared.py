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
from moesaic.data.loader import Stream
from moesaic.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VERIFIED_BYTES = 64 << 20
"""Streams up to this size are compared with their digest when opened; longer ones by size alone."""


@dataclass(frozen=True)
class Prepared:
    """An open corpus."""

    folder: Path
    train: Stream
    """The training stream, mapped into memory, uint16 or uint32."""
    eval: Stream
    """The held-out stream, likewise, its documents in the order of their hashes."""
    manifest: dict[str, Any]
    """Files with digests, counts, versions: everything that a run has to record about its data."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError where it is not the one the streams were made with."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.digest != self.manifest["tokenizer"]["digest"]:
            raise damaged(self.folder, "about_tokenizer.json", "is another tokenizer's")
        return tokenizer

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON; `documents`, `bytes`, `tokens` and `bytes_per_token` at each level.

        Bytes are None where it is not known what ids stand for.
        """
        manifest = self.manifest
        splits: dict[str, dict[str, Any]] = {
            split: total_of(list(domains.values()))
            | {"domains": {d: total_of([n]) for d, n in domains.items()}}
            for split, domains in manifest["counts"].items()
        }
        return {
            "folder": str(self.folder),
            "kind": manifest["kind"],
            "tokenizer": {key: manifest["tokenizer"][key] for key in ("name", "vocab")},
            **total_of(list(splits.values())),
            "splits": splits,
            "held_out_by": manifest["split"],
            "files": len(manifest["files"]),
            "duplicates": manifest["duplicates"],
            "skipped": manifest["skipped"],
            "longest": manifest["longest"],
        }


def open_prepared(folder: Path, key: str) -> Prepared:
    """Open a folder that was prepared under this key. DataError names what does not fit, and the remedy."""
    manifest = read_manifest(folder, key)
    train, held_out = (
        _open_stream(folder, f"{split}.bin", manifest["streams"][split]) for split in ("train", "eval")
    )
    return Prepared(folder, train, held_out, manifest)


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """The manifest of a folder that was prepared under this key. DataError names what does not fit."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, found = manifest["format_version"], manifest["key"]
        for split in ("train", "eval"):
            manifest["streams"][split]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, MANIFEST, f"is missing or damaged ({error!r})") from error
    if version != FORMAT_VERSION:
        raise damaged(folder, MANIFEST, f"has format version {version}, this moesaic reads {FORMAT_VERSION}")
    if found != key:
        raise damaged(folder, MANIFEST, f"is of another corpus (key {found[:16]}, not {key[:16]})")
    return manifest


def total_of(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of documents, bytes and tokens, and bytes per token; None where something summed is None."""
    total: dict[str, Any] = {"documents": sum(n["documents"] for n in counts)}
    sizes = [n["bytes"] for n in counts]
    total["bytes"] = None if None in sizes else sum(sizes)
    total["tokens"] = sum(n["tokens"] for n in counts)
    total["bytes_per_token"] = None if total["bytes"] is None else total["bytes"] / total["tokens"]
    return total


def damaged(folder: Path, name: str, what: str) -> DataError:
    """The error of a folder that does not fit its manifest."""
    return DataError(f"{folder / name}: {what}; delete the folder {folder} and prepare the corpus again")


def _open_stream(folder: Path, name: str, about: dict[str, Any]) -> np.ndarray:
    path, dtype = folder / name, np.dtype(about["dtype"])
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise damaged(folder, name, "is missing")
    if size != about["tokens"] * dtype.itemsize:
        raise damaged(folder, name, f"has {size} bytes instead of {about['tokens'] * dtype.itemsize}")
    if size <= VERIFIED_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise damaged(folder, name, "has another sha256 than its manifest says")
    return np.memmap(path, dtype, mode="r")
