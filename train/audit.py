"""Does this run's layout compute the gradients of one process? A shrunken model answers, in float64.

The run's own code takes its own kind of steps on forked ranks, with its layout, accumulation, recomputation and rules.
The reference is one process that sees every micro-batch whole, and neither recomputes nor compiles. The batch is made
to be nasty: documents of uneven length, padding, a rank whose rows hold next to nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.data.loader import Batch
from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.layer import MoE
from moesaic.moe.replay import ReplayRouter
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.costs import Costs
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.shard import gradient_norm, owned_parameters
from moesaic.parallel.slots import ExpertRows
from moesaic.parallel.spawn import run_ranks
from moesaic.train import step as steps
from moesaic.train.assemble import Trainee, build_model, build_rules, compute_of
from moesaic.train.config import RunConfig
from moesaic.train.device import Device
from moesaic.train.evaluate import evaluate
from moesaic.train.optim import MuonConfig, build_optimizer
from moesaic.train.words import copies_in_words

LIMIT = 1e-10
VOCAB, SEQ_LEN, STEPS = 61, 24, 2

COSTS = Costs(
    row=1000,
    row_near=300,
    row_far=900,
    copy_near=16_000,
    copy_far=32_000,
    grad_near=16_000,
    grad_far=32_000,
    hidden_forward=16_000,
    hidden_backward=16_000,
)
"""Where none are given: planners copy some experts, and not all. A shrunken layer would be measured to gain nothing."""


@dataclass(frozen=True)
class Finding:
    """How far one group of values is from the reference."""

    step: int
    what: str
    """`loss`, `grad banks.w1`, `after step attention.qkv`, ..."""
    error: float
    """Largest |a - b| over the group, divided by the largest |b|."""
    scale: float
    """Least-squares factor between the two: 2.000 is a gradient that was counted twice."""
    where: str
    """Rank, and name of the tensor, with the largest error."""

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT


@dataclass(frozen=True)
class Audit:
    """The result for a run."""

    name: str
    ranks: int
    layout: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = [asdict(finding) | {"passed": finding.passed} for finding in self.findings]
        return {
            "name": self.name,
            "ranks": self.ranks,
            "layout": self.layout,
            "limit": LIMIT,
            "passed": self.passed,
            "findings": found,
        }


def audit(run: RunConfig, *, ranks: int | None = None, timeout: float = 300.0) -> Audit:
    """Compare `run` on `ranks` processes (None: what its layout asks for, and 2 at least) with one process.

    Raises ValueError where the layout does not fit the ranks, RankFailedError where a rank fails.
    """
    if ranks is None:
        ranks = max(2, run.parallel.ranks) if run.parallel.dp_shard is None else run.parallel.ranks
        ranks += -ranks % run.parallel.dp_replicate
    small = shrunken(run, ranks)
    small.check_layout(ranks)
    plain = replace(small, parallel=ParallelConfig())
    reference = observe(ALONE, plain)
    layout = small.parallel
    if ranks == 1:
        seen = [observe(ALONE, small)]
    else:
        seen = run_ranks(lambda: observe(ranks_of(layout, "cpu"), small), ranks, timeout=timeout)
    words = [f"dp_replicate {layout.dp_replicate} x dp_shard {layout.shards(ranks)}"]
    if layout.owned is not None:
        most = layout.owned.max_rows
        about = "owned experts" + (f" in rounds of {most} rows" if most else "")
        words += [about + (" that move" if layout.owned.rebalance else "") + copies_in_words(layout.owned)]
    words += [f"{small.train.micro_batches} micro-batches"]
    words += [
        name for name, on in (("recompute", layout.recompute != "none"), ("compile", layout.compile)) if on
    ]
    return Audit(run.name, ranks, ", ".join(words), tuple(compare(reference, seen)))


def shrunken(run: RunConfig, ranks: int) -> RunConfig:
    """The same run with a small model and batch: every feature stays, only sizes shrink."""
    model = run.model
    groups = model.heads // model.key_heads
    layers = chosen_layers(model)
    ffns = [small_ffn(model.ffns()[index]) for index in layers]
    config = replace(
        model,
        dim=24,
        layers=len(ffns),
        heads=2 * groups,
        kv_heads=2,
        head_dim=6,
        ffn=ffns[0],
        ffn_at={str(index): ffn for index, ffn in enumerate(ffns)},
    )
    micro = min(run.train.micro_batches, 3)
    rows = micro * (ranks + 1)
    train = replace(
        run.train,
        steps=max(STEPS, 2),
        batch_tokens=rows * SEQ_LEN,
        micro_batch_tokens=rows * SEQ_LEN // micro,
    )
    data = replace(run.data, seq_len=SEQ_LEN)
    parallel = run.parallel
    if parallel.owned is not None:  # few steps: experts move at each of them
        owned = replace(
            parallel.owned,
            rebalance=min(parallel.owned.rebalance, 1),
            gradients="fp32",
            costs=parallel.owned.costs or COSTS,
        )
        parallel = replace(parallel, experts=owned)
    optim = replace(run.optim, ns_dtype="fp32") if isinstance(run.optim, MuonConfig) else run.optim
    sizes = {"model": config, "train": train, "data": data}
    return replace(run, **sizes, optim=optim, parallel=parallel, kernels="auto")  # in float64, on the CPU


def chosen_layers(model: Transformer.Config) -> list[int]:
    """At most two layers of every kind of feed-forward, in order."""
    seen: dict[Any, int] = {}
    chosen = []
    for index, ffn in enumerate(model.ffns()):
        seen[ffn] = seen.get(ffn, 0) + 1
        if seen[ffn] <= 2:
            chosen.append(index)
    return chosen


def small_ffn(ffn: FeedForward.Config | MoE.Config) -> FeedForward.Config | MoE.Config:
    """The feed-forward with narrow matrices and few experts; its routing keeps its shape."""
    if isinstance(ffn, FeedForward.Config):
        return replace(ffn, hidden=20)
    router = ffn.router
    if isinstance(router, ReplayRouter.Config):  # the experts are those of the trace
        return replace(ffn, hidden=20)
    per_group = max(2, -(-(router.k + 1) // (router.groups_kept or router.groups)))
    experts = min(ffn.num_experts, router.groups * per_group)
    return replace(ffn, num_experts=experts, hidden=20)


def global_batch(run: RunConfig, step: int) -> Batch:
    """Rows of a step: random tokens, uneven documents, padding at ends, and one row of padding but for a token."""
    rows = run.train.batch_tokens // SEQ_LEN
    generator = torch.Generator().manual_seed(1000 * run.seed % (1 << 40) + step)
    tokens = torch.randint(0, VOCAB, (rows, SEQ_LEN + 1), generator=generator)
    starts = torch.rand(rows, SEQ_LEN, generator=generator) < 0.15
    starts[:, 0] = False
    lengths = torch.randint(1, SEQ_LEN + 1, (rows,), generator=generator)
    lengths[step % rows] = 1
    targets = torch.where(torch.arange(SEQ_LEN) < lengths[:, None], tokens[:, 1:], -1)
    index = torch.arange(rows)
    return Batch(tokens[:, :-1].contiguous(), targets, starts.long().cumsum(1), index, index)


def my_batch(batch: Batch, ranks: Ranks, micro_batches: int) -> Batch:
    """This rank's rows of every micro-batch, as the loader deals them."""
    if ranks.size == 1:
        return batch
    parts = [micro.share(ranks.rank, ranks.size) for micro in batch.split(micro_batches)]
    fields = ("tokens", "targets", "documents", "rows", "samples")
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in fields]
    return Batch(*joined, cuts=tuple(len(part.rows) for part in parts))  # type: ignore[arg-type]


def observe(
    ranks: Ranks,
    run: RunConfig,
    *,
    dtype: torch.dtype = torch.float64,
    num_steps: int = STEPS,
    before: Callable[[Trainee, int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Train for a few steps; per step, everything that must not depend on the layout, by name, whole.

    `dtype`: what blocks compute in. Master weights are float64. `before` is called with the number of every step.
    """
    device = Device(torch.device("cpu"), dtype, 1, "", "")
    model = build_model_wide(run, device, ranks)
    optimizer = build_optimizer(model, run.optim)
    trainee = Trainee(
        model,
        optimizer,
        build_rules(model, optimizer, run, device, ranks),
        compute_of(run, device),
        ranks,
    )
    micro = run.train.micro_batches
    seen = []
    for step in range(num_steps):
        if before is not None:
            before(trainee, step)
        whole = global_batch(run, step)
        batch = my_batch(whole, ranks, micro)
        sums = steps.accumulate(model, batch, trainee.compute, micro_batches=micro, step=step, ranks=ranks)
        found = {"loss": sums.loss / sums.tokens}
        for layer, of_layer in sums.layers.items():
            found[f"counts layer{layer}"] = of_layer.counts.double()
            found |= {f"aux {name} layer{layer}": value for name, value in of_layer.aux.items()}
        grads = logical_tensors(model, lambda tensor: tensor.grad)
        found |= {f"grad {n}": full(grad, ranks).clone() for n, grad in grads.items()}
        parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters, ranks, owned_parameters(model))
        found["gradient norm"] = torch.tensor(norm)
        evaluation = evaluate(model, [whole], trainee.compute, BYTES, ranks)
        found["held-out loss"] = torch.tensor(evaluation.loss)
        limits = replace(
            run.optim, clip=None if run.optim.clip is None else 0.5 * float(found["gradient norm"])
        )
        steps.update(
            model,
            trainee.optimizer,
            sums,
            config=limits,
            step=run.train.steps // 2 + step,
            steps=run.train.steps + num_steps,
            rules=trainee.rules,
            ranks=ranks,
        )
        after = logical_tensors(model)
        found |= {f"after step {n}": full(t.detach(), ranks).clone() for n, t in after.items()}
        seen.append(found)
    return seen


BYTES = torch.ones(VOCAB, dtype=torch.int64).numpy()


def build_model_wide(run: RunConfig, device: Device, ranks: Ranks, vocab: int = VOCAB) -> Transformer:
    """The model of a run with float64 masters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return build_model(run, vocab, device, ranks)
    finally:
        torch.set_default_dtype(before)


def full(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The whole of a tensor that may be sharded, or belong to several owners; collective."""
    if isinstance(tensor, ExpertRows):
        assert ranks.mesh is not None
        return tensor.whole(ranks.mesh.get_group("dp_shard"))
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(reference: list[dict[str, Tensor]], seen: list[list[dict[str, Tensor]]]) -> list[Finding]:
    """One finding per step and kind of value: the worst over layers and ranks."""
    findings = []
    for step, want in enumerate(reference):
        groups: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        for rank, of_rank in enumerate(seen):
            got = of_rank[step]
            for name in sorted(want.keys() | got.keys()):
                mine, theirs = got.get(name), want.get(name)
                if mine is None or theirs is None:  # a value that only one side has is as wrong as can be
                    present = theirs if mine is None else mine
                    assert present is not None
                    mine, theirs = torch.full_like(present, torch.nan), torch.zeros_like(present)
                groups.setdefault(kind(name), []).append((f"rank {rank}, {name}", mine, theirs))
        findings += [finding(step, what, members) for what, members in groups.items()]
    return findings


def kind(name: str) -> str:
    """The group of a value: its name without the layer."""
    words = name.split(" ")
    parts = [part for part in words[-1].split(".") if not part.isdecimal() and part != "blocks"]
    if parts[0] == "banks":
        parts = ["banks", parts[-1]]
    if parts[0].startswith("layer"):
        return " ".join(words[:-1])
    return " ".join([*words[:-1], ".".join(parts)])


def finding(step: int, what: str, members: list[tuple[str, Tensor, Tensor]]) -> Finding:
    """The worst member, with the factor of that member."""
    worst, error, scale = members[0][0], -1.0, 1.0
    for where, mine, theirs in members:
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        off = (mine - theirs).abs().max().item() if theirs.numel() else 0.0
        relative = off / largest if largest else (0.0 if off == 0 else float("inf"))
        relative = float("inf") if relative != relative else relative
        if relative > error:
            square = theirs.double().square().sum().item()
            product = (mine.double() * theirs.double()).sum().item()
            worst, error, scale = where, relative, product / square if square else 1.0
    return Finding(step, what, error, scale, worst)


def by_kind(findings: tuple[Finding, ...]) -> Mapping[str, Finding]:
    """The worst finding of each kind over the steps."""
    worst: dict[str, Finding] = {}
    for found in findings:
        if found.what not in worst or found.error > worst[found.what].error:
            worst[found.what] = found
    return worst
