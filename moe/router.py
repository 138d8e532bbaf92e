"""What every router is: a learned gate that gives each token a logit per expert, and a rule that chooses.

No losses, counters or process groups.

Dims: T tokens, D width, E experts.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from moesaic.kernels.backend import Backend
from moesaic.moe.routing import RouterInput, Routing


class Router(nn.Module, ABC):
    """Routes tokens to experts, and nothing else. Kinds differ in how experts are chosen."""

    gate: nn.Parameter
    """(E, D): one row of logit weights per expert."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.backend: Backend = "auto"
        self.gate = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.gate, std=dim**-0.5)

    @abstractmethod
    def route(self, inputs: RouterInput) -> Routing:
        """Assign each of T tokens to experts, with weights."""
