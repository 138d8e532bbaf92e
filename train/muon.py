"""Muon for the experts of a bank: momentum whose matrices are orthogonalised, each expert's on their own.

Source: Keller Jordan et al., Muon (2024); rates by arXiv:2502.16982.

Dims: S experts, N matrices, R rows, C columns of a matrix.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moesaic.parallel.shard import local

Scale = Literal["match_rms_adamw", "spectral"]

Matrices = Callable[[Tensor], Sequence[Tensor]]
"""Views of a parameter, or of a tensor that goes with it, as stacks of matrices: (S, ..., R, C)."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5. Five steps take singular values from 0.002 up to between 0.68 and 1.21, where they stay."""
SMALLEST = 1e-7
"""Matrices with a smaller norm give a smaller update: an expert that gets no tokens any more comes to rest."""
PORTION = 1 << 24
"""Numbers that are orthogonalised at once; a few times as many are in memory then."""


def orthogonalise(
    matrices: Float[Tensor, "N R C"],
    steps: int,
    dtype: torch.dtype,
    coefficients: tuple[float, float, float] = QUINTIC,
) -> Float[Tensor, "N R C"]:
    """U p(S) V^T of every matrix U S V^T: a Newton-Schulz iteration in `dtype` that brings singular values to 1."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = (x / norms.clamp_min(SMALLEST)).to(dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def rate(scale: Scale, rows: int, columns: int) -> float:
    """The learning rate of a matrix, as a share of the group's."""
    if scale == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Muon where a group says `muon`, AdamW in the other groups."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Mapping[Tensor, Matrices],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool,
        steps: int,
        dtype: torch.dtype | None,
        scale: Scale,
    ) -> None:
        """`matrices` tells of every parameter of Muon's which matrices it holds. `dtype`: of the iteration; None: fp32,
        or float64 where weights are."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False})
        self.matrices = matrices
        self.momentum, self.nesterov = momentum, nesterov
        self.steps, self.dtype = steps, dtype
        self.scale: Scale = scale
        # groups and state are shared: whoever sets a rate, or saves the state, sees one optimizer
        rest = [group for group in self.param_groups if not group["muon"]]
        self.rest = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
        self.rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        self.rest.step()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, decay: float) -> None:
        assert parameter.grad is not None
        weights, grads = local(parameter), local(parameter.grad)
        momenta = local(self.state[parameter]["momentum"])
        momenta.lerp_(grads, 1 - self.momentum)
        weights.mul_(1 - lr * decay)
        views = self.matrices[parameter]
        for stacks in zip(views(weights), views(grads), views(momenta), strict=True):
            shape = stacks[0].shape
            if not stacks[0].numel():
                continue
            share = rate(self.scale, *shape[-2:])
            parts = (stack.split(max(1, PORTION // shape[1:].numel())) for stack in stacks)
            for weight, grad, momentum in zip(*parts, strict=True):
                wanted = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
                dtype = self.dtype or torch.promote_types(weight.dtype, torch.float32)
                found = orthogonalise(wanted.reshape(-1, *shape[-2:]), self.steps, dtype)
                weight.add_(found.reshape(weight.shape).to(weight.dtype), alpha=-lr * share)
