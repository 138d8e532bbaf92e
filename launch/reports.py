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
        table,
        "memory" if facts["ranks"] == 1 else f"memory, each of {facts['ranks']} processes",
        size(sum(memory.values())),
        "estimated; work space of single operations comes on top",
    )
    for name, value in memory.items():
        _row(table, f"  {name}", size(value))
    return table


def audit_view(found: Mapping[str, Any]) -> RenderableType:
    """The worst finding of each kind of value, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", title_justify="left")
    table.title = (
        f"{found['name']} on {found['ranks']} {'rank' if found['ranks'] == 1 else 'ranks'}: {found['layout']}"
    )
    table.add_column("")
    table.add_column("largest error", justify="right")
    table.add_column("factor", justify="right")
    table.add_column("worst at")
    worst: dict[str, Mapping[str, Any]] = {}
    for finding in found["findings"]:
        if finding["what"] not in worst or not finding["error"] <= worst[finding["what"]]["error"]:
            worst[finding["what"]] = finding
    for what, finding in worst.items():
        style = "" if finding["passed"] else "bold red"
        where = f"step {finding['step']}, {finding['where']}" if finding["error"] else "exact"
        table.add_row(what, f"{finding['error']:.1e}", f"{finding['scale']:.3f}", where, style=style)
    failed = sum(not finding["passed"] for finding in worst.values())
    limit = f"{found['limit']:.0e}"
    verdict = (
        Text(f"passed: every value is within {limit} of one process", style="bold green")
        if not failed
        else Text(
            f"FAILED: {failed} of {len(worst)} kinds of values differ by more than {limit}", style="bold red"
        )
    )
    return Group(table, verdict)


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
    if "parts" not in summary:
        _corpus_rows(facts, summary)
    for name, part in summary.get("parts", {}).items():
        _row(facts, name, f"{part['weight']:.3%} of the training sequences, {part['kind']}")
        _corpus_rows(facts, part, "  ")
    return Group(table, facts)


def facts_view(title: str, facts: Mapping[str, Any]) -> RenderableType:
    """Names and values, one a line."""
    table = _table(title)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            for part, inner in value.items():
                _row(
                    table,
                    part,
                    ", ".join(
                        f"{each.replace('_', ' ')} {_number(inner[each])}"
                        for each in inner
                        if each != "parts"
                    ),
                )
        else:
            _row(table, name.replace("_", " "), _number(value))
    return table


def trace_view(title: str, facts: Mapping[str, Any]) -> RenderableType:
    """The numbers of a routing trace, one a line."""
    table = _table(title)
    steps = f"{facts['steps']:,}"
    _row(table, "steps", steps, f"from {facts['first_step']:,} to {facts['last_step']:,}")
    for name in ("layers", "sources", "experts", "k"):
        _row(table, name, _number(facts[name]))
    names = {
        "tokens": "tokens of a step",
        "expert_max_over_mean": "busiest expert over mean",
        "rank_max_over_mean": f"busiest of {facts['ranks']} ranks over mean",
        "top4_share": "share of the busiest four experts",
        "moved": "share that moves at each step",
        "zipf_exponent": "Zipf exponent",
    }
    for key, name in names.items():
        found = facts[key]
        median, high = (
            ("-", "-") if found is None else (trace_number(found[each]) for each in ("median", "p95"))
        )
        _row(table, name, median, f"95th percentile {high}")
    return table


def trace_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


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
    numbers = (_number(counts[each]) for each in ("documents", "bytes", "tokens"))
    ratio = counts["bytes_per_token"]
    table.add_row(visible(name), *numbers, "-" if ratio is None else f"{ratio:.2f}", style=style)


def _share(model: Mapping[str, int], name: str) -> str:
    return f"{model[name] / model['parameters']:.0%} of all"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _corpus_rows(facts: Table, summary: Mapping[str, Any], indent: str = "") -> None:
    """Files, split, what was left out, longest documents and folder of one corpus."""
    _row(facts, f"{indent}files", f"{summary['files']:,}, {summary['duplicates']:,} duplicates left out")
    _row(facts, f"{indent}held out by", str(summary["held_out_by"]))
    skipped = summary["skipped"]
    if skipped:
        shown = ", ".join(f"{name} ({why})" for name, why in skipped[:3])
        _row(
            facts, f"{indent}skipped", f"{len(skipped):,} files: {shown}{', ...' if len(skipped) > 3 else ''}"
        )
    for i, (name, tokens) in enumerate(summary["longest"][:3]):
        _row(facts, "" if i else f"{indent}longest", f"{tokens:,} tokens", name)
    _row(facts, f"{indent}folder", summary["folder"])
