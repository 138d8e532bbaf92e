"""AdamW and Muon with per-group rules, learning-rate schedules, and clipping by the global norm."""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.models.names import expert_matrices, logical_parameters, logical_tensors
from moesaic.parallel.shard import local
from moesaic.train.muon import Muon, Scale


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final`."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = 100
    """Steps of linear warm-up."""
    final: float = 0.1
    """Last learning rate, as a share of the highest."""

    def __post_init__(self) -> None:
        check_common(self.warmup, self.final)

    def check(self, steps: int) -> None:
        if self.warmup >= steps:
            raise ValueError(
                f"optim.schedule.warmup: {self.warmup} is not below train.steps = {steps}; give a smaller warmup"
            )

    def factor(self, step: int, steps: int) -> float:
        """Share of the highest learning rate in step 0 to steps - 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / (steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Wsd:
    """Linear warm-up, a constant stretch, and a linear decay to `final` (warm-up, stable, decay: arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.2
    """Share of all steps over which the rate falls."""
    final: float = 0.0
    """Last learning rate, as a share of the highest."""

    def __post_init__(self) -> None:
        check_common(self.warmup, self.final)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: {self.decay} is not in (0, 1]")

    def check(self, steps: int) -> None:
        if self.warmup + self.decay_steps(steps) > steps:
            raise ValueError(
                f"optim.schedule.warmup: {self.warmup} and the decay of {self.decay_steps(steps)} steps "
                f"do not fit into train.steps = {steps}"
            )

    def decay_steps(self, steps: int) -> int:
        return max(1, round(self.decay * steps))

    def factor(self, step: int, steps: int) -> float:
        """Share of the highest learning rate in step 0 to steps - 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = steps - 1 - step
        return min(1.0, self.final + (1 - self.final) * left / self.decay_steps(steps))


def check_common(warmup: int, final: float) -> None:
    if warmup < 0:
        raise ValueError(f"warmup: {warmup} is negative")
    if not 0 <= final <= 1:
        raise ValueError(f"final: {final} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Settings of the parameters whose logical name matches a pattern. The first rule that matches counts."""

    match: str
    """Pattern such as `*.router.gate` or `banks.*`."""
    lr: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """Instead of the optimizer's own."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr: {self.lr} is negative")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is negative")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """What all optimizers have in common. Tensors of one dimension are not decayed."""

    lr: float
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decay per step, as a share of the learning rate."""
    clip: float | None = 1.0
    """Largest global gradient norm. None: no clipping."""
    schedule: Cosine | Wsd = field(default_factory=Cosine)
    groups: tuple[GroupRule, ...] = ()
    """Exceptions by parameter name."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: {self.lr} is not positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas} are not in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"eps: {self.eps} is not positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is negative")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: {self.clip} is not positive; null turns clipping off")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW (arXiv:1711.05101). Tensors of one dimension are not decayed."""

    kind: Literal["adamw"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimConfig):
    """Muon for the matrices of experts, each orthogonalised on its own, and AdamW for everything else.

    Muon needs whole matrices. An expert that has an owner lies on one rank; matrices of attention, dense layers and
    shared experts are cut over the ranks, and those of the embedding, the head and routers want AdamW in any case. So
    over several ranks experts must have owners (`parallel.experts.kind: owned`). A group rule for `banks.*` gives
    Muon's matrices another learning rate.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    """Decay of the mean gradient."""
    nesterov: bool = True
    """Orthogonalise the mean as the next step would see it."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which they compute. bf16 is faster on GPUs."""
    scale: Scale = "match_rms_adamw"
    """Factor on the learning rate of a matrix. `match_rms_adamw`: 0.2 * sqrt(max(rows, columns)), which makes updates
    as large as AdamW's, for its learning rates (arXiv:2502.16982). `spectral`: sqrt(max(1, rows / columns))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum} is not in [0, 1)")
        if not 1 <= self.ns_steps <= 100:
            raise ValueError(f"ns_steps: {self.ns_steps} is not in 1 to 100")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """One group per distinct (learning rate factor, decay), sharded tensors apart from whole ones, Muon's from AdamW's.

    Raises ValueError for a rule that matches nothing, and for Muon where there are no experts.
    """
    parameters = logical_parameters(model)
    unused = {rule.match for rule in config.groups}
    rates: dict[Tensor, tuple[float, float]] = {}
    named: dict[Tensor, str] = {}
    for name, parameter in parameters.items():
        rule = next((rule for rule in config.groups if fnmatchcase(name, rule.match)), None)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        if rule is not None:
            unused.discard(rule.match)
            decay = decay if rule.weight_decay is None else rule.weight_decay
        found = (rule.lr if rule else 1.0, decay)
        if rates.setdefault(parameter, found) != found:
            raise ValueError(
                f"optim.groups: {named[parameter]} and {name} get different rates, but lie in one table with "
                "`parallel.experts.kind: owned`; give the same to all banks whose experts have one shape"
            )
        named.setdefault(parameter, name)
    if unused:
        known = ", ".join(sorted(parameters)[:8])
        raise ValueError(f"optim.groups: {sorted(unused)} match no parameter; names are {known}, ...")
    experts = expert_matrices(model) if isinstance(config, MuonConfig) else {}
    if isinstance(config, MuonConfig) and not experts:
        raise ValueError("optim.kind: muon is for the matrices of experts, and the model has none; use adamw")
    members: dict[tuple[float, float, bool, bool], list[Tensor]] = {}
    for parameter, found in rates.items():  # fused kernels take one class of tensors at a time
        key = (*found, isinstance(parameter, DTensor), parameter in experts)
        members.setdefault(key, []).append(parameter)
    return [
        {"params": found, "factor": factor, "weight_decay": decay, "muon": muon}
        for (factor, decay, _, muon), found in members.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups, with its state already there."""
    groups = parameter_groups(model, config)
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if isinstance(config, MuonConfig):
        optimizer = Muon(
            groups,
            expert_matrices(model),
            momentum=config.momentum,
            nesterov=config.nesterov,
            steps=config.ns_steps,
            dtype=torch.bfloat16 if config.ns_dtype == "bf16" else None,
            scale=config.scale,
            **shared,
        )
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **shared)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # as the optimizer would at its first step: a checkpoint of step 0 then holds the same tensors as any other
            if group["muon"]:
                optimizer.state[parameter] = {"momentum": torch.zeros_like(parameter)}
                continue
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under `optim.<kind of state>.<logical name>`."""
    kinds = {kind for state in optimizer.state.values() for kind in state}
    return {
        f"optim.{kind}.{name}": state
        for kind in sorted(kinds)
        for name, state in logical_tensors(
            model, lambda t, kind=kind: optimizer.state.get(t, {}).get(kind)
        ).items()
    }


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], norm: float, limit: float) -> None:
    """Scale all gradients in place so that their joint norm, now `norm`, is at most `limit`."""
    if norm > limit:
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, limit / norm)  # pyright: ignore[reportPrivateImportUsage]
