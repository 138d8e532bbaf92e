"""Several corpora at once, each with its share of the training sequences.

Which part a sample of the run is of, and which of that part's samples it is, follow from its number alone, so that
resuming and any number of ranks need no state. Shares are whole numbers: 0.7 and 0.3 are 7 and 3. The order of parts
repeats after as many samples as the shares sum up to, and in any beginning of the run every part is within one sample
of its share. Each part is read in the order in which it would be read alone.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int

from moesaic.data.errors import DataError
from moesaic.data.loader import Batch, Batches, Loader, make_batch, rows_of
from moesaic.data.prepared import FORMAT_VERSION, Prepared, total_of
from moesaic.data.tokenizer import Tokenizer

PERIOD = 1 << 16
"""Shares that would sum up to more are rounded until they do not."""


@dataclass(frozen=True)
class Mixture:
    """Open corpora with their shares, in the order of their names. Their tokenizers are equal."""

    parts: dict[str, Prepared]
    shares: dict[str, int]

    @staticmethod
    def of(parts: Mapping[str, Prepared], weights: Mapping[str, float]) -> "Mixture":
        """The parts by name. Their ids mean the same, which their config has checked."""
        mixture = Mixture({name: parts[name] for name in sorted(parts)}, shares(weights))
        assert len({part.tokenizer.digest for part in mixture.parts.values()}) == 1
        return mixture

    def weight(self, name: str) -> float:
        """The part's share of the training sequences, between 0 and 1."""
        return self.shares[name] / sum(self.shares.values())

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self.parts.values())).tokenizer

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Those of the parts, and digests of the streams of all together."""
        manifests = {name: part.manifest for name, part in self.parts.items()}
        streams: dict[str, Any] = {}
        for split in ("train", "eval"):
            each = {name: manifest["streams"][split] for name, manifest in manifests.items()}
            content = json.dumps([self.shares, {name: about["sha256"] for name, about in each.items()}])
            streams[split] = {
                "tokens": sum(about["tokens"] for about in each.values()),
                "sha256": hashlib.sha256(content.encode()).hexdigest(),
            }
        return {
            "format_version": FORMAT_VERSION,
            "kind": "mixture",
            "shares": self.shares,
            "tokenizer": next(iter(manifests.values()))["tokenizer"],
            "streams": streams,
            "parts": manifests,
        }

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON: those of all parts together, and under `parts` each one's with its `weight`."""
        parts = {name: part.summary() for name, part in self.parts.items()}
        splits = {
            split: total_of([part["splits"][split] for part in parts.values()])
            | {"domains": {name: total_of([part["splits"][split]]) for name, part in parts.items()}}
            for split in ("train", "eval")
        }
        return {
            "kind": "mixture",
            "tokenizer": self.manifest["tokenizer"],
            **total_of(list(splits.values())),
            "splits": splits,
            "parts": {name: {"weight": self.weight(name)} | part for name, part in parts.items()},
        }


class MixtureLoader(Batches):
    """Training batches of a mixture for one rank out of `ranks`."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        sequences: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batches: int = 1,
    ) -> None:
        """`sequences` is the number of rows of the global batch. DataError names a part without a window."""
        self.mark, self.sequences, self.seed = mixture.tokenizer.mark, sequences, seed
        self.rows, self.cuts = rows_of(sequences, rank=rank, ranks=ranks, micro_batches=micro_batches)
        self.shares = mixture.shares
        self.loaders: list[Loader] = []
        for name, part in mixture.parts.items():
            try:
                self.loaders.append(
                    Loader(part.train, mark=self.mark, seq_len=seq_len, sequences=sequences, seed=seed)
                )
            except DataError as error:
                raise DataError(f"data.parts.{name}: {error}") from error
        self._first = np.cumsum([0, *(loader.num_windows for loader in self.loaders)])
        self._parts, self._ranks = quota_order(tuple(self.shares.values()))

    def batch(self, step: int) -> Batch:
        part, sample = self.place(step * self.sequences + self.rows)
        windows, ids = np.empty_like(sample), np.empty((len(sample), self.loaders[0].seq_len + 1), np.int64)
        for i in np.unique(part):
            chosen = part == i
            windows[chosen] = self.loaders[i].windows(sample[chosen])
            ids[chosen] = self.loaders[i].read(windows[chosen])
        samples = self._first[part] + windows
        return make_batch(ids, mark=self.mark, rows=self.rows, samples=samples, cuts=self.cuts)

    def place(self, samples: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Of each sample of the run: which part it is of, and which of the part's samples it is."""
        times, at = np.divmod(samples, len(self._parts))
        part = self._parts[at]
        return part, times * np.array([*self.shares.values()])[part] + self._ranks[at]

    def epoch(self, step: int) -> float:
        """Passes over the part that is repeated most."""
        samples = step * self.sequences / len(self._parts)
        return max(
            samples * share / loader.num_windows
            for share, loader in zip(self.shares.values(), self.loaders, strict=True)
        )

    def state(self, step: int) -> dict[str, Any]:
        parts = {
            name: {"share": share, "tokens": len(loader.tokens)}
            for (name, share), loader in zip(self.shares.items(), self.loaders, strict=True)
        }
        first = self.loaders[0].state(step)
        return {key: first[key] for key in ("step", "seed", "sequences", "seq_len")} | {"parts": parts}


def open_loader(
    prepared: Prepared | Mixture,
    *,
    seq_len: int,
    sequences: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    micro_batches: int = 1,
) -> Batches:
    """Training batches of any corpus, `sequences` rows in each over all ranks and micro-batches."""
    share = {"rank": rank, "ranks": ranks, "micro_batches": micro_batches}
    if isinstance(prepared, Mixture):
        return MixtureLoader(prepared, seq_len=seq_len, sequences=sequences, seed=seed, **share)
    mark = prepared.tokenizer.mark
    return Loader(prepared.train, mark=mark, seq_len=seq_len, sequences=sequences, seed=seed, **share)


def shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in the ratios of the weights as they are written in decimal, in the order of the names.

    Exact where they sum up to `PERIOD` or less, else rounded to parts of it, and never to 0.
    """
    exact = {name: Fraction(repr(weights[name])) for name in sorted(weights)}
    common = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * common) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    total = sum(whole.values())
    if total // divisor > PERIOD:
        room = PERIOD - len(whole)
        whole = {name: 1 + weight * room // total for name, weight in whole.items()}
        divisor = math.gcd(*whole.values())
    return {name: weight // divisor for name, weight in whole.items()}


@lru_cache(maxsize=4)
def quota_order(shares: tuple[int, ...]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """N = sum of the shares turns: whose each is, and how many that one had before.

    After any number n of turns, part p had n * share / N of them, rounded up or down: the quota method of Balinski and
    Young (The American Mathematical Monthly 82, 1975). The next turn is that of the part with the largest
    share / (turns + 1) among those that one more would not bring above their quota, of equals the first.
    """
    total, turns = sum(shares), [0] * len(shares)
    parts, ranks = np.empty(total, np.int64), np.empty(total, np.int64)
    for n in range(total):
        best = -1
        for p, share in enumerate(shares):
            if turns[p] * total < share * (n + 1) and (
                best < 0 or share * (turns[best] + 1) > shares[best] * (turns[p] + 1)
            ):
                best = p
        parts[n], ranks[n] = best, turns[best]
        turns[best] += 1
    return parts, ranks
