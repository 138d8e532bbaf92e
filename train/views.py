"""What a run shows: values in, rich renderables and lines of text out. No terminal, no clock, no files.

Texts that others wrote (paths, samples) are never read as markup, and their control characters are made visible.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moesaic.train.facts import Closing, Evaluation, Progress, Sample, Start
from moesaic.train.health import LayerLoad
from moesaic.train.units import count, duration, flops, size, visible

WIDTH = 100  # widest useful line; wider terminals are not filled
_CLASS_STYLES = ("cyan", "blue", "magenta", "yellow", "green", "red", "white")
_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BARS = " .:-=+*#@"


def start_view(start: Start) -> RenderableType:
    """The start-up table."""
    tokens = start.steps * start.batch_tokens
    epochs = f"{start.epochs:.2f} epochs" if start.epochs < 10 else f"{start.epochs:.0f} epochs"
    micro = f"; {start.micro_batches} micro-batches" if start.micro_batches > 1 else ""
    rows: list[tuple[str, RenderableType]] = [
        (
            "model",
            _line(
                ("*", f"{count(start.parameters)} parameters"),
                f", {count(start.parameters - start.embedding_parameters)} without embeddings, ",
                ("*", f"{count(start.active_parameters)} active"),
                f"\n{start.model}",
            ),
        ),
        (
            "compute",
            _line(
                ("*", f"{flops(start.flops_per_token)}/token"),
                f", with backward {flops(start.train_flops_per_token)}, ",
                f"in all {flops(tokens * start.train_flops_per_token)}",
            ),
        ),
        (
            "training",
            _line(
                ("*", f"{start.steps:,} steps"),
                f" x {start.batch_tokens:,} = ",
                ("*", f"{count(tokens)} tokens"),
                f" in sequences of {start.seq_len:,}",
            ),
        ),
        (
            "corpus",
            _line(
                f"{start.corpus}: {start.documents:,} documents, {count(start.train_tokens)} tokens",
                "" if start.bytes_per_token is None else f" of {start.bytes_per_token:.2f} bytes",
                "\n",
                ("*", epochs),
                " of the part that is repeated most" if start.corpus == "mixture" else "",
                f"; {count(start.eval_tokens)} tokens held out",
            ),
        ),
        ("device", _line(("*", start.device), f" - {start.device_reason}")),
        ("precision", _line(("*", start.precision), f" - {start.precision_reason}")),
        ("kernels", _line(start.kernels)),
        ("layout", _line(start.layout + micro)),
        *([("costs", _line("\n".join(start.costs)))] if start.costs else []),
        ("memory", _Shares(start.memory)),
        ("folder", _line(start.folder)),
    ]
    if start.resumed_from is not None:
        rows.append(("resumed", _line("after step ", ("*", f"{start.resumed_from:,}"))))
    return _block(start.name, rows)


def preparation_view(stage: str, done: int, total: int) -> RenderableType:
    """One bar for the preparation of the corpus."""
    return _Bar(visible(stage), done, total)


def progress_fields(progress: Progress) -> list[tuple[str, str]]:
    """(name, value) of everything known; what reads best first."""
    fields = [("loss", f"{progress.loss:.3f}")]
    if progress.bits_per_byte is not None:
        fields.append(("bits/byte", f"{progress.bits_per_byte:.3f}"))
    if progress.tokens_per_second is not None:
        fields.append(("tok/s", count(progress.tokens_per_second)))
    if progress.mfu is not None:
        fields.append(("MFU", f"{progress.mfu:.0%}"))
    if progress.imbalance is not None:
        fields.append(("imbalance", f"{progress.imbalance:.2f}"))
    if progress.memory is not None:
        fields.append(("mem", size(progress.memory)))
    if progress.rank_imbalance is not None:
        fields.append(("rank load", f"{progress.rank_imbalance:.2f}"))
    if progress.copies is not None:
        fields.append(("copies", str(progress.copies)))
    return fields


def progress_view(progress: Progress, *, total: int, eta: float | None) -> RenderableType:
    """Two lines: how far, and how well."""
    return Group(_Bar("training", progress.step, total, eta), _Fields(progress_fields(progress)))


def progress_line(progress: Progress, *, total: int, eta: float | None) -> str:
    """One plain line, for logs and for output that is not a terminal."""
    parts = [f"step {progress.step:>{len(str(total))}}/{total}"]
    parts += [f"{name} {value}" for name, value in progress_fields(progress)]
    if progress.learning_rate is not None:
        parts.append(f"lr {progress.learning_rate:.2e}")
    if progress.grad_norm is not None:
        parts.append(f"grad norm {progress.grad_norm:.3g}")
    if eta is not None:
        parts.append(f"{duration(eta)} left")
    return "  ".join(parts)


def evaluation_view(evaluation: Evaluation) -> Text:
    """One line per evaluation."""
    line = _line(
        f"step {evaluation.step:,}: held-out loss ",
        ("*", f"{evaluation.loss:.4f}"),
        " nats",
        *_bits(evaluation.bits_per_byte),
    )
    if evaluation.best:
        line.append("  best", style="green")
    line.append(f"  ({duration(evaluation.seconds)})", style="dim")
    return line


def health_view(loads: Sequence[LayerLoad], *, rows: int = 12) -> RenderableType:
    """Router health per layer; of more than `rows` layers only the least balanced ones, in order of layers."""
    shown = list(loads)
    if len(shown) > rows:
        worst = sorted(shown, key=lambda load: load.max_vio if load.rows else math.inf, reverse=True)[:rows]
        shown = sorted(worst, key=lambda load: load.layer)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1), show_edge=False)
    for name in ("layer", "MaxVio", "dead", "busiest\nexpert", "load\nentropy", "router\nentropy"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("\nload of each expert", ratio=1)
    for load in shown:
        dead = len(load.dead)
        entropy = "-" if math.isnan(load.entropy) else f"{load.entropy:.2f}"
        table.add_row(
            str(load.layer),
            Text(f"{load.max_vio:.2f}", style=_grade(load.max_vio, 1.0, 4.0)),
            Text(f"{dead}/{load.num_experts}", style=_grade(dead / load.num_experts, 0.001, 0.5)),
            f"{load.busiest_share:.0%}",
            f"{load.load_entropy:.3f}",
            entropy,
            _Loads(load.load),
        )
    hidden = len(loads) - len(shown)
    if not hidden:
        return Constrain(table, WIDTH)
    return Group(Constrain(table, WIDTH), Text(f"and {hidden} better balanced layers", style="dim"))


def closing_view(closing: Closing) -> RenderableType:
    """The block at the end of a run: result, cost, places, samples."""
    rows: list[tuple[str, RenderableType]] = []
    if closing.best_loss is not None:
        best = _line(
            ("*", f"{closing.best_loss:.4f}"),
            " nats",
            *_bits(closing.best_bits_per_byte),
            f" at step {closing.best_step:,}",
        )
        if closing.final_loss is not None and closing.final_loss > closing.best_loss:
            best.append(f"; {closing.final_loss:.4f} nats at the end")
        rows.append(("held-out", best))
    rows.append(
        (
            "trained",
            _line(
                ("*", f"{count(closing.tokens)} tokens"),
                f" in {closing.step:,} of {closing.steps:,} steps, ",
                ("*", duration(closing.seconds)),
                f", {count(closing.tokens_per_second)} tokens/s",
            ),
        )
    )
    if closing.peak_memory is not None:
        rows.append(("peak memory", _line(size(closing.peak_memory))))
    rows += [(name, _line(path)) for name, path in closing.paths.items()]
    return Group(_block(closing.outcome, rows), *(_sample(sample) for sample in closing.samples))


def _bits(bits_per_byte: float | None) -> tuple[str | tuple[str, str], ...]:
    """What follows a loss in nats, where it is known."""
    return () if bits_per_byte is None else (", ", ("*", f"{bits_per_byte:.4f}"), " bits/byte")


def _line(*parts: str | tuple[str, str]) -> Text:
    """Text of plain parts and of bold ones, marked ("*", part)."""
    line = Text()
    for part in parts:
        if isinstance(part, tuple):
            line.append(visible(part[1]), style="bold")
        else:
            line.append(visible(part))
    return line


def _block(title: str, rows: Sequence[tuple[str, RenderableType]]) -> RenderableType:
    """A titled frame of names and values."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold", ratio=1)
    for name, value in rows:
        grid.add_row(name, value)
    heading = Text(visible(title), style="bold cyan")
    return Constrain(Panel(grid, title=heading, title_align="left", border_style="bright_black"), WIDTH)


def _sample(sample: Sample) -> RenderableType:
    body = Text.assemble((visible(sample.prompt), "bold"), visible(sample.text.rstrip()))
    body.expand_tabs(4)
    heading = Text("sample", style="not dim white")
    return Constrain(Panel(body, title=heading, title_align="left", border_style="bright_black"), WIDTH)


def _grade(value: float, fair: float, bad: float) -> str:
    return "green" if value < fair else "yellow" if value < bad else "red" if value >= bad else "dim"


class _Bar:
    """A name, a bar that fills the width it is given, and how far it is."""

    def __init__(self, name: str, done: int, total: int, eta: float | None = None) -> None:
        self.name, self.done, self.total, self.eta = name, done, total, eta

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        tail = f"  {self.done:,}/{self.total:,}  {int(share * 100)}%"
        if self.eta is not None:
            tail += f"  {duration(self.eta)} left"
        name = self.name + "  "
        bar = max(4, min(options.max_width, WIDTH) - cell_len(name) - len(tail))
        full = int(share * bar)
        stroke, rest = ("=", "-") if options.ascii_only else ("\u2501", "\u2501")
        yield Text.assemble(
            (name, "bold"),
            (stroke * full, "cyan"),
            (rest * (bar - full), "bright_black"),
            tail,
            no_wrap=True,
            overflow="crop",
        )


class _Fields:
    """Names and values on one line, as many as fit."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self.fields = fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        line = Text(no_wrap=True, overflow="crop")
        for name, value in self.fields:
            piece = Text.assemble("  " if line else "", (name, "dim"), " ", (value, "bold"))
            if line.cell_len + piece.cell_len > min(options.max_width, WIDTH):
                break
            line.append_text(piece)
        yield line


class _Loads:
    """One bar per expert, the mean at half height; neighbours share a bar (the larger counts) where space is short."""

    def __init__(self, load: Sequence[float]) -> None:
        self.load = load

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        bars = _ASCII_BARS if options.ascii_only else _BARS
        together = math.ceil(len(self.load) / max(1, options.max_width))
        groups = [self.load[i : i + together] for i in range(0, len(self.load), together)]
        line = Text(no_wrap=True)
        for group in groups:
            relative = max(group) * len(self.load)
            if relative == 0:
                line.append("x", style="red")
            else:
                line.append(bars[max(1, min(8, round(4 * relative)))], style=_grade(relative, 2.0, 4.0))
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, len(self.load)), min(64, len(self.load)))


class _Shares:
    """Bytes by class: the sum and the parts, and a bar in proportion."""

    def __init__(self, parts: Mapping[str, int]) -> None:
        self.parts = {name: value for name, value in parts.items() if value > 0}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        total, width = sum(self.parts.values()), options.max_width
        line, bar = _line("about ", ("*", size(total)), ":"), Text()
        seen, edge = 0, 0
        for index, (name, value) in enumerate(self.parts.items()):
            style = _CLASS_STYLES[index % len(_CLASS_STYLES)]
            piece = Text(f"{visible(name.replace('_', ' '))} {size(value)}", style=style)
            if line.cell_len + 2 + piece.cell_len > width:
                yield line
                line = Text()
            line.append("  " if line else "").append_text(piece)
            seen += value
            end = round(width * seen / total)
            bar.append("\u2501" * (end - edge), style=style)
            edge = end
        yield line
        if total and not options.ascii_only:
            yield bar
