import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.data.config import JsonlData, PythonData, TextData
from moesaic.data.corpora import Document, Source, cut, list_sources, read
from moesaic.data.errors import DataError


def digested(source: Source) -> Source:
    content = Path(source.path).read_bytes()
    return replace(source, size=len(content), digest=hashlib.sha256(content).hexdigest())


def documents(source: Source) -> tuple[list[Document], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    return list(read(digested(source), lambda name, reason: skipped.append((name, reason)))), skipped


def never(name: str, reason: str) -> None:
    pytest.fail(f"{name}: {reason}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.md", ".git/config", "sub/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n")
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("",), ["a.txt", "b.txt", "sub/c.md"]),
        (("b.txt",), ["b.txt"]),
        (("*.txt",), ["a.txt", "b.txt"]),
        (("**/*.md",), ["sub/c.md"]),
        (("b.txt", "*.txt", "sub"), ["a.txt", "b.txt", "c.md"]),
    ],
)
def test_files_folders_and_patterns(tree: Path, paths: tuple[str, ...], names: list[str]) -> None:
    sources = list_sources(TextData(path=tuple(f"{tree}/{path}" for path in paths)))
    assert [source.name for source in sources] == names


def test_relative_paths(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert [source.name for source in list_sources(TextData(path="*.txt"))] == ["a.txt", "b.txt"]
    assert [source.name for source in list_sources(TextData(path="."))] == ["a.txt", "b.txt", "sub/c.md"]


def test_names_stay_unique_over_roots(tree: Path) -> None:
    (tree / "other").mkdir()
    (tree / "other" / "c.md").write_text("another")
    sources = list_sources(TextData(path=(f"{tree}/sub", f"{tree}/other")))
    assert [(source.name, Path(source.path).parent.name) for source in sources] == [
        ("c.md", "sub"),
        ("c.md~2", "other"),
    ]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert [source.name for source in list_sources(TextData(path=f"{tmp_path}/a[1].txt"))] == ["a[1].txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none.txt", r"data\.path: .*none\.txt: no such file or folder"),
        ("{}/*.nothing", r"data\.path: .*\*\.nothing: no file there matches"),
        ("{}/empty", r"data\.path: .*empty: no file there matches"),
        ((), r"data\.path: names no file"),
    ],
)
def test_missing_paths_are_named(tree: Path, path: str | tuple[str, ...], message: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        list_sources(TextData(path=path.format(tree) if isinstance(path, str) else path))


def test_text_is_kept_to_the_byte(tree: Path) -> None:
    (source, *_) = list_sources(TextData(path=str(tree)))
    found, skipped = documents(source)
    key = hashlib.sha256(b"text of a.txt\r\n").hexdigest()
    assert found == [Document("a.txt", "text", "text of a.txt\r\n", key)]
    assert not skipped


def test_undecodable_and_empty_files(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"ok \xff\xfe")
    empty.write_text(" \n ")
    found, skipped = documents(Source("bad.txt", str(bad), "text"))
    assert found == []
    assert [name for name, _ in skipped] == [str(bad)]
    assert "not UTF-8" in skipped[0][1]
    assert documents(Source("empty.txt", str(empty), "text")) == ([], [])


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = digested(Source("a.txt", str(path), "text"))
    path.write_text("two")
    with pytest.raises(DataError, match="changed while it was being prepared; start again"):
        list(read(source, lambda *_: None))


LINES = [
    json.dumps({"text": "first \u4f60"}, ensure_ascii=False),
    "",
    '{"text": "second", "id": 2}',
    '{"text": "  "}',
    '{"text": "fifth"}',
]


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("size", [1, 2, 7, 19, 20, 21, 1000])
def test_ranges_of_a_jsonl_file_give_each_line_once(tmp_path: Path, size: int, end: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES) + end, encoding="utf-8")
    (source,) = list_sources(JsonlData(path=str(path)))
    pieces = cut(digested(source), size)
    assert len(pieces) == -(-path.stat().st_size // size)
    found = [d for piece in pieces for d in read(piece, never)]
    assert [d.text for d in found] == ["first \u4f60", "second", "fifth"]
    offsets = [path.read_bytes().index(LINES[i].encode()) for i in (0, 2, 4)]
    assert [d.name for d in found] == [f"a.jsonl@{offset}" for offset in offsets]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no text under data.field = 'text' (it is a list)"),
        (b'{"body": "x", "id": 1}', "no text under data.field = 'text' (its keys are ['body', 'id'])"),
        (b'{"text": 3}', "no text under data.field = 'text'"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(LINES).encode() + b"\n" + line + b'\n{"text": "last"}\n')
    (source,) = list_sources(JsonlData(path=str(path)))
    skipped: list[tuple[str, str]] = []
    for size in (13, 10**6):
        skipped.clear()
        pieces = cut(digested(source), size)
        found = [d for p in pieces for d in read(p, lambda name, why: skipped.append((name, why)))]
        assert found[-1].text == "last"
        assert [name for name, _ in skipped] == [f"{path}: line 6"]
        assert reason in skipped[0][1]


def test_jsonl_folder_and_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "readme.txt").write_text("not data")
    (source,) = list_sources(JsonlData(path=str(tmp_path), field="body"))
    assert [d.text for d in read(cut(digested(source), 99)[0], never)] == ["x"]


def test_python_files_are_code_and_prose(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text('"""' + "Long words. " * 20 + '"""\nx = 1\n')
    found, _ = documents(Source("p/m.py", str(path), "python+prose"))
    assert [(d.name, d.domain) for d in found] == [("p/m.py", "code"), ("p/m.py#docstrings", "prose")]
    assert found[0].text == path.read_text()
    assert found[0].key == found[1].key  # so both are on the same side of the split
    assert [d.domain for d in documents(Source("p/m.py", str(path), "python"))[0]] == ["code"]


def test_python_that_does_not_parse_is_code_without_prose(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("print 'python 2'\n")
    found, skipped = documents(Source("m.py", str(path), "python+prose"))
    assert [d.domain for d in found] == ["code"]
    assert skipped[0][0] == str(path)
    assert "cannot be parsed as Python" in skipped[0][1]


def test_topics_are_documents() -> None:
    sources = {source.name: source for source in list_sources(PythonData())}
    found, skipped = documents(sources["pydoc_data/topics.py"])
    assert not skipped
    topic = next(d for d in found if d.name == "pydoc_data/topics.py#assert")
    assert topic.domain == "prose"
    assert '"assert" statement' in topic.text
    assert "pydoc_data/topics.py" not in {source.name for source in list_sources(PythonData(prose=False))}
