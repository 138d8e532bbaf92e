"""What a start of a run depends on besides its configuration: versions, machine, repository, command."""

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from moesaic.kernels import native


def environment(command: Sequence[str], *, threads: int) -> dict[str, Any]:
    """One entry of `environment.json`, as plain JSON values. `threads`: CPU threads of this rank."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_kernels": native.status(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "executable": sys.executable,
        "cuda": torch.version.cuda,
        "packages": package_versions(),
        "repositories": repositories([Path.cwd(), Path(__file__).resolve().parent]),
    }


def cpu_name() -> str:
    """The processor's name as it calls itself, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def package_versions() -> dict[str, str]:
    """Installed versions of moesaic and of everything it requires. Empty where it runs from a bare clone."""
    try:
        required = importlib.metadata.requires("moesaic") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    versions = {}
    for name in ["moesaic", *sorted(names, key=str.lower), "triton"]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def repositories(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """State of the git repositories around `folders`, each once: root, commit, branch, and the files that differ."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        root = _git(folder, "rev-parse", "--show-toplevel")
        if not root or root in found:
            continue
        changed = (_git(folder, "status", "--porcelain", "--untracked-files=normal") or "").splitlines()
        found[root] = {
            "root": root,
            "commit": _git(folder, "rev-parse", "--verify", "--quiet", "HEAD"),
            "branch": _git(folder, "branch", "--show-current"),
            "changed": changed[:100],
            "num_changed": len(changed),
        }
    return list(found.values())


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n") or None
