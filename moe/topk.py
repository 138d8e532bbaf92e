"""The token-choice router: every token goes to the K experts that score highest.

Covers Switch (k 1, raw softmax), GShard and Mixtral (softmax over the chosen), DeepSeek-V3 (sigmoid, bias, groups,
scaling) and loss-free balancing. Only routes: no losses, counters or process groups.

Dims: T tokens, D width, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.topk import Normalize, Score, choose
from moesaic.moe.noise import key, uniform
from moesaic.moe.router import Router
from moesaic.moe.routing import RouterInput, Routing
from moesaic.moe.sizes import MOST_CHOSEN, check_size


class TopKRouter(Router):
    """Token-choice top-k. A bias steers selection but never scales outputs (arXiv:2408.15664, section 2)."""

    scope = "token"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How tokens choose experts."""

        kind: Literal["topk"] = "topk"
        k: int
        """Experts per token."""
        score: Score = "softmax"
        """How logits become scores."""
        normalize: Normalize = "after"
        """`before`: weights are the scores over all experts, taken before the choice. `after`: the scores of the chosen
        experts, scaled to sum to 1."""
        scale: float = 1.0
        """Factor on all weights (`routed_scaling_factor` of DeepSeek-V3)."""
        groups: int = 1
        """Experts form this many equal groups; a token chooses groups first (arXiv:2412.19437, section 2.1.2)."""
        groups_kept: int | None = None
        """Groups a token may use. None: all."""
        jitter: float = 0.0
        """In training, inputs of the router are multiplied by U(1 - jitter, 1 + jitter) (arXiv:2101.03961, 2.2)."""
        bias_rate: float = 0.0
        """Step of the selection bias that balances load without a loss (arXiv:2408.15664). 0: no balancing."""

        def __post_init__(self) -> None:
            check_size("k", self.k, MOST_CHOSEN)
            if self.k == 1 and self.normalize == "after":
                raise ValueError(
                    "normalize: 'after' with k = 1 gives weight 1 and the router no gradient; use 'before'"
                )
            if self.groups < 1:
                raise ValueError(f"groups: {self.groups} is not positive")
            if self.groups_kept is not None and not 1 <= self.groups_kept <= self.groups:
                raise ValueError(f"groups_kept: {self.groups_kept} is not in 1 to groups = {self.groups}")
            if self.scale <= 0:
                raise ValueError(f"scale: {self.scale} is not positive")
            if not 0 <= self.jitter < 1:
                raise ValueError(f"jitter: {self.jitter} is not in [0, 1)")
            if self.bias_rate < 0:
                raise ValueError(f"bias_rate: {self.bias_rate} is negative")

        def check(self, num_experts: int) -> None:
            """Raise ValueError where the choice cannot be made among `num_experts`."""
            if self.k > num_experts:
                raise ValueError(f"router.k: {self.k} is more than num_experts = {num_experts}")
            if num_experts % self.groups:
                raise ValueError(f"router.groups: {self.groups} does not divide num_experts = {num_experts}")
            reachable = num_experts // self.groups * (self.groups_kept or self.groups)
            if self.k > reachable:
                raise ValueError(
                    f"router.k: {self.k} is more than the {reachable} experts of the groups kept"
                )

    bias: Tensor

    def __init__(self, config: Config, dim: int, num_experts: int) -> None:
        config.check(num_experts)
        super().__init__(dim, num_experts)
        self.config = config
        self.register_buffer("bias", torch.zeros(num_experts))

    def route(self, inputs: RouterInput) -> Routing:
        """Assign each of T tokens to k experts.

        Logits, scores and weights are fp32 or better whatever the tokens' type. Weights of `normalize: after` are a
        softmax in log space: they sum to 1 even where all sigmoids underflow, with no epsilon for a router to exploit.
        """
        config = self.config
        wide = accumulation_dtype(inputs.tokens.dtype)
        with torch.autocast(inputs.tokens.device.type, enabled=False):  # of a user's own loop
            logits = F.linear(jittered(inputs, config.jitter).to(wide), self.gate.to(wide))  # (T, E)
        experts, weights, probabilities = choose(
            logits,
            self.bias,
            config.k,
            score=config.score,
            normalize=config.normalize,
            groups=config.groups,
            groups_kept=config.groups_kept,
            scale=config.scale,
            backend=self.backend,
        )
        return Routing.token_choice(experts, weights, probabilities=probabilities, logits=logits)


def jittered(inputs: RouterInput, width: float) -> Float[Tensor, "T D"]:
    """The tokens, in training multiplied by counter-based noise around 1, in fp32 or better."""
    if width == 0 or inputs.mode == "eval":
        return inputs.tokens
    tokens = inputs.tokens
    indices = inputs.indices
    if indices is None:
        indices = torch.arange(tokens.shape[0], device=tokens.device)
    noise = uniform(key(inputs.seed, inputs.step, inputs.layer), indices, tokens.shape[1])
    return tokens.to(accumulation_dtype(tokens.dtype)) * (1 - width + 2 * width * noise)


def balanced_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The balanced bias after a step: up by `rate` for experts below the mean count, down for those above."""
    wanted = (
        counts.sum() - counts * counts.shape[0]
    )  # in integers: exact, so that a balanced expert stays put
    return bias + rate * wanted.sign().to(bias.dtype)
