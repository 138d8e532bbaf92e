"""What a trained model makes of given texts: log-likelihoods of tokens, and continuations up to a stop.

Texts are scored in batches, padded on the right: attention looks back only and no token's routing depends on another,
so padding changes no result. No input is longer than the sequences of the training.

Dims: B rows of a batch, S positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moesaic.data.tokenizer import Tokenizer
from moesaic.models.transformer import Transformer
from moesaic.train.generate import sample


@dataclass(frozen=True)
class Score:
    """How likely given tokens are after those before them."""

    log_likelihood: float
    """Nats."""
    greedy: bool
    """Each of the tokens is the likeliest one."""


@dataclass(frozen=True)
class Window:
    """Tokens that fit into the model at once, of which the last `scored` ones are predicted."""

    tokens: list[int]
    scored: int
    owner: int
    """Index of the text it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model with what it needs to read texts."""

    model: Transformer
    tokenizer: Tokenizer
    seq_len: int
    """Most tokens of an input."""
    batch_tokens: int
    """Most tokens of a batch, padding included; at least one row is taken."""
    dtype: torch.dtype = torch.float32
    """Compute type."""

    def encode(self, text: str) -> list[int]:
        """A document that begins with `text`: the mark, then its tokens."""
        return [self.tokenizer.mark, *map(int, self.tokenizer.encode(text))]

    def score(self, texts: Sequence[tuple[list[int], int]]) -> list[Score]:
        """Score the last n tokens of each (tokens, n); at least one token is before them.

        What is before them is cut on the left where all does not fit. If they do not fit themselves, they are scored in
        windows (`windows`).
        """
        parts = [
            part
            for owner, (tokens, n) in enumerate(texts)
            for part in windows(tokens, n, self.seq_len, owner)
        ]
        parts.sort(key=lambda part: -len(part.tokens))
        totals, greedy = [0.0] * len(texts), [True] * len(texts)
        while parts:
            rows = max(1, self.batch_tokens // (len(parts[0].tokens) - 1))
            batch, parts = parts[:rows], parts[rows:]
            for part, (nats, likeliest) in zip(batch, self._score_batch(batch), strict=True):
                totals[part.owner] += nats
                greedy[part.owner] &= likeliest
        return [Score(total, each) for total, each in zip(totals, greedy, strict=True)]

    @torch.no_grad()
    def _score_batch(self, batch: list[Window]) -> list[tuple[float, bool]]:
        """Log-likelihood of each window's scored tokens, and whether they are the likeliest. The longest is first."""
        inputs = torch.full((len(batch), len(batch[0].tokens) - 1), self.tokenizer.mark)
        for row, part in zip(inputs, batch, strict=True):
            row[: len(part.tokens) - 1] = torch.tensor(part.tokens[:-1])
        logits = self.model(inputs.to(self.model.embedding.device), mode="eval", dtype=self.dtype).logits
        assert logits is not None
        return [self._score_row(row, part) for row, part in zip(logits, batch, strict=True)]

    def _score_row(self, logits: Float[Tensor, "S V"], part: Window) -> tuple[float, bool]:
        end = len(part.tokens) - 1
        targets = torch.tensor(part.tokens[-part.scored :], device=logits.device)
        wide = logits[end - part.scored : end]
        wide = wide.to(torch.promote_types(wide.dtype, torch.float32)).log_softmax(-1)
        nats = wide.gather(-1, targets[:, None]).double().sum()
        return nats.item(), bool((wide.argmax(-1) == targets).all())

    @torch.no_grad()
    def write(
        self, text: str, *, stops: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Continue `text` until it contains a stop (left out), another document begins, or `max_tokens` are written.

        The model sees the last `seq_len` tokens at most: where they are full it goes on from their second half.
        """
        generator = torch.Generator().manual_seed(seed)
        pending, written, so_far = self.encode(text)[-self.seq_len :], [], ""
        seen = list(pending)
        cache = self.model.new_cache(1, self.seq_len, dtype=self.dtype)
        while len(written) < max_tokens:
            if cache[0].used + len(pending) > self.seq_len:
                pending = seen[-max(1, self.seq_len // 2) :]
                cache = self.model.new_cache(1, self.seq_len, dtype=self.dtype)
            tokens = torch.tensor([pending], device=self.model.embedding.device)
            logits = self.model(tokens, mode="eval", dtype=self.dtype, cache=cache).logits
            assert logits is not None
            last = logits[0, -1].float().cpu()
            chosen = sample(last, temperature=temperature, top_p=1.0, generator=generator)
            if chosen == self.tokenizer.mark:
                break
            written.append(chosen)
            seen.append(chosen)
            pending = [chosen]
            so_far = self.tokenizer.decode(np.array(written, np.int64))
            found = [so_far.index(stop) for stop in stops if stop and stop in so_far]
            if found:
                return so_far[: min(found)]
        return so_far


def windows(tokens: list[int], scored: int, seq_len: int, owner: int = 0) -> Iterator[Window]:
    """Cut a text so that each of its last `scored` tokens is predicted once, from at most `seq_len` earlier ones.

    The last window reaches back as far as it can; the others begin where the one before them ends.
    """
    assert 0 <= scored < len(tokens)
    begin = len(tokens) - scored
    while begin < len(tokens):
        end = min(begin + seq_len, len(tokens))
        yield Window(tokens[max(0, end - 1 - seq_len) : end], end - begin, owner)
        begin = end
