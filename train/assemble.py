"""Put together what a run needs, from its configuration: for training, evaluation and generation alike."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.data.tokenizer import Tokenizer, load_tokenizer
from moesaic.kernels.backend import check
from moesaic.models.accounting import meta_model
from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import use_kernels
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.parallel.replan import Replan
from moesaic.parallel.shard import window
from moesaic.parallel.slots import slots_of
from moesaic.parallel.storage import DamagedCheckpointError
from moesaic.train.checkpoints import Checkpoints
from moesaic.train.config import RunConfig
from moesaic.train.device import Device, choose_device
from moesaic.train.optim import build_optimizer, optimizer_tensors
from moesaic.train.rules import Rule, rules_of
from moesaic.train.step import Compute


@dataclass
class Trainee:
    """A model and everything that a step changes."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    rules: list[Rule]
    compute: Compute
    ranks: Ranks = ALONE

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by logical name: what a checkpoint holds and a resumed run restores in place."""
        model = {name: tensor.detach() for name, tensor in logical_tensors(self.model).items()}
        return model | optimizer_tensors(self.model, self.optimizer)


def build_trainee(run: RunConfig, vocab: int, device: Device, ranks: Ranks = ALONE) -> Trainee:
    """A fresh model on its device, or this rank's part of it, with its optimizer and rules."""
    model = build_model(run, vocab, device, ranks)
    optimizer = build_optimizer(model, run.optim)
    rules = build_rules(model, optimizer, run, device, ranks)
    return Trainee(model, optimizer, rules, compute_of(run, device), ranks)


def build_rules(
    model: Transformer, optimizer: torch.optim.Optimizer, run: RunConfig, device: Device, ranks: Ranks
) -> list[Rule]:
    """The rules of a run. Where copies are planned by what they cost, that is measured now."""
    owned = run.parallel.owned
    replan = None
    if owned is not None and owned.copies and slots_of(model) is not None:
        replan = Replan(model, owned, ranks, micro_batches=run.train.micro_batches, dtype=device.dtype)
    return rules_of(model, optimizer, owned=owned, replan=replan)


def build_model(run: RunConfig, vocab: int, device: Device, ranks: Ranks = ALONE) -> Transformer:
    """A fresh model, laid out. Over several ranks, no rank ever holds more than one whole tensor."""
    check(run.kernels, device.device, device.dtype)
    if ranks.mesh is None:
        model = Transformer(run.model, vocab, seed=run.seed).to(device.device)
        use_kernels(model, run.kernels)
        return parallelize(model, run.parallel)
    model = parallelize(meta_model(run.model, vocab), run.parallel, ranks, dtype=device.dtype)
    model.to_empty(device=device.device)
    model.initialize(run.seed, window=window)
    use_kernels(model, run.kernels)
    return model


def compute_of(run: RunConfig, device: Device) -> Compute:
    """How forward passes of this run compute."""
    return Compute(
        device.device,
        device.dtype,
        seed=run.seed,
        mask_documents=run.data.mask_documents,
        step_tokens=run.train.batch_tokens,
    )


@dataclass
class Restored:
    """A trained model, ready to evaluate or to write."""

    model: Transformer
    tokenizer: Tokenizer
    compute: Compute
    step: int


def restore_run(run: RunConfig, folder: Path, *, step: int | None, say: Callable[[str], None]) -> Restored:
    """Load the newest whole checkpoint of the run in `folder`, or that of `step`.

    Damaged ones are left out, with a word to `say`, unless `step` asks for one. Raises ValueError where none is left.
    """
    checkpoints = Checkpoints(folder / "checkpoints", run.checkpoint, say=say)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{folder}: holds no checkpoint; train the run first")
    if step is not None and step not in steps:
        raise ValueError(
            f"{folder}: holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    for candidate in [step] if step is not None else reversed(steps):
        try:
            return load_model(run, folder, checkpoints.path(candidate))
        except DamagedCheckpointError as error:
            if step is not None:
                raise
            say(f"the checkpoint of step {candidate} is damaged and left out: {error}")
    raise ValueError(f"{folder}: every checkpoint is damaged (steps {', '.join(map(str, steps))})")


def load_model(run: RunConfig, folder: Path, checkpoint: Path) -> Restored:
    """The model of one checkpoint."""
    from moesaic.parallel.checkpoint import read_meta, read_tensors  # slow to import

    meta = read_meta(checkpoint)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.digest != meta["tokenizer"]:
        raise ValueError(
            f"{folder / 'tokenizer'}: is not the tokenizer that {checkpoint} was trained with; restore it"
        )
    device = choose_device(run.train, stored_precision=meta["precision"])
    check(run.kernels, device.device, device.dtype)
    model = Transformer(run.model, tokenizer.vocab, seed=run.seed)
    use_kernels(model, run.kernels)
    into = logical_tensors(model)
    for name, tensor in read_tensors(checkpoint, into).items():
        if tensor.shape != into[name].shape:
            raise ValueError(
                f"{checkpoint}: {name} has shape {tuple(tensor.shape)}, the model {tuple(into[name].shape)}"
            )
        into[name].detach().copy_(tensor)
    return Restored(model.to(device.device), tokenizer, compute_of(run, device), meta["step"])


def print_warning(message: str) -> None:
    """For commands whose standard output is their result."""
    print(f"warning: {message}", file=sys.stderr)
