"""Tokens to batches. The order of samples is a pure function of (seed, step), whatever the number of ranks.

A window is `seq_len + 1` consecutive tokens at stride `seq_len`: its inputs, and its targets one further on.
An epoch visits every window once, in an order that a keyed permutation computes without a table, so the
loader has no state besides the step. Knows nothing of files, tokenizers or process groups.

Dims: B rows of a batch, S tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moesaic.data.errors import DataError

ROUNDS = 8
WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Batch:
    """Rows of one step, or of one micro-batch of it. All int64, on the CPU."""

    tokens: Int[Tensor, "B S"]
    targets: Int[Tensor, "B S"]
    """The next token; -1 is padding, which no loss counts."""
    documents: Int[Tensor, "B S"]
    """Index of the token's document within its row, from 0."""
    rows: Int[Tensor, "B"]
    """Index of the row within the step's global batch: `rows * S + s` is the global token index."""
    samples: Int[Tensor, "B"]
    """Which window of the corpus the row is."""
    cuts: tuple[int, ...] | None = None
    """Rows of each micro-batch, where the loader fixed them."""

    @property
    def num_targets(self) -> int:
        """Targets that count."""
        return int((self.targets >= 0).sum())

    def split(self, micro_batches: int) -> "list[Batch]":
        """The rows in order, in `micro_batches` parts: as the loader cut them, else as equal as can be."""
        if not 1 <= micro_batches <= len(self.rows):
            raise ValueError(
                f"micro_batches: {micro_batches} is not in 1..{len(self.rows)}, the number of rows"
            )
        fields = (self.tokens, self.targets, self.documents, self.rows, self.samples)
        if self.cuts is not None and len(self.cuts) == micro_batches:
            split = [field.split(self.cuts) for field in fields]
        else:
            split = [field.tensor_split(micro_batches) for field in fields]
        return [Batch(*parts) for parts in zip(*split, strict=True)]

    def share(self, rank: int, ranks: int) -> "Batch":
        """The rows of one rank; where there are more ranks than rows, a row of padding for those without."""
        first, end = rank * len(self.rows) // ranks, (rank + 1) * len(self.rows) // ranks
        empty = first == end
        rows = slice(0, 1) if empty else slice(first, end)
        fields = (self.tokens, self.targets, self.documents, self.rows, self.samples)
        tokens, targets, documents, numbers, samples = (field[rows] for field in fields)
        return Batch(tokens, torch.full_like(targets, -1) if empty else targets, documents, numbers, samples)


class Stream(Protocol):
    """Token ids in one sequence: an array, or what reads like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: Any, /) -> np.ndarray:
        """The ids at an array of positions, or in a slice of step 1."""
        ...


class Batches(Protocol):
    """Where the batches of a run come from."""

    def batch(self, step: int) -> Batch:
        """The rows of this rank at this step: a pure function of (seed, step)."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the corpus completed before this step."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """All that decides the order from `step` on, ready for JSON; of equal state, equal batches."""
        ...


class Loader(Batches):
    """Training batches for one rank out of `ranks`.

    The step's rows form equal micro-batches, in order, and each rank has a contiguous share of every one: a micro-batch
    holds the same rows over any number of ranks.
    """

    def __init__(
        self,
        tokens: Stream,
        *,
        mark: int,
        seq_len: int,
        sequences: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batches: int = 1,
    ) -> None:
        """`sequences` is the number of rows of the global batch. DataError where there is no window."""
        self.rows, self.cuts = rows_of(sequences, rank=rank, ranks=ranks, micro_batches=micro_batches)
        self.num_windows = (len(tokens) - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"data.seq_len: {seq_len} needs {seq_len + 1} tokens, the training text has {len(tokens)}; "
                "give a smaller data.seq_len or more text"
            )
        self.tokens = np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens
        self.mark, self.seq_len = mark, seq_len
        self.sequences, self.seed = sequences, seed

    def batch(self, step: int) -> Batch:
        windows = self.windows(step * self.sequences + self.rows)
        ids = self.read(windows)
        return make_batch(ids, mark=self.mark, rows=self.rows, samples=windows, cuts=self.cuts)

    def windows(self, samples: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """Which window each sample of the run is."""
        epochs, positions = np.divmod(samples, self.num_windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(positions[chosen], self.num_windows, seed=self.seed, epoch=int(epoch))
        return windows

    def read(self, windows: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B L"]:
        """The seq_len + 1 tokens of each window."""
        at = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return self.tokens[at].astype(np.int64)

    def epoch(self, step: int) -> float:
        return step * self.sequences / self.num_windows

    def state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "seed": self.seed,
            "sequences": self.sequences,
            "seq_len": self.seq_len,
            "tokens": len(self.tokens),
        }


def rows_of(
    sequences: int, *, rank: int, ranks: int, micro_batches: int
) -> tuple[Int[np.ndarray, " B"], tuple[int, ...]]:
    """The rank's contiguous share of the rows of every micro-batch, and its size. DataError where it is empty."""
    if sequences % micro_batches or not 0 <= rank < ranks <= sequences // micro_batches:
        raise DataError(
            f"rank {rank} of {ranks} ranks gets no row of one of {micro_batches} micro-batches of "
            f"{sequences} sequences"
        )
    micro = sequences // micro_batches
    first, end = rank * micro // ranks, (rank + 1) * micro // ranks
    rows = np.arange(micro_batches)[:, None] * micro + np.arange(first, end)
    return rows.flatten(), (end - first,) * micro_batches


def eval_batches(
    tokens: Stream, *, mark: int, seq_len: int, sequences: int, limit_tokens: int
) -> Iterator[Batch]:
    """Windows in order, `sequences` a batch, up to `limit_tokens` targets; the last window is padded.

    Padding has target -1 and the mark as token. The last batch may have fewer rows.
    """
    count = min(len(tokens), limit_tokens + 1)
    if count < 2:
        raise DataError(
            f"the held-out text has {count} tokens, evaluation needs 2; "
            "give more text or a larger data.eval_fraction"
        )
    num_windows = -(-(count - 1) // seq_len)
    for first in range(0, num_windows, sequences):
        windows = np.arange(first, min(first + sequences, num_windows))
        at = windows[:, None] * seq_len + np.arange(seq_len + 1)  # (B, S + 1)
        inside = at < count
        ids = np.where(inside, tokens[np.minimum(at, count - 1)].astype(np.int64), mark)
        batch = make_batch(ids, mark=mark, rows=windows - first, samples=windows)
        batch.targets[torch.from_numpy(~inside[:, 1:])] = -1
        yield batch


def permute(positions: np.ndarray, count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(count), keyed by (seed, epoch), sends the positions.

    A balanced Feistel network on the next even number of bits; results beyond `count` walk on along their
    cycle (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    if count == 1:
        return np.zeros_like(positions)
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = [_mix(_mix(_mix(seed & WORD) ^ epoch) + r & WORD) for r in range(ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= count).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
    return left << bits | right


def _mix(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on 64 bits."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def _mix_array(words: np.ndarray) -> np.ndarray:
    """`_mix` of each word; array arithmetic wraps around."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def make_batch(
    ids: Int[np.ndarray, "B L"],
    *,
    mark: int,
    rows: np.ndarray,
    samples: np.ndarray,
    cuts: tuple[int, ...] | None = None,
) -> Batch:
    """Inputs, targets and documents of rows of L = S + 1 tokens."""
    tokens, targets = ids[:, :-1].copy(), ids[:, 1:].copy()  # a view of one row would share its memory
    starts = tokens == mark
    starts[:, 0] = False  # what a row begins with, mark or not, is its document 0
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        documents=torch.from_numpy(starts.cumsum(1)),
        rows=torch.from_numpy(rows.copy()),
        samples=torch.from_numpy(samples),
        cuts=cuts,
    )
