"""What commands share: examples in their help, and tables or JSON on standard output."""

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def examples(*lines: str) -> str:
    """Commands below a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])  # \b: keep the line breaks


def print_view(view: Any) -> None:
    """Show what rich can draw."""
    from rich.console import Console

    Console(highlight=False).print(view)


def print_json(value: Any) -> None:
    """Plain values as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False))
