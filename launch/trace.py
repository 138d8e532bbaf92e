"""`moesaic trace`: make routing traces, convert published ones, and look at them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moesaic.launch.output import AsJson, examples, print_json, print_view

trace = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make, convert or look at a routing trace."
)

Kind = Literal["R1", "R2", "R3", "R4", "R5", "skewed"]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="File to write, .npz.")]


@trace.command(
    epilog=examples(
        "moesaic trace generate R2 coarse.npz --experts 16 --sources 8 --k 2",
        "moesaic trace generate skewed hot.npz --experts 16 --sources 2 --peak 1.8",
    )
)
def generate(
    kind: Annotated[Kind, typer.Argument(show_default=False, help="A regime, or `skewed`.")],
    out: OutArgument,
    steps: Annotated[int, typer.Option(help="Steps; training that is longer begins anew.")] = 100,
    layers: Annotated[int, typer.Option(help="Sparse layers.")] = 4,
    sources: Annotated[int, typer.Option(help="Ranks that have tokens.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of a source and step.")] = 2048,
    k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same trace.")] = 0,
    peak: Annotated[float, typer.Option(help="Load of the busiest rank over the mean, for `skewed`.")] = 1.5,
    ranks: Annotated[
        int | None, typer.Option(min=1, show_default="as sources", help="Owners of experts, for `skewed`.")
    ] = None,
) -> None:
    """Make a trace up.

    R1: early training, moving fast. R2: coarse experts without balancing. R3: fine experts, balanced on average. R4:
    fine-tuning on one domain. R5: uniform. skewed: one rank's experts have more than their share, in every step alike.
    """
    from moesaic.moe.regimes import Shape, skewed
    from moesaic.moe.regimes import generate as make

    shape = Shape(steps=steps, layers=layers, sources=sources, experts=experts, tokens=tokens, k=k)
    owners = ranks or sources
    made = skewed(shape, ranks=owners, peak=peak) if kind == "skewed" else make(kind, shape, seed=seed)
    made.save(out)
    print(out)


@trace.command(epilog=examples("moesaic trace convert SmartMoE-AE/moe_trace smartmoe.npz"))
def convert(
    folder: Annotated[Path, typer.Argument(show_default=False, help="Folder of table_iter*_rank*.log.")],
    out: OutArgument,
    k: Annotated[int, typer.Option(help="Experts per token of the model that was traced.")] = 2,
) -> None:
    """Convert the trace that was published with SmartMoE.

    It is the folder moe_trace of the repository thu-pacman/SmartMoE-AE (GPL-3.0): 16 ranks, 24 layers of 32 experts.
    """
    from moesaic.moe.smartmoe import convert_smartmoe

    convert_smartmoe(folder, k=k).save(out)
    print(out)


@trace.command(
    epilog=examples(
        "moesaic trace show coarse.npz", "moesaic trace show runs/debug/routing.npz --ranks 4 --json"
    )
)
def show(
    file: Annotated[Path, typer.Argument(show_default=False, help="A routing trace, .npz.")],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, show_default="as sources", help="Ranks that share the experts evenly."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How uneven a trace is, and how fast it moves.

    Medians and 95th percentiles over steps and layers; `moved` is the share of the load that goes to other experts than
    in the step before.
    """
    import numpy as np

    from moesaic.moe.trace import load_trace
    from moesaic.moe.trace_stats import trace_stats
    from moesaic.parallel.placement import even_owners

    found = load_trace(file)
    ranks = min(found.sources, found.experts) if ranks is None else ranks
    if ranks > found.experts:
        raise ValueError(f"--ranks: {ranks} is more than the {found.experts} experts of {file}")
    owners = np.array(even_owners({"experts": found.experts}, ranks).owners["experts"])
    facts: dict[str, Any] = trace_stats(found, owners)
    if as_json:
        print_json(facts)
        return
    from moesaic.launch.reports import trace_view

    print_view(trace_view(file.name, facts))
