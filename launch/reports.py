"""What the commands besides `train` show: plain values in, rich renderables out."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.train.units import count, flops, size, visible


def inspect_view(facts: Mapping[str, Any]) -> RenderableType:
    """The facts of `inspect`, as a table: model, arithmetic, training, memory."""
    model, training, memory = facts["model"], facts["training"], facts["memory"]
    table = _table(facts["name"])
    _row(table, "parameters", count(model["parameters"]), f"{model['parameters']:,}")
    _row(table, "  without embeddings", count(model["non_embedding_parameters"]))
    _row(table, "  active per token", count(model["active_parameters"]), _share(model, "active_parameters"))
    _row(table, "  in experts", count(model["expert_parameters"]), _share(model, "expert_parameters"))
    _row(table, "vocabulary", f"{facts['vocab']:,}")
    _row(table, "forward", f"{flops(model['flops_per_token'])}", "per token")
    _row(table, "  with backward", f"{flops(model['train_flops_per_token'])}", "per token")
    _row(
        table,
        "training",
        f"{count(training['tokens'])} tokens",
        f"{training['steps']:,} steps of {training['batch_tokens']:,}",
    )
    _row(table, "  arithmetic", flops(training["flops"]))
    _row(table, "precision", facts["precision"], f"on {facts['device']}; {facts['precision_reason']}")
    _row(
        table, "memory", size(sum(memory.values())), "estimated; work space of single operations comes on top"
    )
    for name, value in memory.items():
        _row(table, f"  {name}", size(value))
    return table


def stats_view(summary: Mapping[str, Any]) -> RenderableType:
    """A prepared corpus: counts per split and domain, the longest documents, what was left out."""
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", title=f"{summary['kind']} corpus", title_justify="left"
    )
    table.add_column("")
    for name in ("documents", "bytes", "tokens", "bytes/token"):
        table.add_column(name, justify="right")
    for split, total in summary["splits"].items():
        _counts(table, split, total, style="bold")
        if len(total["domains"]) > 1:
            for domain, counts in total["domains"].items():
                _counts(table, f"  {domain}", counts)
    tokenizer = summary["tokenizer"]
    facts = _table(None)
    _row(facts, "tokenizer", f"{tokenizer['name']}, {tokenizer['vocab']:,} tokens")
    _row(facts, "files", f"{summary['files']:,}, {summary['duplicates']:,} duplicates left out")
    _row(facts, "held out by", str(summary["held_out_by"]))
    skipped = summary["skipped"]
    if skipped:
        shown = ", ".join(f"{name} ({why})" for name, why in skipped[:3])
        _row(facts, "skipped", f"{len(skipped):,} files: {shown}{', ...' if len(skipped) > 3 else ''}")
    for i, (name, tokens) in enumerate(summary["longest"][:3]):
        _row(facts, "" if i else "longest", f"{tokens:,} tokens", name)
    _row(facts, "folder", summary["folder"])
    return Group(table, facts)


def facts_view(title: str, facts: Mapping[str, Any]) -> RenderableType:
    """Names and values, one a line."""
    table = _table(title)
    for name, value in facts.items():
        _row(table, name.replace("_", " "), f"{value:,}" if isinstance(value, int) else _number(value))
    return table


def tasks_view(title: str, tasks: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """Metrics by task, one a line."""
    table = _table(title)
    for task, found in tasks.items():
        for i, (name, value) in enumerate(found.items()):
            table.add_row("" if i else visible(task), Text(visible(name)), Text(_number(value)))
    return table


def _table(title: str | None) -> Table:
    heading = None if title is None else Text(visible(title), style="bold cyan")
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = heading, "left"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    return table


def _row(table: Table, name: str, value: str, remark: str = "") -> None:
    table.add_row(name, Text(visible(value)), Text(visible(remark)))


def _counts(table: Table, name: str, counts: Mapping[str, Any], style: str = "") -> None:
    numbers = (f"{counts['documents']:,}", f"{counts['bytes']:,}", f"{counts['tokens']:,}")
    table.add_row(visible(name), *numbers, f"{counts['bytes_per_token']:.2f}", style=style)


def _share(model: Mapping[str, int], name: str) -> str:
    return f"{model[name] / model['parameters']:.0%} of all"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
