"""Text to token ids and back, exactly: byte-level BPE, a user's `tokenizer.json`, plain bytes, or ids without text.

Every tokenizer has one id that no text can produce, the document mark, which starts every document. The
library `tokenizers` is loaded on the first text, not on import: a run with a prepared corpus reads ids only.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsInt, runtime_checkable

import numpy as np

from moesaic.data.config import BpeTokenizer, ByteTokenizer, FileTokenizer, TokenizerConfig
from moesaic.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

MARK = "<|doc|>"
CONTENT_FILE, ABOUT_FILE = "tokenizer.json", "about_tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of moesaic knows about a tokenizer."""

    vocab: int
    """Rows of the embedding table: every id is below it. A tiny corpus may leave ids without a text."""
    mark: int
    """Id of the document mark, which starts every document and decodes to nothing."""
    name: str
    """For people, such as `bpe-4096`."""
    digest: str
    """sha256 of everything that decides which ids a text gets."""

    def encode(self, text: str) -> np.ndarray:
        """Ids (int64) of the text, without a mark. DataError where the text is not valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on several threads unless TOKENIZERS_PARALLELISM is false."""
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of any ids. Never raises: bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        ...

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes each id stands for, int64 (vocab,), the mark 0; exact for bytes and byte-level BPE.

        None where it is not known what ids stand for.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer into the folder, made if needed; `Tokenizer.load` reads it back."""
        ...

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """The tokenizer saved in the folder. DataError where it is missing or damaged."""
        return load_tokenizer(folder)


class Bytes(Tokenizer):
    """Every byte is a token, and 256 is the mark."""

    def __init__(self) -> None:
        self.vocab, self.mark, self.name = 257, 256, "bytes"
        self.digest = hashlib.sha256(b"moesaic bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        except UnicodeEncodeError as error:
            raise _not_unicode() from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0])

    def save(self, folder: Path) -> None:
        _save(folder, {"kind": "bytes", "digest": self.digest})


class Ids(Tokenizer):
    """Ids of which nothing is known but how many there are and which one is the mark."""

    def __init__(self, vocab: int, mark: int) -> None:
        self.vocab, self.mark, self.name = vocab, mark, f"ids-{vocab}"
        self.digest = hashlib.sha256(f"moesaic ids {vocab} {mark}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        raise DataError(
            "data.tokenizer: missing, so text has no tokens here; name the tokenizer.json that made them"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return " ".join(str(i) for i in map(int, ids) if i != self.mark)

    def token_bytes(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        _save(folder, {"kind": "ids", "vocab": self.vocab, "mark": self.mark, "digest": self.digest})


class Bpe(Tokenizer):
    """A `tokenizer.json`, trained here or brought along. Texts that spell the mark are ordinary text."""

    def __init__(self, content: str, *, name: str, vocab: int | None = None, mark: str = MARK) -> None:
        """`mark` is added where the content lacks it, if it is ours. A larger `vocab` leaves ids without text."""
        self._content, self._mark = content, mark
        self.name = name
        self.vocab, self.mark = _vocab_and_mark(content, mark)
        self.vocab = max(self.vocab, vocab or 0)
        self.digest = hashlib.sha256(f"{self.vocab} {self.mark} {content}".encode()).hexdigest()

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        from tokenizers import AddedToken, Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self._content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{self.name}: not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens([AddedToken(self._mark, special=True, normalized=False)])
        if tokenizer.token_to_id(self._mark) != self.mark:
            raise DataError(
                f"{self.name}: its ids have holes, so {self._mark} cannot be appended; add {self._mark} to it"
            )
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _not_unicode() from error
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._library.decode([i for i in map(int, ids) if 0 <= i < self.vocab])

    def token_bytes(self) -> np.ndarray:
        content = json.loads(self._content)
        byte_level = '"type": "ByteLevel"' in json.dumps(
            [content.get("pre_tokenizer"), content.get("decoder")]
        )
        lengths = np.zeros(self.vocab, np.int64)
        for text, i in self._library.get_vocab(with_added_tokens=False).items():
            if byte_level:
                lengths[i] = len(text)
            elif re.fullmatch("<0x[0-9A-F]{2}>", text):
                lengths[i] = 1
            else:
                lengths[i] = len(text.removeprefix("##").replace("\u2581", " ").encode())
        for i, token in self._library.get_added_tokens_decoder().items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        return lengths

    def save(self, folder: Path) -> None:
        about = {"kind": "bpe", "name": self.name, "vocab": self.vocab, "digest": self.digest}
        _save(folder, about if self._mark == MARK else about | {"mark": self._mark})
        (folder / CONTENT_FILE).write_text(self._content, encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab: int) -> Bpe:
    """Byte-level BPE with at most `vocab` ids in use, every byte and the mark among them. Deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Bpe(tokenizer.to_str(), name=f"bpe-{vocab}", vocab=vocab)


def read_tokenizer(path: Path, *, mark: str | None = None, vocab: int | None = None) -> Bpe:
    """The tokenizer of a `tokenizer.json`, `<|doc|>` appended where it has none. DataError names the file.

    `mark` names another token of it that starts documents; `vocab` asks for more ids than it has.
    """
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # no file, no text, the home of nobody
        raise DataError(f"data.tokenizer.path: {path}: cannot be read ({error})") from error
    try:
        return Bpe(content, name=f"file:{path.name}", vocab=vocab, mark=mark or MARK)
    except DataError as error:
        raise DataError(f"data.tokenizer.path: {path}: {error}") from error


def expected_vocab(config: TokenizerConfig) -> int:
    """Rows of the embedding table for this tokenizer, known without reading the corpus."""
    if isinstance(config, BpeTokenizer):
        return config.vocab
    return given_tokenizer(config).vocab


def given_tokenizer(config: FileTokenizer | ByteTokenizer) -> Tokenizer:
    """The tokenizer, which does not depend on the corpus."""
    if isinstance(config, ByteTokenizer):
        return Bytes()
    return read_tokenizer(Path(config.path), mark=config.mark)


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `save` wrote. DataError names the file that is missing or damaged."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        if about["kind"] == "bytes":
            tokenizer = Bytes()
        elif about["kind"] == "ids":
            tokenizer = Ids(about["vocab"], about["mark"])
        else:
            content = (folder / CONTENT_FILE).read_text(encoding="utf-8")
            tokenizer = Bpe(content, name=about["name"], vocab=about["vocab"], mark=about.get("mark", MARK))
        digest = about["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / ABOUT_FILE}: no tokenizer can be read there ({error})") from error
    if tokenizer.digest != digest:
        raise DataError(f"{folder / CONTENT_FILE}: damaged, its sha256 is not the one it was saved with")
    return tokenizer


def _save(folder: Path, about: dict[str, str | int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _vocab_and_mark(content: str, mark: str) -> tuple[int, int]:
    """Number of ids and the mark's id, read from the JSON: counting needs no library."""
    try:
        parsed = json.loads(content)
        pieces = parsed["model"]["vocab"]
        ids = {piece[0]: i for i, piece in enumerate(pieces)} if isinstance(pieces, list) else dict(pieces)
        added = {token["content"]: int(token["id"]) for token in parsed.get("added_tokens") or []}
        ids |= added
        highest = max(ids.values(), default=-1)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"not a tokenizer.json of the tokenizers library ({error!r})") from error
    if mark in ids:
        return highest + 1, ids[mark]
    if mark != MARK:
        special = [name for name in added if name.startswith("<")][:8]
        raise DataError(
            f"holds no token {mark!r} (data.tokenizer.mark); special tokens: {', '.join(special)}"
        )
    return highest + 2, highest + 1


def _not_unicode() -> DataError:
    return DataError("the text is not valid Unicode: it holds half of a surrogate pair; remove it")
