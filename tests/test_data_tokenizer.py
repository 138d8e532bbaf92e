import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.config import BpeTokenizer, ByteTokenizer, FileTokenizer
from moesaic.data.errors import DataError
from moesaic.data.tokenizer import (
    ABOUT_FILE,
    CONTENT_FILE,
    MARK,
    Bpe,
    Bytes,
    Tokenizer,
    expected_vocab,
    read_tokenizer,
    train_bpe,
)

TEXTS = [f"def function_{i}(self, value):\n    return value + {i}\n\n" for i in range(200)]
WEIRD = [
    "",
    " ",
    "\r\n\t\x00\x7f",
    "na\u00efve \u4f60\u597d \U0001f469\u200d\U0001f4bb e\u0301 \u202e\ufeff\uffff",
    MARK,
    f"a{MARK}{MARK}\n b",
    "   trailing   \n\n\n",
]


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def wordpiece() -> str:
    """A tokenizer.json of another family, with what a user's file may have: padding, a normalizer."""
    vocab = {"[UNK]": 0, "hello": 1, "##s": 2, "world": 3}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[UNK]",
            },
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": vocab,
            },
        }
    )


@pytest.mark.parametrize("text", WEIRD)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip_is_exact_and_bytes_are_counted(bpe: Bpe, kind: str, text: str) -> None:
    tokenizer = bpe if kind == "bpe" else Bytes()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.mark not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text: str) -> None:
    tokenizer = _small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


_SMALL: list[Bpe] = []


def _small() -> Bpe:
    """hypothesis wants no function-scoped fixtures."""
    if not _SMALL:
        _SMALL.append(train_bpe(TEXTS, 300))
    return _SMALL[0]


def test_batch_equals_one_by_one(bpe: Bpe) -> None:
    for one, many in zip(map(bpe.encode, WEIRD), bpe.encode_batch(WEIRD), strict=True):
        np.testing.assert_array_equal(one, many)


def test_bpe_compresses_and_is_deterministic(bpe: Bpe) -> None:
    assert len(bpe.encode(TEXTS[7])) < len(TEXTS[7]) / 3
    again = train_bpe(iter(TEXTS), 320)
    assert again.digest == bpe.digest
    assert train_bpe(TEXTS[:100], 320).digest != bpe.digest


def test_mark_decodes_to_nothing_and_has_no_bytes(bpe: Bpe) -> None:
    for tokenizer in (bpe, Bytes()):
        ids = [tokenizer.mark, *tokenizer.encode("ab"), tokenizer.mark]
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.token_bytes()[tokenizer.mark] == 0


def test_decode_never_raises(bpe: Bpe) -> None:
    assert Bytes().decode([0xE4, 0xBD, 300, -1, 65, 10**12]) == "\ufffdA"
    half = bpe.encode("\u4f60")[:1]
    assert bpe.decode([*half, -5, 319, 10**12, *bpe.encode("x")]).endswith("x")
    assert "\ufffd" in bpe.decode(half)


def test_half_a_surrogate_pair_is_refused(bpe: Bpe) -> None:
    for tokenizer in (bpe, Bytes()):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            tokenizer.encode("\ud800")


def test_table_keeps_its_size_when_the_corpus_is_tiny() -> None:
    tokenizer = train_bpe(["ab"], 1000)
    assert tokenizer.vocab == 1000
    assert tokenizer.token_bytes().shape == (1000,)
    assert tokenizer.token_bytes()[300:].sum() == 0
    assert tokenizer.decode([999]) == ""


def test_no_merge_at_the_smallest_vocab() -> None:
    tokenizer = train_bpe(TEXTS, 257)
    assert tokenizer.vocab == 257
    assert len(tokenizer.encode("\u4f60a")) == 4


def test_save_and_load(bpe: Bpe, tmp_path: Path) -> None:
    for i, tokenizer in enumerate((bpe, Bytes(), train_bpe(["ab"], 1000))):
        tokenizer.save(tmp_path / str(i))
        back = Tokenizer.load(tmp_path / str(i))
        assert type(back) is type(tokenizer)
        for field in ("vocab", "mark", "name", "digest"):
            assert getattr(back, field) == getattr(tokenizer, field)
        np.testing.assert_array_equal(back.encode(WEIRD[3]), tokenizer.encode(WEIRD[3]))


def test_load_refuses_what_is_missing_or_damaged(bpe: Bpe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{ABOUT_FILE}: no tokenizer can be read"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    content = (tmp_path / CONTENT_FILE).read_text()
    (tmp_path / CONTENT_FILE).write_text(content.replace("ByteLevel", "Bytelevel", 1))
    with pytest.raises(DataError, match=f"{CONTENT_FILE}: damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / CONTENT_FILE).write_text(content[:99])
    with pytest.raises(DataError, match="no tokenizer can be read"):
        Tokenizer.load(tmp_path)


def test_file_without_mark_gets_it_as_a_new_id(wordpiece: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(wordpiece)
    tokenizer = read_tokenizer(path)
    assert (tokenizer.vocab, tokenizer.mark, tokenizer.name) == (5, 4, "file:tokenizer.json")
    ids = tokenizer.encode("Hellos world hello hello")
    assert ids.tolist() == [1, 2, 3, 1, 1]  # neither truncated nor padded
    assert tokenizer.decode([4, *ids]) == "hellos world hello hello"
    assert tokenizer.token_bytes().tolist() == [5, 5, 1, 5, 0]
    assert 4 not in tokenizer.encode(MARK)


def test_file_with_mark_keeps_its_id(bpe: Bpe, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    tokenizer = read_tokenizer(tmp_path / CONTENT_FILE)
    assert (tokenizer.vocab, tokenizer.mark) == (320, bpe.mark)
    np.testing.assert_array_equal(tokenizer.token_bytes(), bpe.token_bytes())


def test_ids_with_holes_are_refused(wordpiece: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(wordpiece.replace('"world": 3', '"world": 7'))
    with pytest.raises(DataError, match="ids have holes"):
        read_tokenizer(path).encode("hello")


def test_expected_vocab(wordpiece: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(wordpiece)
    assert expected_vocab(BpeTokenizer(vocab=999)) == 999
    assert expected_vocab(ByteTokenizer()) == 257
    assert expected_vocab(FileTokenizer(path=str(path))) == 5


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"model": {"vocab": 3}}', b"\xff"])
def test_bad_tokenizer_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: .*mine\.json: "):
        expected_vocab(FileTokenizer(path=str(path)))


def test_file_that_only_looks_like_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"model": {"type": "Nonsense", "vocab": {"a": 0}}}')
    with pytest.raises(DataError, match=r"file:mine\.json: not a tokenizer.json"):
        read_tokenizer(path).encode("a")


def test_digest_depends_on_everything_that_decides_ids(bpe: Bpe) -> None:
    content = bpe._content
    assert Bpe(content, name="other", vocab=320).digest == bpe.digest
    assert Bpe(content, name="other", vocab=400).digest != bpe.digest
    assert len({bpe.digest, Bytes().digest, hashlib.sha256(content.encode()).hexdigest()}) == 3


def test_library_is_not_loaded_before_the_first_text(bpe: Bpe, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from moesaic.data.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load(Path({str(tmp_path)!r})); assert t.vocab == 320\n"
        "assert not {'tokenizers', 'torch'} & set(sys.modules)\n"
        "t.encode('a'); assert 'tokenizers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
