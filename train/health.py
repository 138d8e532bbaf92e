"""How evenly routers use their experts, and when a router has collapsed.

Counts are of training tokens only, of one step or summed over several. Pure values: nothing here knows the model.

Dims: E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Use of one layer's experts, in one step or a window of them."""

    layer: int
    """Index of the block in the model."""
    counts: Int[Tensor, "E"] | Float[Tensor, "E"]
    """Rows that went to each expert."""
    tokens: int
    """Tokens that were routed; each may go to several experts, or to none."""
    entropy: float = math.nan
    """Entropy in nats of a token's scores over the experts, mean over tokens. NaN where the router has none."""

    @cached_property
    def load(self) -> list[float]:
        """Share of all rows that each expert received; sums to 1, or is all zero."""
        counts = self.counts.detach().to("cpu", torch.float64)
        return (counts / counts.sum().clamp(min=1)).tolist()

    @property
    def num_experts(self) -> int:
        return len(self.load)

    @cached_property
    def rows(self) -> int:
        """Rows of the window, all experts together."""
        return int(self.counts.sum())

    @property
    def max_over_mean(self) -> float:
        """Rows of the busiest expert over the mean; 1 at balance. NaN without rows."""
        return max(self.load) * self.num_experts if self.rows else math.nan

    @property
    def max_vio(self) -> float:
        """Largest violation of balance, max / mean - 1 (arXiv:2408.15664, section 4.1); 0 at balance."""
        return self.max_over_mean - 1

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over its largest value: 1 at balance, 0 with one busy expert. NaN without rows."""
        if not self.rows:
            return math.nan
        if self.num_experts == 1:
            return 1.0
        return -sum(p * math.log(p) for p in self.load if p > 0) / math.log(self.num_experts)

    @property
    def dead(self) -> list[int]:
        """Experts without a single row."""
        return [expert for expert, share in enumerate(self.load) if share == 0]

    @property
    def busiest(self) -> int:
        """The expert with the most rows; the first of equals."""
        return max(range(self.num_experts), key=self.load.__getitem__)

    @property
    def busiest_share(self) -> float:
        """Share of the tokens that the busiest expert sees."""
        return max(self.load) * self.rows / self.tokens if self.tokens else math.nan


def health_record(loads: Sequence[LayerLoad]) -> dict[str, float | int | list[float]]:
    """The loads as entries of a metrics record: per layer, and the worst over the layers under `experts/`."""
    record: dict[str, float | int | list[float]] = {}
    used = [load for load in loads if load.rows]
    if not used:
        return record
    record["experts/max_vio"] = max(load.max_vio for load in used)
    record["experts/load_entropy"] = min(load.load_entropy for load in used)
    record["experts/dead"] = sum(len(load.dead) for load in loads)
    for load in loads:
        name = f"layer_{load.layer:02d}"
        record[f"{name}/max_vio"] = load.max_vio
        record[f"{name}/load_entropy"] = load.load_entropy
        record[f"{name}/router_entropy"] = load.entropy
        record[f"{name}/dead"] = len(load.dead)
        record[f"{name}/load"] = load.load
    return record


def imbalance(loads: Sequence[LayerLoad]) -> float | None:
    """Largest max / mean over the layers; None without experts."""
    return max((load.max_over_mean for load in loads if load.rows), default=None)


@dataclass
class CollapseWatch:
    """Says when a router has collapsed: once per layer, and again if it recovered in between.

    A window is bad when more than `dead_share` of the experts had no row, or when MaxVio is above `max_vio` or above
    half of its worst possible value (every token choosing the same experts), whichever is less: with few experts the
    worst value itself is small. A layer collapses after `windows` bad windows in a row and recovers after as many good
    ones. Windows with fewer than 4 rows per expert are not judged. A window is what stands behind one log record.
    """

    windows: int = 5
    max_vio: float = 4.0
    dead_share: float = 0.5
    _runs: dict[int, tuple[bool, int]] = field(
        init=False, default_factory=dict
    )  # layer: (bad?, windows in a row)
    _collapsed: set[int] = field(init=False, default_factory=set)

    def update(self, loads: Sequence[LayerLoad]) -> list[str]:
        """Judge one window; returns the warnings."""
        warnings = []
        for load in loads:
            if load.rows < 4 * load.num_experts:
                continue
            bad = self._is_bad(load)
            was_bad, length = self._runs.get(load.layer, (bad, 0))
            length = length + 1 if was_bad == bad else 1
            self._runs[load.layer] = (bad, length)
            if length < self.windows:
                continue
            if bad and load.layer not in self._collapsed:
                self._collapsed.add(load.layer)
                warnings.append(self._warning(load))
            elif not bad:
                self._collapsed.discard(load.layer)
        return warnings

    def _is_bad(self, load: LayerLoad) -> bool:
        worst = load.num_experts * load.tokens / load.rows - 1
        unbalanced = worst > 0 and load.max_vio > min(self.max_vio, worst / 2)
        return unbalanced or len(load.dead) > self.dead_share * load.num_experts

    def _warning(self, load: LayerLoad) -> str:
        return (
            f"the router of layer {load.layer} has collapsed: for {self.windows} log windows expert {load.busiest} "
            f"gets {load.max_over_mean:.1f} times the mean load ({load.busiest_share:.0%} of the tokens), "
            f"{len(load.dead)} of {load.num_experts} experts get none, load entropy {load.load_entropy:.2f} of 1. "
            f"Raise `bias_rate` of the router or `coef` of its balance loss, or lower `optim.lr`."
        )
