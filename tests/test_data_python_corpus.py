import sys
import sysconfig
from pathlib import Path

import pytest

from moesaic.data.errors import DataError
from moesaic.data.python_corpus import list_python, read_source, read_topics, titled_docstrings

LONG = "It has many words. " * 12


def test_standard_library_without_tests_and_tables() -> None:
    files = dict(list_python((), prose=True))
    assert len(files) > 300
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(files)
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idle_test", "__pycache__", "encodings"}
    assert not any(name.startswith("_sysconfigdata") for name in files)
    assert files["json/decoder.py"] == Path(sysconfig.get_path("stdlib"), "json", "decoder.py")


def test_packages_and_single_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pack/__init__.py", "pack/sub/a.py", "pack/tests/test_a.py", "single.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('never run')")
    monkeypatch.syspath_prepend(tmp_path)
    files = dict(list_python(("pack", "single"), prose=False))
    assert {"pack/__init__.py", "pack/sub/a.py", "single.py"} <= set(files)
    assert "pack/tests/test_a.py" not in files
    assert not {"pack", "single"} & set(sys.modules)


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "", "no-name"])
def test_packages_that_are_not_installed(name: str) -> None:
    with pytest.raises(DataError, match=f"data.packages: '{name}' is not an installed package; install"):
        list_python((name,), prose=False)


def test_packages_without_sources() -> None:
    with pytest.raises(DataError, match=r"data\.packages: 'sys' has no Python sources"):
        list_python(("sys",), prose=False)


def test_installation_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.kind: python: .* holds no Python sources; use"):
        list_python((), prose=True)


def test_sources_are_read_by_their_declared_encoding() -> None:
    assert read_source(b"# coding: latin-1\nx = '\xe9'\n") == "# coding: latin-1\nx = '\u00e9'\n"
    assert read_source(b"\xef\xbb\xbfx = 1\r\n") == "x = 1\r\n"
    with pytest.raises((SyntaxError, UnicodeDecodeError)):
        read_source(b"x = '\xe9'\n")
    with pytest.raises(SyntaxError):
        read_source(b"# coding: no-such-code\n")


def test_long_docstrings_stand_under_their_names() -> None:
    source = (
        f'"""{LONG}"""\n'
        "if True:\n    try:\n"
        f'        class A:\n            """{LONG}"""\n            def short(self):\n                "short"\n'
        "            async def f(self):\n"
        f'                """First.\n\n                {LONG}\n                """\n'
        "    finally:\n        pass\n"
        r"x = '\d'"
    )
    text = titled_docstrings("pack/__init__.py", source)
    long = LONG.strip()
    assert text == (
        f"pack\n====\n\n{long}\n\n\npack.A\n======\n\n{long}\n\n\npack.A.f\n========\n\nFirst.\n\n{long}"
    )
    assert titled_docstrings("m.py", "def f():\n    'short'\n") == ""


def test_topics_are_sorted_prose() -> None:
    topics = list(read_topics())
    assert [name for name, _ in topics] == sorted(name for name, _ in topics)
    assert len(topics) > 50
    assert "lambda" in dict(topics)["lambda"]
