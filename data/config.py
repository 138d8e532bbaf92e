"""Which text to train on and how it becomes sequences of tokens. `kind` selects the corpus."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BpeTokenizer:
    """Byte-level BPE, trained on the corpus itself and cached by content."""

    kind: Literal["bpe"] = "bpe"
    vocab: int = 4096
    """Number of tokens, the document mark included."""

    def __post_init__(self) -> None:
        if self.vocab < 257:
            raise ValueError(f"vocab: {self.vocab} is below 257 (every byte and the document mark)")


@dataclass(frozen=True, kw_only=True)
class FileTokenizer:
    """A `tokenizer.json` of the tokenizers library."""

    kind: Literal["file"] = "file"
    path: str
    """The file."""


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """Every byte is a token."""

    kind: Literal["bytes"] = "bytes"


TokenizerConfig = BpeTokenizer | FileTokenizer | ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What every corpus needs to become sequences."""

    seq_len: int = 256
    """Tokens per sequence."""
    tokenizer: TokenizerConfig = field(default_factory=BpeTokenizer)
    mask_documents: bool = True
    """Attention does not look across the start of a document."""
    eval_fraction: float = 0.02
    """Share of the documents held out, chosen by the hash of their content."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file that is not UTF-8 or cannot be parsed: stop and name it, or skip it and say so."""
    cache: str | None = None
    """Folder of prepared corpora. None: `$MOESAIC_CACHE`, else `~/.cache/moesaic`."""
    workers: int | None = None
    """Processes that prepare. None: one per core."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len: {self.seq_len} is below 2")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: {self.eval_fraction} is not between 0 and 1")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: {self.workers} is not positive")


@dataclass(frozen=True, kw_only=True)
class PythonData(Sequences):
    """Sources and documentation that every Python installation carries: no download."""

    kind: Literal["python"] = "python"
    packages: tuple[str, ...] = ()
    """Installed packages to read besides the standard library, such as torch or sympy."""
    prose: bool = True
    """Add documentation prose: the topics of `pydoc` and long docstrings."""


@dataclass(frozen=True, kw_only=True)
class TextData(Sequences):
    """Text files; each file is a document."""

    kind: Literal["text"] = "text"
    path: str | tuple[str, ...]
    """Files, folders or glob patterns."""


@dataclass(frozen=True, kw_only=True)
class JsonlData(Sequences):
    """JSON lines; each line is a document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str | tuple[str, ...]
    """Files, folders or glob patterns."""
    field: str = "text"
    """Key of the text within a line."""


DataConfig = PythonData | TextData | JsonlData
