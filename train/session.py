"""A training run from start to end: folder, data, model, loop, closing.

The order matters: whatever can be refused is refused before data is prepared or memory taken, and nothing that a run
wrote is ever overwritten.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moesaic.data.loader import Batches
from moesaic.data.mixture import Mixture, open_loader
from moesaic.data.prepare import prepare, vocab_of
from moesaic.data.prepared import Prepared
from moesaic.data.tokenizer import load_tokenizer
from moesaic.kernels import native
from moesaic.models.accounting import Accounting, account, meta_model
from moesaic.moe.layer import MoE
from moesaic.parallel.storage import CheckpointError
from moesaic.train.assemble import Trainee, build_trainee
from moesaic.train.checkpoints import Checkpoints
from moesaic.train.config import RunConfig
from moesaic.train.device import Device, choose_device, peak_memory, precision_name, tune_host
from moesaic.train.display import Display
from moesaic.train.environment import environment
from moesaic.train.facts import Closing, Sample, Start
from moesaic.train.generate import generate
from moesaic.train.loop import Loop, Tally, text_digest
from moesaic.train.memory import estimate
from moesaic.train.optim import parameter_groups
from moesaic.train.profiling import Profiler
from moesaic.train.run_dir import RunDir, holds_run, refuse_existing
from moesaic.train.stopping import StopRequest
from moesaic.train.writers import MetricsWriter

FAILED = 1


def train(run: RunConfig, text: str, *, resume: bool, profile: bool, command: Sequence[str]) -> int:
    """Train a new run, or with `resume` continue it where it was; returns the exit code.

    `text` is the resolved run as YAML, which the run's folder keeps.

    Raises ValueError, before work is lost, for everything that a user can put right.
    """
    run.check()
    vocab = vocab_of(run.data)
    accounting = account(run.model, vocab, seq_len=run.data.seq_len)
    parameter_groups(meta_model(run.model, vocab), run.optim)
    path = Path(run.dir) / run.name
    continues = resume and holds_run(path)
    if continues:
        refuse_fewer_steps(run, path)
    folder = RunDir.resume(path, text) if continues else None
    with ExitStack() as stack:
        if folder is not None:
            stack.callback(folder.close)
        else:
            refuse_existing(path)
        display = stack.enter_context(Display(steps=run.train.steps, every=run.log.every))
        tune_host()
        prepared = prepare(run.data, report=display.preparing)
        loader = loader_of(run, prepared)
        if folder is None:  # only now: a run whose text cannot be used leaves no folder behind
            folder = RunDir.create(path, text)
            stack.callback(folder.close)
        display.log_to(folder.say)
        return work(run, folder, display, accounting, prepared, loader, profile=profile, command=command)


def refuse_fewer_steps(run: RunConfig, path: Path) -> None:
    """Raise ValueError where the run has already gone beyond what it is asked for."""
    done = max(Checkpoints(path / "checkpoints", run.checkpoint, say=print).steps(), default=0)
    if done > run.train.steps:
        raise ValueError(
            f"train.steps: {run.train.steps} is below the {done} steps that {path} has done; give more"
        )


def loader_of(run: RunConfig, prepared: Prepared | Mixture) -> Batches:
    """Batches of the run's training text."""
    sequences = run.train.batch_tokens // run.data.seq_len
    return open_loader(prepared, seq_len=run.data.seq_len, sequences=sequences, seed=run.seed)


def work(
    run: RunConfig,
    folder: RunDir,
    display: Display,
    accounting: Accounting,
    prepared: Prepared | Mixture,
    loader: Batches,
    *,
    profile: bool,
    command: Sequence[str],
) -> int:
    """Restore, train to the end or to a stop, close."""
    checkpoints = Checkpoints(folder.checkpoints, run.checkpoint, say=display.warn)
    device = choose_device(run.train, stored_precision=begun_with(checkpoints))
    folder.record_start(environment(command, threads=device.threads))
    for change in folder.changes:
        display.say(f"changed since the last start: {change}")
    keep_data_facts(folder.path, prepared)
    trainee = build_trainee(run, prepared.tokenizer.vocab, device)
    tally = restore(trainee, loader, prepared, checkpoints, folder.path)
    metrics = MetricsWriter(folder.metrics, tensorboard=folder.tensorboard if run.log.tensorboard else None)
    dropped = metrics.rewind(tally.step or -1)
    if dropped:
        display.say(f"{dropped} records of metrics.jsonl after step {tally.step} will be computed again")
    display.start(start_of(run, accounting, prepared, device, folder.path, resumed_from=tally.step or None))
    loop = Loop(
        config=run,
        folder=folder.path,
        trainee=trainee,
        loader=loader,
        prepared=prepared,
        device=device,
        flops_per_token=accounting.train_flops_per_token,
        checkpoints=checkpoints,
        metrics=metrics,
        display=display,
        profiler=Profiler(folder.path / "profile") if profile else None,
        tally=tally,
    )
    with StopRequest() as stop:
        outcome = loop.run(stop)
    if loop.profiler is not None:
        loop.profiler.close()
    metrics.close()
    samples = write_samples(run, folder, trainee, prepared, tally) if outcome == "finished" else []
    display.close(closing_of(run, folder.path, tally, device, outcome, samples))
    return FAILED if outcome.startswith("failed") else 0


def begun_with(checkpoints: Checkpoints) -> str | None:
    """The precision that the run decided on at its first start, from its newest readable checkpoint."""
    for step in reversed(checkpoints.steps()):
        from moesaic.parallel.checkpoint import read_meta  # slow to import, and not needed by a new run

        try:
            return read_meta(checkpoints.path(step))["precision"]
        except CheckpointError:
            continue  # restoring will say so
    return None


def keep_data_facts(folder: Path, prepared: Prepared | Mixture) -> None:
    """Store tokenizer and file list with the run, or compare with what it was begun with.

    Raises ValueError where the tokenizer is another one: the model's tokens would mean something else.
    """
    import json

    kept = folder / "tokenizer"
    if kept.exists():
        if load_tokenizer(kept).digest != prepared.tokenizer.digest:
            raise ValueError(
                f"{kept}: the run was begun with another tokenizer than data.tokenizer gives now, because the text or "
                "the settings changed; put them back, or start another run with name=..."
            )
        return
    (folder / "data.json").write_text(json.dumps(prepared.manifest, indent=1) + "\n", encoding="utf-8")
    draft = folder / "tokenizer.tmp"  # a kill between its files must not leave half a tokenizer
    prepared.tokenizer.save(draft)
    draft.rename(kept)


def restore(
    trainee: Trainee, loader: Batches, prepared: Prepared | Mixture, checkpoints: Checkpoints, folder: Path
) -> Tally:
    """Continue from the newest whole checkpoint; from step 0 where there is none."""
    meta = checkpoints.restore(trainee.tensors())
    if meta is None:
        return Tally()
    tally = Tally(meta["step"], meta["seconds"], meta["best"], meta["last"])
    before = meta["loader"] | {"text": meta["text"]}
    now = loader.state(tally.step) | {"text": text_digest(prepared)}
    if before != now:
        raise ValueError(
            f"{folder}: the training text or its order changed since the checkpoint ({before}, now {now}), so samples "
            "would be repeated or skipped; put it back, or start another run with name=..."
        )
    return tally


def write_samples(
    run: RunConfig, folder: RunDir, trainee: Trainee, prepared: Prepared | Mixture, tally: Tally
) -> list[Sample]:
    """Let the trained model continue the prompts."""
    samples = [
        Sample(
            prompt=prompt,
            text=generate(
                trainee.model,
                prepared.tokenizer,
                prompt,
                max_tokens=run.eval.sample_tokens,
                temperature=run.eval.temperature,
                top_p=run.eval.top_p,
                seed=run.seed + number,
                dtype=trainee.compute.dtype,
            ),
        )
        for number, prompt in enumerate(run.eval.prompts)
    ]
    folder.write_samples(tally.step, [(sample.prompt, sample.text) for sample in samples])
    return samples


def start_of(
    run: RunConfig,
    accounting: Accounting,
    prepared: Prepared | Mixture,
    device: Device,
    folder: Path,
    *,
    resumed_from: int | None,
) -> Start:
    """The facts of the start-up table."""
    summary = prepared.summary()
    layout = ["1 process", "1 thread" if device.threads == 1 else f"{device.threads} threads"]
    layout += ["recomputes blocks"] if run.parallel.recompute == "block" else []
    layout += ["compiled"] if run.parallel.compile else []
    return Start(
        name=run.name,
        folder=str(folder),
        model=describe(run),
        parameters=accounting.parameters,
        embedding_parameters=accounting.embedding_parameters,
        active_parameters=accounting.active_parameters,
        flops_per_token=accounting.flops_per_token,
        train_flops_per_token=accounting.train_flops_per_token,
        steps=run.train.steps,
        batch_tokens=run.train.batch_tokens,
        seq_len=run.data.seq_len,
        micro_batches=run.train.micro_batches,
        memory=estimate(run, prepared.tokenizer.vocab, dtype=device.dtype, device=device.device.type),
        device=str(device.device),
        device_reason=device.why_device,
        precision=precision_name(device.dtype),
        precision_reason=device.why_dtype,
        kernels=native.status() if device.device.type == "cpu" else "torch",
        layout=", ".join(layout),
        corpus=run.data.kind,
        documents=summary["documents"],
        train_tokens=summary["splits"]["train"]["tokens"],
        eval_tokens=summary["splits"]["eval"]["tokens"],
        bytes_per_token=summary["bytes_per_token"],
        resumed_from=resumed_from,
    )


def describe(run: RunConfig) -> str:
    """The architecture in a line."""
    model = run.model
    parts = [f"{model.layers} layers of width {model.dim}", f"{model.heads} heads"]
    sparse = [ffn for ffn in model.ffns() if isinstance(ffn, MoE.Config)]
    if sparse:
        ffn = sparse[0]
        shared = f" + {ffn.shared_experts} shared" if ffn.shared_experts else ""
        parts.append(
            f"{len(sparse)} sparse: {ffn.router.k} of {ffn.num_experts} experts of {ffn.hidden}{shared}"
        )
    return ", ".join(parts)


def closing_of(
    run: RunConfig, folder: Path, tally: Tally, device: Device, outcome: str, samples: list[Sample]
) -> Closing:
    """The facts of the closing block."""
    tokens = tally.step * run.train.batch_tokens
    best: dict[str, Any] = tally.best
    paths = {
        "run": str(folder),
        "checkpoints": str(folder / "checkpoints"),
        "write": f"moesaic generate {folder} --prompt 'def '",
    }
    if outcome != "finished":
        paths["continue"] = "the same command with --resume"
    return Closing(
        outcome=outcome,
        step=tally.step,
        steps=run.train.steps,
        tokens=tokens,
        seconds=tally.seconds,
        tokens_per_second=tokens / tally.seconds if tally.seconds else math.nan,
        peak_memory=peak_memory(device.device),
        best_loss=best.get("loss"),
        best_bits_per_byte=best.get("bits_per_byte"),
        best_step=int(best["step"]) if best else None,
        final_loss=tally.last.get("loss"),
        paths=paths,
        samples=samples,
    )
