"""What a run tells its user, as plain values: the loop fills them in, `train/display.py` shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known before the first step."""

    name: str
    folder: str
    model: str
    """One line about the architecture: layers, width, experts."""
    parameters: int
    embedding_parameters: int
    active_parameters: int
    """Parameters that one token uses."""
    flops_per_token: float
    """Forward pass."""
    train_flops_per_token: float
    """Forward and backward pass."""
    steps: int
    batch_tokens: int
    seq_len: int
    micro_batches: int
    memory: Mapping[str, int]
    """Estimated bytes by class: weights, gradients, ..."""
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    kernels: str
    """What computes: compiled kernels, or torch and why."""
    layout: str
    """Processes, mesh, owners and copies of experts, recomputation, compilation."""
    costs: Sequence[str] = ()
    """What was measured for planners of copies, a line for each kind of bank; empty where nothing was."""
    corpus: str
    documents: int
    train_tokens: int
    eval_tokens: int
    bytes_per_token: float | None
    """None where it is not known what the ids stand for; so are bits per byte."""
    epochs: float
    """Passes over the corpus in the whole run; of a mixture, over the part that is repeated most."""
    resumed_from: int | None = None
    """Step of the checkpoint that this start continues from; None: a new run."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state after one step. What does not apply is None, and is not shown."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Share of the device's peak arithmetic; only where the peak is known."""
    imbalance: float | None = None
    """Largest max / mean expert load over the layers."""
    rank_imbalance: float | None = None
    """Max / mean rows of the ranks in the last step that was recorded; where experts are owned."""
    copies: int | None = None
    """Copies that ranks had of others' experts in that step, all layers together; where a planner may ask for some."""
    memory: int | None = None
    """Bytes in use by this process (CPU) or on this device."""
    learning_rate: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation on held-out text."""

    step: int
    loss: float
    bits_per_byte: float | None
    seconds: float
    best: bool
    """No earlier evaluation of this run was lower."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text the model continued."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Closing:
    """What a run leaves behind."""

    outcome: str
    """How it ended, such as `finished` or `stopped by SIGINT`."""
    step: int
    steps: int
    tokens: int
    seconds: float
    """Time spent training, all starts of the run together."""
    tokens_per_second: float
    peak_memory: int | None
    best_loss: float | None = None
    best_bits_per_byte: float | None = None
    best_step: int | None = None
    final_loss: float | None = None
    """Held-out loss of the last evaluation."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where things are: what -> path or command."""
    samples: Sequence[Sample] = ()
