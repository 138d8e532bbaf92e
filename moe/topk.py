"""The token-choice router: every token goes to the K experts that score highest.

Covers Switch (k 1, raw softmax), GShard and Mixtral (softmax over the chosen), DeepSeek-V3 (sigmoid, bias, groups,
scaling) and loss-free balancing. Only routes: no losses, counters or process groups.

Dims: T tokens, D width, E experts, K experts per token, G groups.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.kernels.combine import accumulation_dtype
from moesaic.moe.noise import key, uniform
from moesaic.moe.routing import RouterInput, Routing
from moesaic.moe.sizes import MOST_CHOSEN, check_size


class TopKRouter(nn.Module):
    """Token-choice top-k. A bias steers selection but never scales outputs (arXiv:2408.15664, section 2)."""

    scope = "token"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How tokens choose experts."""

        kind: Literal["topk"] = "topk"
        k: int
        """Experts per token."""
        score: Literal["softmax", "sigmoid"] = "softmax"
        """How logits become scores."""
        normalize: Literal["before", "after"] = "after"
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
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.gate = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.gate, std=dim**-0.5)
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
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        log_scores = logits if config.score == "softmax" else F.logsigmoid(logits)
        selection = within_groups((scores + self.bias).detach(), config)
        experts = selection.topk(config.k, dim=-1).indices  # (T, K)
        if config.normalize == "after":
            weights = log_scores.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
        probabilities = scores if config.score == "softmax" else log_scores.softmax(-1)
        return Routing.token_choice(
            experts, weights * config.scale, probabilities=probabilities, logits=logits
        )


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


def within_groups(selection: Float[Tensor, "T E"], config: TopKRouter.Config) -> Float[Tensor, "T E"]:
    """Put -inf where an expert's group is not among the token's best; a group scores the sum of its best two."""
    if config.groups_kept is None or config.groups_kept == config.groups:
        return selection
    grouped = selection.unflatten(-1, (config.groups, -1))  # (T, G, E / G)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = best.topk(config.groups_kept, dim=-1).indices
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)


def balanced_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The balanced bias after a step: up by `rate` for experts below the mean count, down for those above."""
    wanted = (
        counts.sum() - counts * counts.shape[0]
    )  # in integers: exact, so that a balanced expert stays put
    return bias + rate * wanted.sign().to(bias.dtype)
