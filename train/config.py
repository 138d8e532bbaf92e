"""The run: every key of a config file, and the checks that need more than one key.

A frozen dataclass holds each section. Fields say what they mean; a field's own rule is in its `__post_init__`; rules
across fields are in `RunConfig.check`. Reading YAML, overriding and reporting belong to `launch/`.
"""

from dataclasses import dataclass, field
from typing import Literal

from moesaic.data.config import BpeTokenizer, DataConfig, MixtureData, TokensData
from moesaic.kernels.backend import Backend
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.sizes import check_size
from moesaic.parallel.config import ParallelConfig
from moesaic.train.checkpoints import CheckpointConfig
from moesaic.train.optim import AdamWConfig, MuonConfig

FORMAT_VERSION = 1
LONGEST = 1 << 24
"""Tokens of a sequence, and of a sample."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How much to train, and in which arithmetic."""

    steps: int
    """Optimizer steps of the whole run."""
    batch_tokens: int
    """Tokens per optimizer step, over all ranks and micro-batches. A multiple of `data.seq_len`."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass, over all ranks. None: the whole batch at once. Must divide `batch_tokens`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of matrix products. `auto`: bf16 where the device is faster with it. Masters stay fp32."""
    threads: int | None = None
    """CPU threads of one rank. None: the machine's cores, divided among its ranks."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_tokens", "micro_batch_tokens")
        check_size("threads", self.threads, 4096)

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_tokens // (self.micro_batch_tokens or self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text during training, and the samples at its end."""

    every: int = 100
    """Steps between evaluations; 0: only at the end."""
    tokens: int = 65536
    """Held-out tokens per evaluation (at most what the corpus holds)."""
    prompts: tuple[str, ...] = ()
    """Beginnings of the sample texts written at the end of a run. Empty: no samples."""
    sample_tokens: int = 120
    """Tokens per sample."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with this much probability."""

    def __post_init__(self) -> None:
        positive(self, "tokens")
        check_size("sample_tokens", self.sample_tokens, LONGEST)
        if self.every < 0:
            raise ValueError(f"every: {self.every} is negative; give a number of steps, or 0")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every: int = 10
    """Steps between lines of `metrics.jsonl` and of the progress display."""
    tensorboard: bool = True
    """Write TensorBoard event files to `runs/<name>/tensorboard`."""
    routing: bool = False
    """Write `runs/<name>/routing.npz`: how many tokens of every rank each expert of every layer had, step by step."""

    def __post_init__(self) -> None:
        positive(self, "every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `name` and the sections without defaults are required."""

    version: Literal[1] = FORMAT_VERSION
    """Format of this file."""
    name: str
    """The run's folder is `dir/name`."""
    dir: str = "runs"
    """Where runs go."""
    seed: int = 0
    """Fixes initial weights, order of samples and all noise."""
    model: Transformer.Config
    """The transformer."""
    data: DataConfig
    """The text, its tokenizer, and how it is cut into sequences."""
    train: TrainConfig
    """Steps, batches, and how they compute."""
    optim: AdamWConfig | MuonConfig
    """What turns gradients into steps, and the schedule of its rate."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model lies over processes."""
    kernels: Backend = "auto"
    """What multiplies the experts' matrices. `auto`: on CPUs compiled C++; on GPUs what is measured fastest for the
    layer's shape, or Triton where ranks own experts. `triton`: moesaic's kernels. `torch`: `F.grouped_mm`.
    `megablocks`: its package grouped_gemm."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which are kept."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on held-out text, and the samples."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is recorded along the way."""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or self.name in ("", ".", "..") or set(self.name) & set("/\\"):
            raise ValueError(f"name: {self.name!r} cannot name a folder")
        if len(self.name.encode()) > 200:  # of the 255 that file systems allow
            raise ValueError(f"name: {len(self.name.encode())} bytes are too long to name a folder")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: {self.seed} is not in 0 to 2^63 - 1")

    @property
    def micro_batch_rows(self) -> int:
        """Sequences of one forward pass, over all ranks."""
        return self.train.batch_tokens // self.train.micro_batches // self.data.seq_len

    def check(self, world_size: int | None = 1) -> None:
        """Raise ValueError, naming the field, for every combination that cannot run on `world_size` ranks.

        None: as many ranks as the layout asks for.
        """
        world_size = self.parallel.ranks if world_size is None else world_size
        seq_len, batch = self.data.seq_len, self.train.batch_tokens
        micro = self.train.micro_batch_tokens or batch
        check_size("data.seq_len", seq_len, LONGEST)
        check_size("data.workers", self.data.workers, 4096)
        if isinstance(self.data.tokenizer, BpeTokenizer):
            check_size("data.tokenizer.vocab", self.data.tokenizer.vocab, 1 << 31)  # ids are kept in 32 bits
        if batch % seq_len:
            raise ValueError(f"train.batch_tokens: {batch} is not a multiple of data.seq_len = {seq_len}")
        if micro % seq_len:
            raise ValueError(
                f"train.micro_batch_tokens: {micro} is not a multiple of data.seq_len = {seq_len}"
            )
        if batch % micro:
            raise ValueError(
                f"train.micro_batch_tokens: {micro} does not divide train.batch_tokens = {batch}"
            )
        tokens = isinstance(self.data, TokensData | MixtureData) and self.data.tokenizer is None
        if tokens and self.eval.prompts:
            raise ValueError(
                "eval.prompts: are text, and data has no tokenizer; give data.tokenizer, or no prompts"
            )
        self.check_layout(world_size)
        if self.micro_batch_rows < world_size:
            raise ValueError(
                f"train.micro_batch_tokens: {micro} are {self.micro_batch_rows} sequences of data.seq_len = {seq_len}, "
                f"fewer than the {world_size} processes; give at least {world_size * seq_len}"
            )
        self.optim.schedule.check(self.train.steps)
        sizes = {(ffn.num_experts, ffn.router.k) for ffn in self.model.ffns() if isinstance(ffn, MoE.Config)}
        if self.log.routing and len(sizes) != 1:
            found = ", ".join(f"{k} of {experts}" for experts, k in sorted(sizes)) or "none"
            raise ValueError(
                f"log.routing: a trace has layers of one number of experts and of experts per token, and the model's "
                f"have {found}; make them equal, or set log.routing=false"
            )

    def check_layout(self, world_size: int) -> None:
        """Raise ValueError where the layout, or the optimizer in it, cannot run on so many processes."""
        self.parallel.check(world_size)
        shards = self.parallel.shards(world_size)
        if isinstance(self.optim, MuonConfig) and self.parallel.owned is None and shards > 1:
            raise ValueError(
                f"optim.kind: muon needs whole matrices, and parallel.experts.kind: sharded cuts them over {shards} "
                "ranks; use parallel.experts.kind=owned, or optim.kind=adamw"
            )


def positive(config: object, *fields: str) -> None:
    """Raise ValueError where one of the numbers is set and below 1."""
    for name in fields:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not positive")
