"""Text that every Python installation carries: sources of the standard library, and documentation prose.

Nothing is imported or run, apart from the table of `pydoc` topics: files are found, read and parsed.
"""

import ast
import importlib.util
import io
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from moesaic.data.errors import DataError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = ("encodings/", "pydoc_data/", "_sysconfigdata")
"""Tables written by programs: character maps, the topics (read as prose instead), build variables."""
TOPICS = "pydoc_data/topics.py"
LONG_DOCSTRING = 200


def list_python(packages: tuple[str, ...], *, prose: bool) -> list[tuple[str, Path]]:
    """(name, path) of the sources of the standard library, without tests, and of installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = _modules(root, root)
    files = [(name, path) for name, path in files if not name.startswith(GENERATED)]
    if not files:
        raise DataError(
            f"data.kind: python: {root} holds no Python sources; use data.kind=text with your own"
        )
    if prose and (root / TOPICS).is_file():
        files.append((TOPICS, root / TOPICS))
    known = dict(files)
    for package in packages:
        known |= dict(_modules(*_locate(package)))
    return list(known.items())


def read_source(content: bytes) -> str:
    """Python source by its declared encoding (PEP 263). SyntaxError or UnicodeDecodeError if not."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def read_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the topics that `help()` knows, sorted."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def titled_docstrings(name: str, source: str) -> str:
    """The long docstrings of a module, each under its dotted name; empty where there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are not our business
        tree = ast.parse(source)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "\n\n\n".join(
        f"{title}\n{'=' * len(title)}\n\n{text}" for title, text in _docstrings(tree, module)
    )


def _docstrings(node: ast.AST, title: str) -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and len(text := (ast.get_docstring(node) or "").strip()) > LONG_DOCSTRING:
        yield title, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # definitions hide in `if` and `try`, never in expressions
            yield from _docstrings(
                child, f"{title}.{child.name}" if isinstance(child, documented[1:]) else title
            )


def _modules(root: Path, base: Path) -> list[tuple[str, Path]]:
    if root.is_file():
        return [(root.relative_to(base).as_posix(), root)]
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # in place: not walked into
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        found += ((path.relative_to(base).as_posix(), path) for path in paths if path.is_file())
    return found


def _locate(package: str) -> tuple[Path, Path]:
    """Folder (or file, of a single module) of an installed package, and the folder it lies in."""
    spec: ModuleSpec | None = None
    if package.isidentifier():  # a dotted name would import its parent
        spec = importlib.util.find_spec(package)
    if spec is None:
        raise DataError(f"data.packages: {package!r} is not an installed package; install it or remove it")
    if spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        return folder, folder.parent
    if not spec.origin or not spec.origin.endswith(".py"):
        raise DataError(f"data.packages: {package!r} has no Python sources; remove it")
    return Path(spec.origin), Path(spec.origin).parent
