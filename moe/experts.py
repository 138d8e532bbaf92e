"""Expert kinds, and the weights they run with.

A kind is a pure function from weights and rows to rows; where the weights come from is a weight source's affair.

Dims: N rows, D width, F hidden width, E experts of the bank, M experts that the source supplies.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.kernels.activation import ExpertKind, input_matrices
from moesaic.kernels.backend import Backend
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.kernels.expert_rows import ExpertPieces, expert_rows_in_pieces
from moesaic.kernels.plan import Plan


@dataclass(frozen=True)
class Weights:
    """Matrices of M experts. A gated kind has two input matrices per expert, gate first."""

    w1: Float[Tensor, "M G F D"]
    w2: Float[Tensor, "M D F"]


class Source(Protocol):
    """A named set of experts, on this rank or over several."""

    name: str


@runtime_checkable
class WeightSource(Protocol):
    """A source whose experts are all here; it supplies their weights."""

    def weights(self, dtype: torch.dtype) -> Weights: ...


class Bank(nn.Module):
    """A named set of equal experts: their master weights. Layers refer to a bank; two layers may share one."""

    def __init__(self, name: str, num_experts: int, kind: ExpertKind, dim: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.num_experts = num_experts
        self.kind: ExpertKind = kind
        self.w1 = nn.Parameter(torch.empty(num_experts, input_matrices(kind), hidden, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        nn.init.normal_(self.w1, std=dim**-0.5)
        nn.init.normal_(self.w2, std=hidden**-0.5)

    def weights(self, dtype: torch.dtype) -> Weights:
        """All experts, in the compute type. A bank is the weight source of a single rank."""
        return Weights(self.w1.to(dtype), self.w2.to(dtype))


class Experts:
    """Rows through experts. Holds no parameters: those belong to the module that registers the source."""

    def __init__(self, kind: ExpertKind, source: Source) -> None:
        self.kind: ExpertKind = kind
        self.source = source
        """Whose experts they are."""
        self.backend: Backend = "auto"
        """Which kernels run; see `moesaic.kernels.backend`."""

    def mix(self, x: Float[Tensor, "T D"], gates: Float[Tensor, " R"], plan: Plan) -> Float[Tensor, "T D"]:
        """The weighted sum of every token's experts, where all of them are here."""
        assert isinstance(self.source, WeightSource), (
            "experts of several ranks: their dispatcher has the weights"
        )
        weights = self.source.weights(x.dtype)
        return expert_mlp(x, gates, weights.w1, weights.w2, plan, kind=self.kind, backend=self.backend)

    def run(
        self, weights: ExpertPieces, rows: Float[Tensor, "N D"], counts: Int[Tensor, " M"]
    ) -> Float[Tensor, "N D"]:
        """The first `counts[0]` rows go through the first of these experts, and so on."""
        return expert_rows_in_pieces(rows, weights, counts, kind=self.kind, backend=self.backend)
