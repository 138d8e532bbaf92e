"""A router that replays a trace: tokens go where the trace says, whatever they are.

So every placement of experts can be compared on identical routing. The gate still learns: it gives the weights.

Dims: T tokens, D width, E experts, K experts per token, N tokens of the global batch, S sources of the trace.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from moesaic.kernels.combine import accumulation_dtype
from moesaic.moe.apportion import apportion
from moesaic.moe.noise import key
from moesaic.moe.router import Router
from moesaic.moe.routing import RouterInput, Routing
from moesaic.moe.trace import RoutingTrace, load_trace

GOLDEN = (5**0.5 - 1) / 2


class ReplayRouter(Router):
    """Sends tokens to experts in the trace's proportions, exactly, on any layout.

    The step's tokens are cut into S equal runs, one per source of the trace. In a run of n tokens the counts of its
    source, scaled to n * K with none above n, lay experts out on n * K places, each on neighbouring ones; the token in
    place i takes the experts at i, i + n, i + 2n, ...: K different ones, since none covers more than n places. Tokens
    are placed by a walk of golden steps around the n places, so that any stretch of a run (a sequence, a rank's share)
    has nearly the run's proportions (the three-distance theorem; Knuth, TAOCP volume 3, section 6.4).

    Where a token goes depends on the step, the layer, its index in the global batch and N: never on ranks or
    micro-batches. With N known the counts are exact, which no placement by indices alone could give.
    """

    scope = "token"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Routing that was recorded or made up, to compare layouts on. Experts per token are those of the trace."""

        kind: Literal["replay"] = "replay"
        trace: str
        """A routing trace (.npz; see `moesaic trace`). After its last step it begins anew."""

        def __post_init__(self) -> None:
            try:
                load_trace(self.trace)
            except ValueError as error:
                raise ValueError(f"trace: {error}") from None

        @property
        def k(self) -> int:
            """Experts per token."""
            return load_trace(self.trace).k

        def check(self, num_experts: int) -> None:
            """Raise ValueError where the trace is one of another number of experts."""
            experts = load_trace(self.trace).experts
            if experts != num_experts:
                raise ValueError(
                    f"router.trace: {self.trace} has {experts} experts, the layer num_experts = {num_experts}; "
                    "make them equal"
                )

    def __init__(self, config: Config, dim: int, num_experts: int) -> None:
        config.check(num_experts)
        super().__init__(dim, num_experts)
        self.config = config
        self.trace = load_trace(config.trace)

    def route(self, inputs: RouterInput) -> Routing:
        """Assign each of T tokens to K experts; weights are the softmax of the gate's logits over these.

        With K = 1 the weight is the softmax over all experts, as else the gate would get no gradient.
        """
        tokens = inputs.tokens
        wide = accumulation_dtype(tokens.dtype)
        with torch.autocast(tokens.device.type, enabled=False):  # of a user's own loop
            logits = F.linear(tokens.to(wide), self.gate.to(wide))  # (T, E)
        indices = inputs.indices
        if indices is None:
            indices = torch.arange(tokens.shape[0], device=tokens.device)
        total = tokens.shape[0] if inputs.step_tokens is None else inputs.step_tokens
        experts = replayed(self.trace, indices, step=inputs.step, layer=inputs.layer, total=total)
        probabilities = logits.softmax(-1)
        chosen = probabilities if self.trace.k == 1 else logits
        weights = chosen.gather(-1, experts)  # each expert at most once: the gradient adds nothing up
        weights = weights if self.trace.k == 1 else weights.softmax(-1)
        return Routing.token_choice(experts, weights, probabilities=probabilities, logits=logits)


def replayed(
    trace: RoutingTrace, indices: Int[Tensor, " T"], *, step: int, layer: int, total: int
) -> Int[Tensor, "T K"]:
    """The experts of the tokens with these indices in a global batch of `total`; larger indices begin anew."""
    counts, device = trace.at(step, layer), indices.device
    starts = np.arange(trace.sources + 1) * total // trace.sources
    sizes = np.diff(starts)
    placed = apportion(counts, sizes * trace.k, sizes[:, None])  # (S, E)
    ends = torch.from_numpy(placed.ravel().cumsum()).to(device)  # of S * total K places, in one line
    strides = np.array([golden_stride(int(size)) for size in np.unique(sizes)])
    strides = strides[np.searchsorted(np.unique(sizes), sizes)]
    first, size, stride = (
        torch.from_numpy(values).to(device)[: trace.sources] for values in (starts, sizes, strides)
    )
    turn = key(step % len(trace.steps), layer) >> 32  # else the layers of a token would agree
    indices = indices % max(1, total)
    source = torch.searchsorted(first[1:].contiguous(), indices, right=True)
    length = size[source]
    place = ((indices - first[source]) * stride[source] + turn) % length
    at = first[source] * trace.k + place
    at = at[:, None] + length[:, None] * torch.arange(trace.k, device=device)
    return torch.searchsorted(ends, at, right=True) % trace.experts


def golden_stride(size: int) -> int:
    """The step around `size` places that visits all of them, and is nearest to the golden section."""
    stride = max(1, round(size * GOLDEN))
    while gcd(stride, size) > 1:
        stride += 1
    return stride
