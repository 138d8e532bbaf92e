"""Held-out loss, in nats per token and bits per byte."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.data.loader import Batch, eval_batches
from moesaic.data.prepare import prepare
from moesaic.data.prepared import Prepared
from moesaic.models.transformer import Transformer
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.train.assemble import print_warning, restore_run
from moesaic.train.config import RunConfig
from moesaic.train.step import Compute


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over held-out text."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    compute: Compute,
    token_bytes: np.ndarray,
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
        size += target_bytes(batch, token_bytes)
    if ranks.size > 1:
        nats, *counts = ranks.sum(torch.tensor([nats, tokens, size], dtype=torch.float64)).tolist()
        tokens, size = map(int, counts)
    return Evaluation(nats / max(1, tokens), bits_per_byte(nats, size), tokens, size)


def target_bytes(batch: Batch, token_bytes: np.ndarray) -> int:
    """Bytes of text that the counted targets stand for."""
    targets = batch.targets.numpy()
    return int(token_bytes[targets[targets >= 0]].sum())


def bits_per_byte(nats: float, size: int) -> float:
    """Summed loss as bits per byte of text: comparable across tokenizers."""
    return nats / math.log(2) / max(1, size)


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
    batches = held_out(run, prepared, limit=len(prepared.eval) if tokens is None else tokens)
    result = evaluate(restored.model, batches, restored.compute, restored.tokenizer.token_bytes())
    return {"step": restored.step, **asdict(result)}
