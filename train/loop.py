"""The loop of a run: steps, records, evaluations, checkpoints, until the end, a stop request or a NaN."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.data.loader import Batch, Batches
from moesaic.data.mixture import Mixture
from moesaic.data.prepared import Prepared
from moesaic.parallel.traffic import Meter
from moesaic.train.assemble import Trainee
from moesaic.train.checkpoints import Checkpoints
from moesaic.train.config import RunConfig
from moesaic.train.device import Device, peak_flops, peak_memory, precision_name
from moesaic.train.display import Display
from moesaic.train.evaluate import bits_per_byte, evaluate_held_out, target_bytes
from moesaic.train.facts import Evaluation, Progress
from moesaic.train.health import CollapseWatch, LayerLoad, health_record, imbalance
from moesaic.train.nonfinite import explain, save_batch
from moesaic.train.profiling import Profiler
from moesaic.train.recorder import RoutingRecorder
from moesaic.train.rules import states_of
from moesaic.train.step import NonFiniteError, Sums, accumulate, update
from moesaic.train.stopping import StopRequest
from moesaic.train.writers import MetricsWriter, NoMetrics


@dataclass
class Tally:
    """What a run remembers besides tensors; stored with every checkpoint."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in steps, all starts together."""
    best: dict[str, float] = field(default_factory=dict)
    """The evaluation with the lowest loss: loss, bits_per_byte (where it is known), step."""
    last: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""


@dataclass
class Loop:
    """Everything that steps need. `run` returns how it ended, in words."""

    config: RunConfig
    folder: Path
    trainee: Trainee
    loader: Batches
    prepared: Prepared | Mixture
    device: Device
    flops_per_token: int
    """Of a training step."""
    checkpoints: Checkpoints
    metrics: MetricsWriter | NoMetrics
    display: Display
    profiler: Profiler | None
    tally: Tally
    recorder: RoutingRecorder | None = None

    def __post_init__(self) -> None:
        self.watch = CollapseWatch()
        self.token_bytes = self.prepared.tokenizer.token_bytes()
        self.peak = peak_flops(self.device)
        self.loads: list[LayerLoad] = []
        trainee, parts = self.trainee, self.config.train.micro_batches
        self.meter = Meter(trainee.model, trainee.ranks, micro_batches=parts, dtype=trainee.compute.dtype)
        self.rank_imbalance: float | None = None

    def run(self, stop: StopRequest) -> str:
        """Train from the tally's step on. A stop request is honoured after the step, and saved."""
        total = self.config.train.steps
        while self.tally.step < total:
            started = time.perf_counter()
            batch = self.loader.batch(self.tally.step)
            try:
                sums, metrics = self.step(batch)
            except NonFiniteError as error:
                return self.fail(batch, error)
            seconds = time.perf_counter() - started
            if self.recorder is not None:
                self.recorder.append(self.tally.step, sums)
            self.tally.step += 1
            self.tally.seconds += seconds
            bytes_, stopping = self.agree(batch, stop)
            self.report(sums, metrics, bytes_, seconds)
            done, every = self.tally.step, self.config.eval.every
            due = done == total or (every and done % every == 0)
            if due and not self.evaluate():
                return self.fail(batch, NonFiniteError("the held-out loss is not finite"))
            if stopping or self.checkpoints.due(done, total):
                self.save()
            if stopping and done < total:
                self.checkpoints.wait()
                return f"stopped by {stop.signal or 'a signal to another rank'}"
        self.checkpoints.wait()
        return "finished"

    def agree(self, batch: Batch, stop: StopRequest) -> tuple[int | None, bool]:
        """Bytes of text that the step's targets stand for (None: not known), and whether any rank was asked to stop."""
        mine = [target_bytes(batch, self.token_bytes) or 0, stop.signal is not None]
        size, asked = self.trainee.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        return None if self.token_bytes is None else int(size), asked > 0

    def step(self, batch: Batch) -> tuple[Sums, dict[str, float]]:
        """One optimizer step on a global batch."""
        config, trainee, step = self.config, self.trainee, self.tally.step
        parts = config.train.micro_batches
        self.meter.reset()
        sums = accumulate(
            trainee.model, batch, trainee.compute, micro_batches=parts, step=step, ranks=trainee.ranks
        )
        steps = config.train.steps
        metrics = update(
            trainee.model,
            trainee.optimizer,
            sums,
            config=config.optim,
            step=step,
            steps=steps,
            rules=trainee.rules,
            ranks=trainee.ranks,
        )
        if self.profiler is not None:
            self.profiler.step()
        return sums, metrics

    def report(self, sums: Sums, metrics: dict[str, float], size: int | None, seconds: float) -> None:
        """Show the step and, where one is due, write its record. All of a record but `time/` is reproducible."""
        step = self.tally.step
        bpb = bits_per_byte(metrics["loss"] * sums.tokens, size)
        self.loads = [
            LayerLoad(
                layer=layer, counts=s.counts, tokens=sums.tokens, entropy=float(s.entropy) / sums.tokens
            )
            for layer, s in sorted(sums.layers.items())
        ]
        due = step % self.config.log.every == 0 or step == self.config.train.steps
        traffic = self.meter.collect() if due else None
        if traffic is not None:
            self.rank_imbalance = traffic.max_over_mean
        speed = sums.tokens / seconds
        progress = Progress(
            step=step,
            loss=metrics["loss"],
            bits_per_byte=bpb,
            tokens_per_second=speed,
            mfu=speed * self.flops_per_token / self.peak if self.peak else None,
            imbalance=imbalance(self.loads),
            rank_imbalance=self.rank_imbalance,
            memory=peak_memory(self.device.device),
            learning_rate=metrics["lr"],
            grad_norm=metrics["grad_norm"],
        )
        self.display.step(progress)
        if not due:
            return
        record: dict[str, Any] = {"step": step, "tokens": step * self.config.train.batch_tokens}
        record |= {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
        if bpb is not None:
            record["train/bits_per_byte"] = bpb
        for layer, layer_sums in sorted(sums.layers.items()):
            for name, value in layer_sums.aux.items():
                record[f"layer_{layer:02d}/{name}_loss"] = float(value) / sums.tokens
        record |= health_record(self.loads)
        record |= {"time/seconds": self.tally.seconds, "time/tokens_per_second": speed}
        record["time/memory"] = progress.memory
        record |= traffic.record() if traffic is not None else {}
        self.metrics.append(record)
        for warning in self.watch.update(self.loads):
            self.display.warn(warning)

    def evaluate(self) -> bool:
        """Measure held-out loss and remember the best. False where it is not finite."""
        config, step = self.config, self.tally.step
        started = time.perf_counter()
        trainee = self.trainee
        result = evaluate_held_out(
            trainee.model,
            trainee.compute,
            config,
            self.prepared,
            limit=config.eval.tokens,
            ranks=trainee.ranks,
        )
        self.tally.last = result.measures() | {"step": step}
        finite = math.isfinite(result.loss)
        best = finite and (not self.tally.best or result.loss < self.tally.best["loss"])
        if best:
            self.tally.best = dict(self.tally.last)
        record = {f"eval/{name}": value for name, value in result.measures().items()}
        for part, measured in result.parts.items():
            record |= {f"eval/{part}/{name}": value for name, value in measured.measures().items()}
        self.metrics.append({"step": step} | record)
        shown = Evaluation(
            step=step,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            seconds=time.perf_counter() - started,
            best=best,
        )
        self.display.evaluation(shown, self.loads)
        return finite

    def save(self) -> None:
        """Save tensors and tally under the number of steps done."""
        if self.recorder is not None:
            self.recorder.sync()
        meta = {
            **asdict(self.tally),
            "loader": self.loader.state(self.tally.step),
            "tokenizer": self.prepared.tokenizer.digest,
            "precision": precision_name(self.device.dtype),
            "text": text_digest(self.prepared),
            "rules": states_of(self.trainee.rules, self.trainee.model),
        }
        self.checkpoints.save(self.tally.step, self.trainee.tensors(), meta)

    def fail(self, batch: Batch, error: NonFiniteError) -> str:
        """Say where the NaN comes from and keep the batch; earlier checkpoints stay as they are."""
        step = self.tally.step
        trainee, parts = self.trainee, self.config.train.micro_batches
        ranks = trainee.ranks
        where = explain(trainee.model, batch, trainee.compute, micro_batches=parts, step=step, ranks=ranks)
        name = f"nonfinite_step_{step:08d}" + (f"_rank_{ranks.rank}" if ranks.size > 1 else "")
        path = self.folder / f"{name}.safetensors"
        save_batch(batch, path, step=step)
        self.display.warn(f"step {step}: {error}; {where}; its batch is in {path}")
        self.checkpoints.wait()
        return f"failed at step {step}: {where}"


def text_digest(prepared: Prepared | Mixture) -> str:
    """SHA-256 of the training stream: what decides, with the loader's state, which samples come next."""
    return prepared.manifest["streams"]["train"]["sha256"]
