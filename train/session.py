"""A training run from start to end: folder, data, model, loop, closing.

The order matters: whatever can be refused is refused before data is prepared or memory taken, and nothing that a run
wrote is ever overwritten.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.data.loader import Batches
from moesaic.data.mixture import Mixture, open_loader
from moesaic.data.prepare import prepare, vocab_of
from moesaic.data.prepared import Prepared
from moesaic.data.tokenizer import load_tokenizer
from moesaic.kernels.files import Replaced
from moesaic.models.accounting import Accounting, account, meta_model
from moesaic.parallel.ranks import ALONE, Ranks, joined, world_size
from moesaic.parallel.storage import CheckpointError
from moesaic.train.assemble import Trainee, build_trainee
from moesaic.train.checkpoints import Checkpoints, saved_steps
from moesaic.train.config import RunConfig
from moesaic.train.device import (
    Device,
    check_kernels,
    choose_device,
    kernels_in_words,
    peak_memory,
    precision_name,
    tune_host,
)
from moesaic.train.display import Display
from moesaic.train.environment import environment
from moesaic.train.facts import Closing, Sample, Start
from moesaic.train.generate import generate
from moesaic.train.loop import Loop, Tally, text_digest
from moesaic.train.memory import estimate
from moesaic.train.optim import parameter_groups
from moesaic.train.profiling import Profiler
from moesaic.train.recorder import RoutingRecorder
from moesaic.train.rules import measured_costs, restore_rules
from moesaic.train.run_dir import RunDir, holds_run, refuse_existing
from moesaic.train.run_log import ReportError, read_log
from moesaic.train.stopping import StopRequest
from moesaic.train.words import architecture_in_words, costs_in_words, costs_to_paste, layout_in_words
from moesaic.train.writers import MetricsWriter, NoMetrics

FAILED = 1


def train(run: RunConfig, text: str, *, resume: bool, profile: bool, command: Sequence[str]) -> int:
    """Train a new run, or with `resume` continue it where it was; returns the exit code.

    `text` is the resolved run as YAML, which the run's folder keeps.

    Raises ValueError, before work is lost, for everything that a user can put right.
    """
    run.check(world_size())
    with joined(run.parallel) as ranks:
        return train_on(ranks, run, text, resume=resume, profile=profile, command=command)


def train_on(
    ranks: Ranks, run: RunConfig, text: str, *, resume: bool, profile: bool, command: Sequence[str]
) -> int:
    """`train`, on one of the ranks that joined. The first one owns the folder and the screen."""
    check_kernels(run.kernels, run.train.precision)
    vocab = vocab_of(run.data)
    accounting = account(run.model, vocab, seq_len=run.data.seq_len)
    parameter_groups(meta_model(run.model, vocab), run.optim)
    path = Path(run.dir) / run.name
    with ExitStack() as stack:
        kept: list[RunDir] = []

        def keep(folder: RunDir) -> None:
            stack.callback(folder.close)
            kept.append(folder)

        def begin() -> None:
            if resume and holds_run(path):
                refuse_fewer_steps(run, path)
                keep(RunDir.resume(path, text))
            else:
                refuse_existing(path)

        def create() -> None:  # only now: a run whose text cannot be used leaves no folder behind
            if not kept:
                keep(RunDir.create(path, text))

        ranks.shared(begin)
        console = None if ranks.first else Console(quiet=True)
        display = stack.enter_context(Display(steps=run.train.steps, every=run.log.every, console=console))
        tune_host()
        prepared = prepare(run.data, report=display.preparing)
        loader = loader_of(run, prepared, ranks)
        ranks.shared(create)
        if not ranks.first:
            keep(RunDir.peer(path))
        folder = kept[0]
        display.log_to(folder.say)
        return work(
            ranks, run, folder, display, accounting, prepared, loader, profile=profile, command=command
        )


def refuse_fewer_steps(run: RunConfig, path: Path) -> None:
    """Raise ValueError where the run has already gone beyond what it is asked for."""
    done = max(saved_steps(path / "checkpoints"), default=0)
    if done > run.train.steps:
        raise ValueError(
            f"train.steps: {run.train.steps} is below the {done} steps that {path} has done; give more"
        )


def loader_of(run: RunConfig, prepared: Prepared | Mixture, ranks: Ranks = ALONE) -> Batches:
    """This rank's batches of the run's training text."""
    return open_loader(
        prepared,
        seq_len=run.data.seq_len,
        sequences=run.train.batch_tokens // run.data.seq_len,
        seed=run.seed,
        rank=ranks.rank,
        ranks=ranks.size,
        micro_batches=run.train.micro_batches,
    )


def work(
    ranks: Ranks,
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
    device = device_for(ranks, run, checkpoints)
    folder.record_start(environment(command, threads=device.threads))
    for change in folder.changes:
        display.say(f"changed since the last start: {change}")
    ranks.shared(lambda: keep_data_facts(folder.path, prepared))
    trainee = build_trainee(run, prepared.tokenizer.vocab, device, ranks)
    tally = restore(trainee, loader, prepared, checkpoints, folder.path)
    tensorboard = folder.tensorboard if run.log.tensorboard else None
    metrics = MetricsWriter(folder.metrics, tensorboard=tensorboard) if ranks.first else NoMetrics()
    dropped = metrics.rewind(tally.step or -1)
    if dropped:
        display.say(f"{dropped} records of metrics.jsonl after step {tally.step} will be computed again")
    if ranks.first:
        resumed_from = tally.step or None
        display.start(
            start_of(
                run, accounting, prepared, loader, device, trainee, folder.path, resumed_from=resumed_from
            )
        )
        for line in costs_to_paste(measured_costs(trainee.rules)):
            folder.say(f"{line}; as parallel.experts.costs they make another run plan with the same prices")
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
        profiler=Profiler(folder.path / "profile") if profile and ranks.first else None,
        tally=tally,
        recorder=RoutingRecorder(folder.path, run.model, ranks, step=tally.step) if run.log.routing else None,
    )
    with StopRequest() as stop:
        outcome = loop.run(stop)
    if loop.profiler is not None:
        loop.profiler.close()
    metrics.close()
    if loop.recorder is not None:
        loop.recorder.close()
    samples = write_samples(run, folder, trainee, prepared, tally) if outcome == "finished" else []
    folder.record_end(outcome)
    drawn = draw_report(folder, accounting, display) if ranks.first else None
    display.close(closing_of(run, folder.path, tally, device, outcome, samples, report=drawn))
    return FAILED if outcome.startswith("failed") else 0


def device_for(ranks: Ranks, run: RunConfig, checkpoints: Checkpoints) -> Device:
    """The device of this rank; the first rank decides on the precision of all."""
    chosen = ranks.shared(lambda: choose_device(run.train, stored_precision=begun_with(checkpoints)))
    if ranks.first:
        return chosen
    mine = choose_device(run.train, stored_precision=precision_name(chosen.dtype))
    return replace(mine, why_dtype=chosen.why_dtype)


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
    kept = folder / "tokenizer"
    if kept.exists():
        if load_tokenizer(kept).digest != prepared.tokenizer.digest:
            raise ValueError(
                f"{kept}: the run was begun with another tokenizer than data.tokenizer gives now, because the text or "
                "the settings changed; put them back, or start another run with name=..."
            )
        return
    with Replaced(folder / "data.json") as temporary:
        temporary.write_text(json.dumps(prepared.manifest, indent=1) + "\n", encoding="utf-8")
    with Replaced(kept) as temporary:  # a kill between its files must not leave half a tokenizer
        prepared.tokenizer.save(temporary)


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
    restore_rules(trainee.rules, trainee.model, meta.get("rules", {}))
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
                ranks=trainee.ranks,
            ),
        )
        for number, prompt in enumerate(run.eval.prompts)
    ]
    folder.write_samples(tally.step, [(sample.prompt, sample.text) for sample in samples])
    return samples


def draw_report(folder: RunDir, accounting: Accounting, display: Display) -> Path | None:
    """Write the run's report.html. None, and one line that says why, where it cannot be drawn: the run is complete."""
    from moesaic.train.report import write_report  # with matplotlib: not needed before the end

    try:
        log = read_log(folder.path)
        counts = {"parameters": accounting.parameters, "active_parameters": accounting.active_parameters}
        write_report([replace(log, **counts)], folder.report)
    except Exception as error:  # whatever it is, a drawing must not fail a run that is trained and saved
        reason = str(error) if isinstance(error, ReportError) else f"{type(error).__name__}: {error}"
        display.warn(
            f"no report was drawn ({reason}); nothing else is affected, try `moesaic report {folder.path}`"
        )
        return None
    return folder.report


def start_of(
    run: RunConfig,
    accounting: Accounting,
    prepared: Prepared | Mixture,
    loader: Batches,
    device: Device,
    trainee: Trainee,
    folder: Path,
    *,
    resumed_from: int | None,
) -> Start:
    """The facts of the start-up table."""
    ranks = trainee.ranks
    summary = prepared.summary()
    layout = [
        layout_in_words(run, ranks.size),
        "1 thread" if device.threads == 1 else f"{device.threads} threads",
    ]
    layout += ["recomputes blocks"] if run.parallel.recompute == "block" else []
    layout += ["compiled"] if run.parallel.compile else []
    return Start(
        name=run.name,
        folder=str(folder),
        model=architecture_in_words(run),
        parameters=accounting.parameters,
        embedding_parameters=accounting.embedding_parameters,
        active_parameters=accounting.active_parameters,
        flops_per_token=accounting.flops_per_token,
        train_flops_per_token=accounting.train_flops_per_token,
        steps=run.train.steps,
        batch_tokens=run.train.batch_tokens,
        seq_len=run.data.seq_len,
        micro_batches=run.train.micro_batches,
        memory=estimate(
            run, prepared.tokenizer.vocab, dtype=device.dtype, device=device.device.type, ranks=ranks.size
        ),
        device=str(device.device),
        device_reason=device.why_device,
        precision=precision_name(device.dtype),
        precision_reason=device.why_dtype,
        kernels=kernels_in_words(run.kernels, device.device),
        layout=", ".join(layout),
        costs=costs_in_words(measured_costs(trainee.rules)),
        corpus=run.data.kind,
        documents=summary["documents"],
        train_tokens=summary["splits"]["train"]["tokens"],
        eval_tokens=summary["splits"]["eval"]["tokens"],
        bytes_per_token=summary["bytes_per_token"],
        epochs=loader.epoch(run.train.steps),
        resumed_from=resumed_from,
    )


def closing_of(
    run: RunConfig,
    folder: Path,
    tally: Tally,
    device: Device,
    outcome: str,
    samples: list[Sample],
    *,
    report: Path | None,
) -> Closing:
    """The facts of the closing block. `report`: the page that was drawn."""
    tokens = tally.step * run.train.batch_tokens
    best: dict[str, Any] = tally.best
    paths = {
        "run": str(folder),
        "checkpoints": str(folder / "checkpoints"),
        **({"report": str(report)} if report else {}),
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
