"""The house rules: imports point down, nothing leaks out of the package, archives hold what they must."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {
    "configs": 0,
    "kernels": 0,
    "moe": 1,
    "models": 2,
    "parallel": 3,
    "data": 3,
    "train": 4,
    "launch": 5,
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = sorted(name.removeprefix("moesaic.") for name in PROJECT["tool"]["setuptools"]["packages"][1:])
FOLDERS = [name for name in PACKAGES if "." not in name]
NUMERIC = {"torch", "triton", "numpy", "scipy", "jaxtyping"}
ONLY_NUMERIC = {"kernels", "moe", "models", "parallel"}
EXTRAS = {"data": "data", "train": "eval"}
"""Folders with extra dependencies, which are imported where they are used."""
IMPORT_NAMES = {
    "pyyaml": "yaml",
    "tensorboardx": "tensorboardX",
    "lm-eval": "lm_eval",
}  # where a distribution's module has another name


# Runs one hook of the build backend (torch requires it, so it is installed): build_sdist or build_wheel.
BUILD = "import sys\nfrom setuptools import build_meta\nprint(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is the dotted path, `place` the file and line."""

    module: str
    place: str


def imports_of(source: str, name: str) -> Iterator[Import]:
    """Every import of a file, also within functions. `from moesaic import x` counts as moesaic.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, f"{name}:{node.lineno}")
        elif isinstance(node, ast.ImportFrom):
            place = f"{name}:{node.lineno}"
            if node.level:
                yield Import("." * node.level + (node.module or ""), place)
            elif node.module == "moesaic":
                for alias in node.names:
                    yield Import(f"moesaic.{alias.name}", place)
            else:
                yield Import(node.module or "", place)


def folder_imports(folder: str) -> Iterator[Import]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield from imports_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


def pointing_up(folder: str, imports: Iterator[Import]) -> list[str]:
    """The imports of `folder` that do not point down, as `file:line imports x`."""
    wrong = []
    for found in imports:
        parts = found.module.split(".")
        if found.module.startswith("."):
            wrong.append(f"{found.place} imports relatively ({found.module})")
        elif parts[0] == "moesaic" and len(parts) > 1 and parts[1] in RANK:
            used = parts[1]
            if used != folder and RANK[used] >= RANK[folder]:
                wrong.append(f"{found.place} imports {used}")
    return wrong


def third_party(imports: Iterator[Import]) -> dict[str, list[str]]:
    """Top-level module -> places, without the standard library and moesaic."""
    found: dict[str, list[str]] = {}
    for item in imports:
        top = item.module.split(".")[0]
        if top and top != "moesaic" and top not in sys.stdlib_module_names:
            found.setdefault(top, []).append(item.place)
    return found


def files() -> list[Path]:
    """The files of the repository: what git knows or would add; everything, in an unpacked archive."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in names if name]
    else:
        paths = [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return sorted(path for path in paths if path.is_symlink() or path.is_file())


def run_python(code: str, folder: Path, *args: str) -> str:
    """The standard output of `code` in a new interpreter, started in `folder` without PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_reader_sees_every_form():
    source = (
        "import moesaic.train.config\nfrom moesaic import launch\nfrom moesaic.data.loader import Batch\n"
        "def late():\n    import torch.nn as nn, scipy\nfrom . import near\n"
    )
    assert [found.module for found in imports_of(source, "x.py")] == [
        "moesaic.train.config",
        "moesaic.launch",
        "moesaic.data.loader",
        ".",
        "torch.nn",
        "scipy",
    ]
    assert (
        len(pointing_up("models", imports_of(source, "x.py"))) == 4
    )  # train, launch, data and the relative one
    assert set(third_party(imports_of(source, "x.py"))) == {"torch", "scipy"}


def test_every_package_has_a_rank_and_a_link():
    for package in PACKAGES:
        folder = package.replace(".", "/")
        assert (ROOT / folder / "__init__.py").is_file()
        assert PROJECT["tool"]["setuptools"]["package-dir"][f"moesaic.{package}"] == folder
    for folder in FOLDERS:
        assert folder in RANK, f"{folder} has no place in the order of imports"
    if (ROOT / ".git").exists():  # archives leave the links out
        for folder in FOLDERS:
            link = ROOT / "src" / "moesaic" / folder
            assert link.is_symlink()
            assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder: str):
    assert pointing_up(folder, folder_imports(folder)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_third_party_imports_are_allowed(folder: str):
    if folder in ONLY_NUMERIC:
        allowed = NUMERIC
    else:
        required = list(PROJECT["project"]["dependencies"])
        if folder in EXTRAS:
            required += PROJECT["project"]["optional-dependencies"][EXTRAS[folder]]
        distributions = [re.split(r"[^\w-]", line)[0].lower() for line in required]
        allowed = {IMPORT_NAMES.get(name, name) for name in distributions} | NUMERIC
    found = third_party(folder_imports(folder))
    assert {module: places for module, places in found.items() if module not in allowed} == {}


@pytest.mark.parametrize("folder", EXTRAS)
def test_extras_are_imported_where_they_are_used(folder: str, tmp_path: Path):
    extras = PROJECT["project"]["optional-dependencies"][EXTRAS[folder]]
    distributions = [re.split(r"[^\w-]", line)[0].lower() for line in extras]
    names = [IMPORT_NAMES.get(name, name) for name in distributions]
    # a module of the extra's own name is an adapter, which only one command imports
    stems = [path.stem for path in (ROOT / folder).glob("[!_]*.py") if path.stem not in names]
    modules = [f"moesaic.{folder}.{stem}" for stem in stems]
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]):\n    importlib.import_module(name)\n"
        "print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))\n"
    )
    assert json.loads(run_python(code, tmp_path, json.dumps(modules), json.dumps(names))) == []


def test_folder_names_are_no_top_level_modules(tmp_path: Path):
    code = (
        "import importlib.util, json, sys\n"
        "specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}\n"
        "print(json.dumps({name: str(spec) for name, spec in specs.items() if spec}))\n"
    )
    names = [*FOLDERS, "tests", "bench", "docs", "src"]
    assert json.loads(run_python(code, tmp_path, *names)) == {}


def test_moe_imports_quickly_and_without_the_upper_layers(tmp_path: Path):
    code = (
        "import json, sys, time\nimport torch\nbegan = time.perf_counter()\nimport moesaic.moe\n"
        "print(json.dumps([time.perf_counter() - began, sorted(sys.modules)]))\n"
    )
    runs = []
    while len(runs) < 3 and (not runs or min(runs)[0] >= 2):  # the best of three, as the machine may be busy
        runs.append(json.loads(run_python(code, tmp_path)))
    seconds, modules = min(runs)
    assert seconds < 2, f"import moesaic.moe adds {seconds:.1f} s to import torch"
    heavy = {"pydantic", "typer", "rich", "tokenizers", "yaml", "tensorboardX", "safetensors"}
    upper = {f"moesaic.{name}" for name in ("models", "parallel", "data", "train", "launch")}
    assert (heavy | upper) & set(modules) == set()


def test_no_file_mentions_a_path_of_one_machine():
    local = re.compile(rb"(?<![\w.~$}-])/(?:work|root|home|Users|opt|mnt|srv|scratch|data)/[\w.]")
    found = []
    for path in files():
        if path.is_symlink():
            assert not path.readlink().is_absolute(), f"{path} links to {path.readlink()}"
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if local.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[:100].decode(errors='replace')}")
    assert found == []


@dataclass(frozen=True)
class Archives:
    """The names within a wheel and within an sdist, the sdist's without its top folder."""

    wheel: list[str]
    sdist: list[str]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """The sdist of a copy of the repository, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "moesaic"
    for path in files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    (copy / "kernels" / "__pycache__").mkdir()  # as in a checkout that was used
    (copy / "kernels" / "__pycache__" / "stale.cpython-311.pyc").write_bytes(b"")
    sdist = run_python(BUILD, copy, "build_sdist", str(folder)).splitlines()[-1]
    with tarfile.open(folder / sdist) as file:
        in_sdist = [name.partition("/")[2] for name in file.getnames()]
        file.extractall(folder / "unpacked", filter="data")
    unpacked = folder / "unpacked" / sdist.removesuffix(".tar.gz")
    wheel = run_python(BUILD, unpacked, "build_wheel", str(folder)).splitlines()[-1]
    with zipfile.ZipFile(folder / wheel) as file:
        in_wheel = file.namelist()
    return Archives(wheel=in_wheel, sdist=in_sdist)


def test_the_wheel_holds_the_package_and_nothing_else(archives: Archives):
    expected = {"moesaic/__init__.py", "moesaic/__main__.py", "moesaic/py.typed"}
    for folder in FOLDERS:
        patterns = ("**/*.py", "*.yaml", "*.html", "cpp/*.h", "cpp/*.cpp")
        sources = [path for pattern in patterns for path in (ROOT / folder).glob(pattern)]
        expected |= {f"moesaic/{path.relative_to(ROOT)}" for path in sources}
    assert {name for name in archives.wheel if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in archives.wheel)


def test_the_sdist_holds_the_repository_once(archives: Archives):
    inside = set(archives.sdist)
    missing = [str(path.relative_to(ROOT)) for path in files() if not path.is_symlink()]
    assert [name for name in missing if name not in inside] == []
    assert sorted(name for name in inside if name.startswith("src/moesaic/") and name.endswith(".py")) == [
        "src/moesaic/__init__.py",
        "src/moesaic/__main__.py",
    ]
    assert [name for name in inside if name.endswith(".pyc")] == []
