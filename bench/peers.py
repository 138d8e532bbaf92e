"""The other side of the benchmarks: plain, competent transformers code for the same mathematics.

Nothing here imports moesaic. The functions that need transformers import it, because that takes seconds.
Dims: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Family = Literal["Mixtral", "OLMoE", "Qwen3-MoE"]
Experts = Literal["eager", "grouped_mm", "batched_mm"]
FAMILIES: tuple[Family, ...] = ("Mixtral", "OLMoE", "Qwen3-MoE")
EXPERTS: tuple[Experts, ...] = ("eager", "grouped_mm", "batched_mm")


# --- One layer


@dataclass(frozen=True)
class LayerTensors:
    """Weights of a layer, or their gradients. `w1[:, 0]` goes through SiLU and gates `w1[:, 1]`."""

    gate: Float[Tensor, "E D"]
    w1: Float[Tensor, "E 2 F D"]
    w2: Float[Tensor, "E D F"]


class LayerPeer:
    """A model's MoE block: softmax over all experts, top K, weights that sum to 1, SwiGLU experts."""

    def __init__(self, name: str, block: nn.Module, gate: nn.Module, experts: nn.Module) -> None:
        self.name = name
        self.block = block
        self._gate = _parameter(gate, "weight")
        self._w1 = _parameter(experts, "gate_up_proj")  # (E, 2 * F, D)
        self._w2 = _parameter(experts, "down_proj")  # (E, D, F)

    def __call__(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.block(x.unsqueeze(0)).squeeze(0)

    @torch.no_grad()
    def load(self, weights: LayerTensors) -> None:
        """Copy the weights, cast to the peer's dtype."""
        self._gate.copy_(weights.gate)
        self._w1.copy_(weights.w1.flatten(1, 2))
        self._w2.copy_(weights.w2)

    def gradients(self) -> LayerTensors:
        """The gradients of the last backward passes. ValueError when there was none."""
        gate, w1, w2 = (parameter.grad for parameter in (self._gate, self._w1, self._w2))
        if gate is None or w1 is None or w2 is None:
            raise ValueError(f"{self.name}: no gradients; call backward first")
        return LayerTensors(gate, w1.unflatten(1, (2, -1)), w2)

    def zero_grad(self) -> None:
        self.block.zero_grad(set_to_none=True)


def layer_peers(
    D: int, F: int, E: int, K: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, LayerPeer]:
    """Every MoE block of transformers that runs here, by name (`Qwen3-MoE grouped_mm`), without weights yet.

    `batched_mm` copies the weights of every assignment, T * K * 3 * F * D numbers: not for large T.
    """
    peers = [_layer_peer(family, experts, D, F, E, K) for family in FAMILIES for experts in EXPERTS]
    for peer in peers:
        peer.block.to(dtype)
    return {peer.name: peer for peer in peers}


def _layer_peer(family: Family, experts: Experts, D: int, F: int, E: int, K: int) -> LayerPeer:
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    same = {"hidden_size": D, "num_experts_per_tok": K, "experts_implementation": experts}
    if family == "Mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(**same, intermediate_size=F, num_local_experts=E))
    elif family == "OLMoE":
        block = OlmoeSparseMoeBlock(
            OlmoeConfig(**same, intermediate_size=F, num_experts=E, norm_topk_prob=True)
        )
    else:
        block = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(**same, moe_intermediate_size=F, num_experts=E, norm_topk_prob=True)
        )
    return LayerPeer(f"{family} {experts}", block, block.gate, block.experts)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module.get_parameter(name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


# --- One layer over several ranks


class AllToAllPeer:
    """Expert parallelism as one writes it with torch alone: rows sorted by expert, `all_to_all_single` there and back,
    `F.grouped_mm` between. Rank r has experts r * M to (r + 1) * M - 1.

    Dims: M experts of this rank.
    """

    def __init__(
        self, w1: Float[Tensor, "M 2 F D"], w2: Float[Tensor, "M D F"], group: dist.ProcessGroup
    ) -> None:
        self.w1 = nn.Parameter(w1.clone())
        self.w2 = nn.Parameter(w2.clone())
        self.group = group

    def __call__(
        self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
    ) -> Float[Tensor, "T D"]:
        ranks, here = dist.get_world_size(self.group), len(self.w1)
        order = experts.flatten().argsort(stable=True)
        tokens = order // experts.shape[1]
        counts = experts.flatten().bincount(minlength=ranks * here)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        arriving = arriving.view(ranks, here)
        send, receive = counts.view(ranks, here).sum(1).tolist(), arriving.sum(1).tolist()
        arrived = _Exchange.apply(x[tokens], send, receive, self.group)
        of = torch.arange(here, device=x.device).repeat(ranks).repeat_interleave(arriving.flatten())
        by_expert = of.argsort(stable=True)
        ends = arriving.sum(0).cumsum(0).int()
        gate, up = F.grouped_mm(arrived[by_expert], self.w1.flatten(1, 2).transpose(1, 2), offs=ends).chunk(
            2, -1
        )
        out = F.grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs=ends)
        back = _Exchange.apply(out[by_expert.argsort()], receive, send, self.group)
        return torch.zeros_like(x).index_add(0, tokens, back * weights.flatten()[order, None])

    def zero_grad(self) -> None:
        self.w1.grad = self.w2.grad = None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.travelled = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        send, receive, group = ctx.travelled
        return _Exchange.apply(grads[0], receive, send, group), None, None, None  # type: ignore[return-value]


def deepspeed_layer(
    gate: Float[Tensor, "E D"], K: int, ranks: int, w1: Float[Tensor, "M 2 F D"], w2: Float[Tensor, "M D F"]
) -> nn.Module:
    """DeepSpeed's MoE layer over the ranks of the default group: softmax gate, the best K, no tokens dropped."""
    import deepspeed  # type: ignore[import-not-found]
    from deepspeed.moe.layer import MoE  # type: ignore[import-not-found]

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    experts, width, hidden = *gate.shape, w2.shape[2]
    whole = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
    layer = MoE(width, _SwiGLU(width, hidden), num_experts=experts, ep_size=ranks, k=K, **whole)
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(gate)
        mine = [module for module in layer.modules() if isinstance(module, _SwiGLU)]
        for expert, first, second in zip(mine, w1, w2, strict=True):
            expert.w1.copy_(first.flatten(0, 1))
            expert.w2.copy_(second)
    return layer


class _SwiGLU(nn.Module):
    """One expert, as DeepSpeed wants it: it makes a copy for every expert of the rank."""

    def __init__(self, D: int, F: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(2 * F, D))
        self.w2 = nn.Parameter(torch.zeros(D, F))

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = (rows @ self.w1.T).chunk(2, -1)
        return (F.silu(gate) * up) @ self.w2.T


# --- A whole training step


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder in which every feed-forward layer is a mixture of experts; each head is dim / heads wide."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    k: int
    hidden: int
    """Hidden width of one expert."""
    seq_len: int
    tied_embeddings: bool = True
    qk_norm: bool = True
    """With it the peer is Qwen3-MoE (a norm over each head's query and key), without it Mixtral."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the peer trains. Defaults: what was fastest for it on two CPU cores at 21M parameters, in fp32."""

    lr: float = 1e-3
    steps: int = 1000
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.0
    """Coefficient of the load-balancing loss of transformers; 0: not computed."""
    fused: bool = True
    """AdamW in one kernel; False: torch's default for the device."""
    experts: Experts = "grouped_mm"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, over fp32 weights."""
    micro_batches: int = 1
    """Parts of a batch, along its first dim, whose gradients are accumulated."""


@dataclass(frozen=True)
class PlainTrainer:
    """`step(tokens, targets)` does one optimizer step and returns the mean loss in nats; -1 pads targets."""

    model: nn.Module
    step: Callable[[Int[Tensor, "B S"], Int[Tensor, "B S"]], Float[Tensor, ""]]

    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(weight.numel() for weight in self.model.parameters())


def plain_transformers_trainer(architecture: Architecture, recipe: Recipe) -> PlainTrainer:
    """The loop that a competent user of transformers writes: SDPA, no cache, AdamW, clipping, cosine."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    model = AutoModelForCausalLM.from_config(
        _config(architecture, recipe), attn_implementation="sdpa", dtype=torch.float32
    )
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=recipe.fused or None,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)

    def step(tokens: Int[Tensor, "B S"], targets: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
        total = torch.zeros((), device=tokens.device)
        count = (targets != -1).sum()
        optimizer.zero_grad(set_to_none=True)
        for part, wanted in _parts(tokens, targets, recipe.micro_batches):
            with _arithmetic(recipe, tokens.device):
                output = model(input_ids=part, use_cache=False, output_router_logits=recipe.balance > 0)
            loss = F.cross_entropy(
                output.logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-1, reduction="sum"
            )
            loss = loss / count
            total += loss.detach()
            if recipe.balance > 0:
                loss = loss + recipe.balance * output.aux_loss / recipe.micro_batches
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        return total

    return PlainTrainer(model, step)


def _config(architecture: Architecture, recipe: Recipe):
    from transformers import MixtralConfig, Qwen3MoeConfig

    same = {
        "vocab_size": architecture.vocab,
        "hidden_size": architecture.dim,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "num_experts_per_tok": architecture.k,
        "max_position_embeddings": architecture.seq_len,
        "tie_word_embeddings": architecture.tied_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta},
        "rms_norm_eps": architecture.norm_eps,
        "use_cache": False,
        "experts_implementation": recipe.experts,
    }
    if not architecture.qk_norm:
        return MixtralConfig(
            **same, intermediate_size=architecture.hidden, num_local_experts=architecture.experts
        )
    return Qwen3MoeConfig(
        **same,
        moe_intermediate_size=architecture.hidden,
        num_experts=architecture.experts,
        norm_topk_prob=True,
    )


def _parts(tokens: Tensor, targets: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tokens.chunk(parts), targets.chunk(parts), strict=True)


def _arithmetic(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    if recipe.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
