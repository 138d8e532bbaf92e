"""Held-out loss, in nats per token and bits per byte."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.data.loader import Batch, eval_batches
from moesaic.data.mixture import Mixture
from moesaic.data.prepare import prepare
from moesaic.data.prepared import Prepared
from moesaic.models.transformer import Transformer
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.train.assemble import print_warning, restore_run
from moesaic.train.config import RunConfig
from moesaic.train.step import Compute


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over held-out text; of a mixture, the mean over its parts by their shares."""

    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None where it is not known what the ids stand for."""
    tokens: int
    bytes: int | None
    parts: "dict[str, Evaluation]" = field(default_factory=dict)
    """Each part of a mixture."""

    def measures(self) -> dict[str, float]:
        """Loss, and bits per byte where they are known."""
        known = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss} | known

    def facts(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        facts = asdict(self)
        return facts if self.parts else {name: facts[name] for name in facts if name != "parts"}


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    compute: Compute,
    token_bytes: np.ndarray | None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run the model in mode `eval` over `batches`, of which each rank takes its share of rows.

    `token_bytes[i]` is the number of bytes that token i stands for.
    """
    nats, tokens, size = 0.0, 0, 0
    for whole in batches:
        batch = whole.share(ranks.rank, ranks.size) if ranks.size > 1 else whole
        output = compute.forward(model, batch, mode="eval")
        assert output.loss is not None
        nats += output.loss.item()
        tokens += batch.num_targets
        size += target_bytes(batch, token_bytes) or 0
    if ranks.size > 1:
        nats, *counts = ranks.sum(torch.tensor([nats, tokens, size], dtype=torch.float64)).tolist()
        tokens, size = map(int, counts)
    known = None if token_bytes is None else size
    return Evaluation(nats / max(1, tokens), bits_per_byte(nats, known), tokens, known)


def target_bytes(batch: Batch, token_bytes: np.ndarray | None) -> int | None:
    """Bytes of text that the counted targets stand for. None where that is not known."""
    if token_bytes is None:
        return None
    targets = batch.targets.numpy()
    return int(token_bytes[targets[targets >= 0]].sum())


def bits_per_byte(nats: float, size: int | None) -> float | None:
    """Summed loss as bits per byte of text: comparable across tokenizers. None where the bytes are not known."""
    return None if size is None else nats / math.log(2) / max(1, size)


def evaluate_held_out(
    model: Transformer,
    compute: Compute,
    run: RunConfig,
    prepared: Prepared | Mixture,
    *,
    limit: int | None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluate on the first `limit` tokens of the run's held-out text, or on all of it.

    Of a mixture, each part is evaluated, on its share of the limit (but a sequence at least).
    """
    if isinstance(prepared, Prepared):
        batches = held_out(run, prepared, limit=len(prepared.eval) if limit is None else limit)
        return evaluate(model, batches, compute, prepared.tokenizer.token_bytes(), ranks)
    parts = {
        name: evaluate_held_out(
            model,
            compute,
            run,
            part,
            limit=None if limit is None else max(run.data.seq_len, round(limit * prepared.weight(name))),
            ranks=ranks,
        )
        for name, part in prepared.parts.items()
    }
    return mean(parts, {name: prepared.weight(name) for name in parts})


def mean(parts: dict[str, Evaluation], weights: dict[str, float]) -> Evaluation:
    """What a mixture of the parts would give, with these shares of its tokens."""
    loss = sum(weights[name] * part.loss for name, part in parts.items())
    sizes = [part.bytes for part in parts.values()]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        bits, size = None, None
    else:
        size = sum(known)
        per_token = sum(weights[name] * (part.bytes or 0) / part.tokens for name, part in parts.items())
        bits = loss / math.log(2) / max(per_token, 1e-9)
    return Evaluation(loss, bits, sum(part.tokens for part in parts.values()), size, parts)


def held_out(run: RunConfig, prepared: Prepared, *, limit: int) -> Iterable[Batch]:
    """The first `limit` tokens of held-out text, in batches of one micro-batch's size."""
    return eval_batches(
        prepared.eval,
        mark=prepared.tokenizer.mark,
        seq_len=run.data.seq_len,
        sequences=run.micro_batch_rows,
        limit_tokens=limit,
    )


def evaluate_run(run: RunConfig, folder: Path, *, step: int | None, tokens: int | None) -> dict[str, Any]:
    """Evaluate the run in `folder` at its newest checkpoint, or at `step`, on all held-out text or on `tokens` of it.

    Raises ValueError where there is no such checkpoint, or the corpus is no longer the one of the run.
    """
    restored = restore_run(run, folder, step=step, say=print_warning)
    prepared = prepare(run.data)
    if prepared.tokenizer.digest != restored.tokenizer.digest:
        raise ValueError(
            f"{folder}: was trained with another tokenizer than data.tokenizer gives now; put the text back"
        )
    kept = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    if kept["streams"]["eval"]["sha256"] != prepared.manifest["streams"]["eval"]["sha256"]:
        raise ValueError(
            f"{folder}: data gives other held-out text now than the run had, which it may have learnt"
        )
    result = evaluate_held_out(restored.model, restored.compute, run, prepared, limit=tokens)
    return {"step": restored.step, **result.facts()}
