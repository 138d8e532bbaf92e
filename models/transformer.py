"""The decoder transformer, dense or sparse per layer.

Knows nothing of meshes, optimizers or text. One entry point, `forward`, serves training, evaluation and generation.

Dims: B sequences, S positions, T = B * S tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.models.attention import Attention, KeyValues
from moesaic.models.block import Block
from moesaic.models.init import Window, initialize, whole
from moesaic.models.norm import RMSNorm
from moesaic.models.rope import rotations
from moesaic.moe.balance import LayerStats
from moesaic.moe.experts import Bank
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.layer import MoE
from moesaic.moe.routing import Mode, RouterInput
from moesaic.moe.sizes import LARGEST_WIDTH, MOST_LAYERS, check_size

FfnConfig = FeedForward.Config | MoE.Config


@dataclass(frozen=True)
class Output:
    """Of one forward pass: the loss where targets were given, else logits; and every sparse layer's sums."""

    loss: Float[Tensor, ""] | None
    """Sum over counted tokens, in nats."""
    logits: Float[Tensor, "B S V"] | None
    layers: list[LayerStats]


class Blocks(nn.ModuleList):
    """The layers, in order, with their type."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]


class Transformer(nn.Module):
    """Decoder-only language model."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The architecture. The vocabulary's size comes from the tokenizer."""

        dim: int
        """Width of the residual stream."""
        layers: int
        """Number of layers."""
        heads: int
        """Query heads."""
        kv_heads: int | None = None
        """Key and value heads. None: as many as query heads."""
        head_dim: int | None = None
        """Channels of a head. None: dim / heads."""
        ffn: FfnConfig
        """The feed-forward of every layer."""
        ffn_at: dict[str, FfnConfig] = field(default_factory=dict)
        """Layers with another feed-forward, by number or range from 0: `{"0-2": {kind: dense, hidden: 4096}}` makes
        the first three dense."""
        tied: bool = True
        """The output head is the embedding."""
        qk_norm: bool = True
        """Normalise queries and keys (arXiv:2302.05442)."""
        norm: Literal["pre", "peri"] = "pre"
        """`peri`: normalise the outputs of sub-layers as well (arXiv:2502.02732)."""
        norm_eps: float = 1e-6
        """Added to the mean square."""
        rope_theta: float = 10000.0
        """Base of the rotary wavelengths."""
        init_std: float | None = None
        """Standard deviation of initial matrices. None: 1 / sqrt(inputs). Outputs of sub-layers are divided by
        sqrt(2 * layers) besides (GPT-2)."""

        def __post_init__(self) -> None:
            check_size("dim", self.dim, LARGEST_WIDTH)
            check_size("layers", self.layers, MOST_LAYERS)
            check_size("heads", self.heads, LARGEST_WIDTH)
            check_size("kv_heads", self.kv_heads, LARGEST_WIDTH)
            check_size("head_dim", self.head_dim, LARGEST_WIDTH // self.heads)
            for name in ("norm_eps", "rope_theta", "init_std"):
                value = getattr(self, name)
                if value is not None and value <= 0:
                    raise ValueError(f"{name}: {value} is not positive")
            if self.head_dim is None and self.dim % self.heads:
                raise ValueError(
                    f"heads: {self.heads} does not divide dim = {self.dim}; set head_dim or change one"
                )
            if self.channels % 2:
                raise ValueError(f"head_dim: {self.channels} is odd; rotary positions need pairs of channels")
            if self.heads % self.key_heads:
                raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads = {self.heads}")
            banks: dict[str, tuple[object, ...]] = {}
            for index, ffn in enumerate(self.ffns()):
                if isinstance(ffn, MoE.Config) and ffn.bank is not None:
                    if ffn.bank.removeprefix("layer").isdecimal():
                        raise ValueError(
                            f"ffn.bank: {ffn.bank!r} is the name of a layer's own bank; use another"
                        )
                    shape = (ffn.num_experts, ffn.hidden, ffn.expert)
                    if banks.setdefault(ffn.bank, shape) != shape:
                        raise ValueError(
                            f"ffn_at: layer {index} shares bank {ffn.bank!r}, whose experts differ: "
                            f"{banks[ffn.bank]} and {shape}"
                        )

        @property
        def channels(self) -> int:
            """Channels of a head."""
            return self.head_dim or self.dim // self.heads

        @property
        def key_heads(self) -> int:
            """Key and value heads."""
            return self.kv_heads or self.heads

        def ffns(self) -> list[FfnConfig]:
            """The feed-forward of each layer. Raises ValueError for a range that is none or does not fit."""
            chosen = [self.ffn] * self.layers
            for span, ffn in self.ffn_at.items():
                first, dash, last = span.partition("-")
                numbers = (first, last if dash else first)
                if not all(part.isascii() and part.isdecimal() and len(part) <= 9 for part in numbers):
                    raise ValueError(f"ffn_at: {span!r} is not a layer or a range of layers such as '0-2'")
                low, high = map(int, numbers)
                if not low <= high < self.layers:
                    raise ValueError(f"ffn_at: {span!r} is outside layers 0 to {self.layers - 1}")
                chosen[low : high + 1] = [ffn] * (high + 1 - low)
            return chosen

    def __init__(self, config: Config, vocab: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.embedding = nn.Parameter(torch.empty(vocab, config.dim))
        # named banks, which layers may share, belong to no layer
        banks = {
            ffn.bank: Bank(ffn.bank, ffn.num_experts, ffn.expert, config.dim, ffn.hidden)
            for ffn in config.ffns()
            if isinstance(ffn, MoE.Config) and ffn.bank is not None
        }
        self.banks = nn.ModuleList(banks.values())
        self.blocks = Blocks(make_block(config, ffn, index, banks) for index, ffn in enumerate(config.ffns()))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Parameter(torch.empty(vocab, config.dim))
        self.initialize(seed)

    def initialize(self, seed: int, *, window: Window = whole) -> None:
        """Give every tensor its initial value; `window` says which part of it lies here."""
        config = self.config
        initialize(self, layers=config.layers, std=config.init_std, seed=seed, window=window)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        targets: Int[Tensor, "B S"] | None = None,
        *,
        mode: Mode,
        documents: Int[Tensor, "B S"] | None = None,
        rows: Int[Tensor, " B"] | None = None,
        step: int = 0,
        seed: int = 0,
        step_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        cache: list[KeyValues] | None = None,
    ) -> Output:
        """Logits, or with `targets` (-1: padding, not counted) the summed loss.

        `documents` keeps attention within a document. `rows` are the sequences' places in the step's global batch,
        which with `seed` and `step` fix all noise; `step_tokens` are the tokens of that batch. `dtype` is the compute
        type; masters, norms, routers and loss stay wide.
        """
        start = cache[0].used if cache else 0
        length = tokens.shape[1]
        x = nn.functional.embedding(tokens, self.embedding).to(dtype)
        turns = rotations(
            start, length, self.config.channels, self.config.rope_theta, dtype=dtype, device=x.device
        )
        mask = attention_mask(documents, start, length, x.device)
        facts = token_facts(tokens, targets, documents, rows, start)
        inputs = RouterInput(
            tokens=x.flatten(0, 1), mode=mode, step=step, step_tokens=step_tokens, seed=seed, **facts
        )
        layers = []
        for index, block in enumerate(self.blocks):
            x, stats = block(x, turns, mask, inputs, cache[index] if cache else None)
            if stats is not None:
                layers.append(stats)
        x = self.norm(x)
        weight = (self.embedding if self.head is None else self.head).to(dtype)
        if targets is None:
            return Output(None, nn.functional.linear(x, weight), layers)
        return Output(linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten()), None, layers)

    def new_cache(self, batch: int, length: int, *, dtype: torch.dtype = torch.float32) -> list[KeyValues]:
        """Room for `length` positions of `batch` sequences in every layer."""
        heads, channels = self.config.key_heads, self.config.channels
        device = self.embedding.device
        return [KeyValues(batch, length, heads, channels, dtype=dtype, device=device) for _ in self.blocks]


def make_block(config: Transformer.Config, ffn: FfnConfig, index: int, banks: dict[str, Bank]) -> Block:
    """Layer `index`; a bank with a name is taken from `banks`, others belong to the layer."""
    kv_heads, channels = config.key_heads, config.channels
    attention = Attention(
        config.dim, config.heads, kv_heads, channels, qk_norm=config.qk_norm, eps=config.norm_eps
    )
    if isinstance(ffn, FeedForward.Config):
        feed: FeedForward | MoE = FeedForward(ffn, config.dim)
    else:
        shared = None if ffn.bank is None else banks[ffn.bank]
        feed = MoE(ffn, config.dim, bank=shared, name=f"layer{index}")
    return Block(
        config.dim, attention, feed, index=index, peri_norm=config.norm == "peri", eps=config.norm_eps
    )


def attention_mask(
    documents: Int[Tensor, "B S"] | None, start: int, length: int, device: torch.device
) -> Bool[Tensor, "B 1 S L"] | None:
    """True where a query may look. None: the plain causal rule, or a single query that sees all."""
    if documents is None and (start == 0 or length == 1):
        return None
    causal = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
    if documents is None:
        return causal[None, None]
    same = documents[:, :, None] == documents[:, None, :]
    return (same & causal)[:, None]


def token_facts(
    tokens: Int[Tensor, "B S"],
    targets: Int[Tensor, "B S"] | None,
    documents: Int[Tensor, "B S"] | None,
    rows: Int[Tensor, " B"] | None,
    start: int,
) -> dict[str, Any]:
    """What routers may ask of tokens, flattened to (T,)."""
    batch, length = tokens.shape
    columns = torch.arange(length, device=tokens.device)
    numbers = torch.arange(batch, device=tokens.device)
    places = (numbers if rows is None else rows)[:, None] * length + columns
    return {
        "ids": tokens.flatten(),
        "positions": (columns + start).repeat(batch),
        "documents": None if documents is None else documents.flatten(),
        "num_sequences": batch,
        "indices": places.flatten(),
        "valid": None if targets is None else (targets >= 0).flatten(),
    }
