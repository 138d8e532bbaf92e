"""One optimizer step: forward and backward over the micro-batches, clip, update, rules.

The loss is the mean over the counted tokens of the global batch, so every micro-batch adds its sum divided by that
count, and the gradient does not depend on how the batch was cut.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.models.transformer import Output, Transformer
from moesaic.moe.balance import AuxValue, aux_values, weighted
from moesaic.moe.routing import Mode
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.parallel.shard import gradient_norm, owned_parameters, reduce_on_backward, sum_replicated
from moesaic.train.optim import OptimConfig, clip_gradients, set_learning_rate
from moesaic.train.rules import Rule, StepState


@dataclass
class LayerSums:
    """What one sparse layer's routing added up to over the global batch."""

    counts: Tensor
    entropy: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    """By name of term: its loss times tokens, before the coefficient."""


@dataclass
class Sums:
    """Totals of a global batch."""

    tokens: int
    loss: Tensor
    """Nats."""
    layers: dict[int, LayerSums] = field(default_factory=dict)
    own: dict[int, Tensor] = field(default_factory=dict)
    """By sparse layer, the assignments per expert of this rank's tokens alone."""

    def add(self, output: Output, aux: list[AuxValue]) -> None:
        """Add a micro-batch."""
        assert output.loss is not None
        self.loss = self.loss + output.loss.detach()
        for stats in output.layers:
            sums = self.layers.setdefault(
                stats.layer, LayerSums(torch.zeros_like(stats.counts), torch.zeros_like(stats.entropy))
            )
            sums.counts += stats.counts
            sums.entropy += stats.entropy
        for found in aux:
            into = self.layers[found.layer].aux
            into[found.term.name] = into.get(found.term.name, 0) + found.value.detach()

    def over(self, ranks: Ranks) -> "Sums":
        """The sums over all ranks."""
        own = {number: sums.counts for number, sums in self.layers.items()}
        if ranks.size == 1:
            return replace(self, own=own)
        layers = list(self.layers.values())
        mine = [self.loss, *(part for s in layers for part in (s.counts, s.entropy, *s.aux.values()))]
        flat = ranks.sum(torch.cat([part.detach().double().flatten() for part in mine]))
        parts = [
            part.view(own.shape).to(own)
            for part, own in zip(flat.split([part.numel() for part in mine]), mine, strict=True)
        ]
        loss, rest = parts[0], iter(parts[1:])
        return Sums(
            self.tokens,
            loss,
            {
                number: LayerSums(next(rest), next(rest), {name: next(rest) for name in sums.aux})
                for number, sums in self.layers.items()
            },
            own,
        )


class NonFiniteError(ArithmeticError):
    """Loss or gradient is NaN or infinite. The weights are still those before the step."""


@dataclass(frozen=True)
class Compute:
    """How a forward pass runs: what is the same for all steps of a run."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    mask_documents: bool = True
    step_tokens: int | None = None
    """Tokens of a global batch, which routers may ask for. None: those of one forward pass."""

    def forward(self, model: Transformer, batch: Batch, *, mode: Mode, step: int = 0) -> Output:
        """The loss of one micro-batch."""
        move = {"device": self.device, "non_blocking": True}
        documents = batch.documents.to(**move) if self.mask_documents else None
        return model(
            batch.tokens.to(**move),
            batch.targets.to(**move),
            mode=mode,
            documents=documents,
            rows=batch.rows.to(**move),
            step=step,
            seed=self.seed,
            step_tokens=self.step_tokens,
            dtype=self.dtype,
        )


def accumulate(
    model: Transformer,
    batch: Batch,
    compute: Compute,
    *,
    micro_batches: int,
    step: int,
    ranks: Ranks = ALONE,
) -> Sums:
    """Add the gradient of the global batch's mean loss, auxiliary terms included, to every parameter's `grad`.

    `batch` is this rank's share of the global batch. Gradients travel once, in the backward pass of the last
    micro-batch. Returns the sums of all ranks.
    """
    total = max(1, int(ranks.sum(torch.tensor(batch.num_targets)).item()))
    sums = Sums(total, torch.zeros((), device=compute.device))
    exchange = None if ranks.size == 1 else ranks.sum_with_gradient
    parts = batch.split(micro_batches)
    for number, part in enumerate(parts, start=1):
        reduce_on_backward(model, last=number == len(parts))
        output = compute.forward(model, part, mode="train", step=step)
        assert output.loss is not None
        aux = aux_values(output.layers, exchange, ranks.size)
        ((output.loss + weighted(aux)) / total).backward()
        sums.add(output, aux)
    sum_replicated(model, ranks)
    return sums.over(ranks)


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    sums: Sums,
    *,
    config: OptimConfig,
    step: int,
    steps: int,
    rules: list[Rule],
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Clip, step, clear gradients and apply the rules. Returns metrics.

    Raises NonFiniteError, with weights, optimizer and rules untouched, where the loss or the gradient is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = sums.loss.item() / sums.tokens
    norm = gradient_norm(parameters, ranks, owned_parameters(model))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
    if config.clip is not None:
        clip_gradients(parameters, norm, config.clip)
    lr = config.lr * config.schedule.factor(step, steps)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    metrics = {"loss": loss, "grad_norm": norm, "lr": lr}
    state = StepState(step, {layer: layer_sums.counts for layer, layer_sums in sums.layers.items()})
    for rule in rules:
        metrics |= rule(model, state)
    return metrics
