"""Which text to train on and how it becomes sequences of tokens. `kind` selects the corpus.

A corpus says where text comes from; its `...Data` adds how that becomes sequences. A mixture says the latter once, for
all of its parts.
"""

import re
from dataclasses import dataclass, field, fields
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
    mark: str | None = None
    """The token in it that starts every document, such as `<|endoftext|>`. None: `<|doc|>`, added where missing."""


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """Every byte is a token."""

    kind: Literal["bytes"] = "bytes"


TokenizerConfig = BpeTokenizer | FileTokenizer | ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What every corpus needs to become sequences."""

    seq_len: int = 256
    """Tokens per sequence."""
    mask_documents: bool = True
    """Attention does not look across the start of a document."""
    eval_fraction: float = 0.02
    """Share of the documents held out, chosen by the hash of their content."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file or document that cannot be read: stop and name it, or skip it and say so."""
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
class Sequences(Windows):
    """What every corpus of text needs besides: a tokenizer."""

    tokenizer: TokenizerConfig = field(default_factory=BpeTokenizer)
    """What turns text into ids."""


@dataclass(frozen=True, kw_only=True)
class PythonCorpus:
    """Sources and documentation that every Python installation carries: no download."""

    kind: Literal["python"] = "python"
    packages: tuple[str, ...] = ()
    """Installed packages to read besides the standard library, such as torch or sympy."""
    prose: bool = True
    """Add documentation prose: the topics of `pydoc` and long docstrings."""


@dataclass(frozen=True, kw_only=True)
class TextCorpus:
    """Text files; each file is a document."""

    kind: Literal["text"] = "text"
    path: str | tuple[str, ...]
    """Files, folders or glob patterns."""


@dataclass(frozen=True, kw_only=True)
class JsonlCorpus:
    """JSON lines; each line is a document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str | tuple[str, ...]
    """Files, folders or glob patterns."""
    field: str = "text"
    """Key of the text within a line."""


@dataclass(frozen=True, kw_only=True)
class ParquetCorpus:
    """Parquet files; each row is a document. Needs `pip install 'moesaic[data]'`."""

    kind: Literal["parquet"] = "parquet"
    path: str | tuple[str, ...]
    """Files, folders or glob patterns."""
    column: str = "text"
    """The column of text."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceCorpus:
    """A dataset of the datasets library; each row is a document. Needs `pip install 'moesaic[data]'`.

    One of `path` and `name` says which.
    """

    kind: Literal["huggingface"] = "huggingface"
    path: str | None = None
    """A folder that `save_to_disk` wrote, or one of data files that `load_dataset` reads."""
    name: str | None = None
    """A dataset of the hub, as `owner/name`; downloaded at its first use."""
    subset: str | None = None
    """One of the dataset's configurations. None: its default."""
    split: str = "train"
    """One of its splits, or several as `a+b`."""
    revision: str | None = None
    """Commit or tag of a dataset of the hub. None: the newest."""
    column: str = "text"
    """The column of text."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.name is None):
            raise ValueError("path: give either path (a folder) or name (a dataset of the hub)")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision: a folder has none; leave it out, or give name instead of path")
        if "[" in self.split:
            raise ValueError(f"split: {self.split!r} is a slice; give whole splits, such as 'train'")


@dataclass(frozen=True, kw_only=True)
class TokensCorpus:
    """Text that is tokenized already: flat files of token ids, read where they are and never copied."""

    kind: Literal["tokens"] = "tokens"
    path: str | tuple[str, ...]
    """Files, folders (their `*.bin`) or glob patterns."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the ids, little-endian, without a header."""
    mark: int
    """Id that starts (or ends) every document."""
    vocab: int | None = None
    """Number of ids; every id is below it. None: the tokenizer's."""
    eval_path: str | tuple[str, ...] | None = None
    """Files of held-out tokens. None: `eval_fraction` of the documents in `path`."""

    def __post_init__(self) -> None:
        if self.mark < 0:
            raise ValueError(f"mark: {self.mark} is negative")
        if self.dtype == "uint16" and max(self.mark, (self.vocab or 1) - 1) > 65535:
            raise ValueError(
                f"dtype: uint16 holds no id of 65536 or more (mark = {self.mark}, vocab = {self.vocab})"
            )
        if self.vocab is not None and not self.mark < self.vocab:
            raise ValueError(f"vocab: {self.vocab} leaves no room for mark = {self.mark}")


Corpus = PythonCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | HuggingFaceCorpus | TokensCorpus


@dataclass(frozen=True, kw_only=True)
class PythonData(PythonCorpus, Sequences):
    __doc__ = PythonCorpus.__doc__


@dataclass(frozen=True, kw_only=True)
class TextData(TextCorpus, Sequences):
    __doc__ = TextCorpus.__doc__


@dataclass(frozen=True, kw_only=True)
class JsonlData(JsonlCorpus, Sequences):
    __doc__ = JsonlCorpus.__doc__


@dataclass(frozen=True, kw_only=True)
class ParquetData(ParquetCorpus, Sequences):
    __doc__ = ParquetCorpus.__doc__


@dataclass(frozen=True, kw_only=True)
class HuggingFaceData(HuggingFaceCorpus, Sequences):
    __doc__ = HuggingFaceCorpus.__doc__

    def __post_init__(self) -> None:
        HuggingFaceCorpus.__post_init__(self)
        Sequences.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class TokensData(TokensCorpus, Windows):
    __doc__ = TokensCorpus.__doc__

    tokenizer: FileTokenizer | ByteTokenizer | None = None
    """What the ids were made with: for samples, and for bits per byte, which is not reported without."""

    def __post_init__(self) -> None:
        TokensCorpus.__post_init__(self)
        Windows.__post_init__(self)
        if self.vocab is None and self.tokenizer is None:
            raise ValueError(
                "vocab: missing; give the number of ids, or the tokenizer that they were made with"
            )


TextDataConfig = PythonData | TextData | JsonlData | ParquetData | HuggingFaceData


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a mixture."""

    weight: float
    """Share of the training sequences that are of this part, in proportion to the other weights."""
    data: Corpus
    """Where its text comes from."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight: {self.weight} is not positive; to leave the part out, remove it")


@dataclass(frozen=True, kw_only=True)
class MixtureData(Windows):
    """Several corpora at once; of each, as many sequences as its weight says."""

    kind: Literal["mixture"] = "mixture"
    parts: dict[str, Part]
    """The corpora, by a name of your choice."""
    tokenizer: TokenizerConfig | None = field(default_factory=BpeTokenizer)
    """One for all parts. `bpe` is trained on their text in proportion to the weights, so other weights give another
    tokenizer; a file keeps it. None: all parts are tokens, and what made them is not known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("parts: names no part")
        for name, part in self.parts.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"parts: {name!r} is no name of a part; use letters, digits, _ and -")
            if not isinstance(part.data, TokensCorpus):
                if self.tokenizer is None:
                    raise ValueError(f"tokenizer: missing, and part {name} is text")
            elif isinstance(self.tokenizer, BpeTokenizer):
                raise ValueError(
                    f"tokenizer: bpe would be trained here, but part {name} is tokens already; "
                    "give their own (kind: file or bytes)"
                )
            elif self.tokenizer is None and part.data.vocab is None:
                raise ValueError(f"parts.{name}.data.vocab: missing, and the mixture has no tokenizer")
        marks = {part.data.mark for part in self.parts.values() if isinstance(part.data, TokensCorpus)}
        if len(marks) > 1:
            raise ValueError(
                f"parts: documents start with different ids ({sorted(marks)}); give all one data.mark"
            )

    def part(self, name: str) -> "TextDataConfig | TokensData":
        """The part as a corpus of its own, under the mixture's options."""
        corpus = self.parts[name].data
        options = {each.name: getattr(self, each.name) for each in fields(Sequences)}
        own = {each.name: getattr(corpus, each.name) for each in fields(corpus)}
        return _DATA[type(corpus)](**options, **own)


_DATA: dict[type[Corpus], type[TextDataConfig] | type[TokensData]] = {
    PythonCorpus: PythonData,
    TextCorpus: TextData,
    JsonlCorpus: JsonlData,
    ParquetCorpus: ParquetData,
    HuggingFaceCorpus: HuggingFaceData,
    TokensCorpus: TokensData,
}

DataConfig = TextDataConfig | TokensData | MixtureData
