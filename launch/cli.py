"""The command line. It reads arguments and shows results; what is done is done by the folders below.

What needs torch is imported within the command that needs it: help, and errors in a file, come at once.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moesaic import __version__
from moesaic.launch.output import AsJson, examples, print_json, print_view
from moesaic.launch.trace import trace

TRACEBACK = "MOESAIC_TRACEBACK"


class _Commands(TyperGroup):
    """Turns a user's mistakes into one line and exit code 2, and Ctrl-C into a quiet 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that has left is not an error
            return result
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:  # such as `moesaic schema | head`: whoever read has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (ValueError, OSError) as error:
            if os.environ.get(TRACEBACK, "0") not in ("", "0"):
                raise
            if isinstance(error, OSError) and error.filename is not None:
                message = f"{error.filename}: {error.strerror}"
            else:
                message = str(error)
            if not getattr(error, "told", False):
                print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2) from None


app = typer.Typer(
    name="moesaic",
    cls=_Commands,
    help="Train sparse transformers: exact mixtures of experts, from one YAML file.",
    epilog="Start here: `moesaic train debug` takes 20 seconds, `moesaic train quickstart` a few minutes. "
    "A mistake in a config is one line; MOESAIC_TRACEBACK=1 shows where it came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Prepare a corpus, or look at one.")
app.add_typer(data, name="data")
app.add_typer(trace, name="trace")

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", show_default=False, help="A YAML file, or the name of a shipped config."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", show_default=False, help="Keys of the config to change, as a.b=value."
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", show_default=False, help="A run's folder, or its name within `runs`.")
]
Step = Annotated[int | None, typer.Option(show_default="the newest", help="Checkpoint to use.")]


def main() -> None:
    """Entry point of the `moesaic` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moesaic {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command(
    epilog=examples(
        "moesaic train quickstart",
        "moesaic train my.yaml name=second train.steps=2000 model.ffn.router.k=4",
        "moesaic train my.yaml --resume",
    )
)
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Record a trace of a few steps.")] = False,
) -> None:
    """Train a model.

    Everything of a run goes to `<dir>/<name>/`: the resolved config, metrics, log, checkpoints. An existing run is
    never overwritten. Ctrl-C saves and stops; `--resume` continues.
    """
    from moesaic.launch.config import read_run, run_to_yaml

    run = read_run(config, overrides or (), world_size=_world_size())
    from moesaic.train import session

    code = session.train(run, run_to_yaml(run), resume=resume, profile=profile, command=sys.argv)
    raise SystemExit(code)


@app.command(
    name="eval", epilog=examples("moesaic eval runs/quickstart", "moesaic eval quickstart --step 400 --json")
)
def evaluate(
    run: RunArgument,
    step: Step = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, show_default="all", help="Held-out tokens to evaluate on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss of a trained model.

    In nats per token and in bits per byte, which compares across tokenizers.
    """
    folder, config = _read_back(run)
    from moesaic.train.evaluate import evaluate_run

    result = evaluate_run(config, folder, step=step, tokens=tokens)
    if as_json:
        print_json(result)
        return
    from moesaic.launch.reports import facts_view

    print_view(facts_view(folder.name, result))


@app.command(
    name="lm-eval",
    epilog=examples(
        "moesaic lm-eval runs/moe_1b --tasks hellaswag,arc_easy",
        "moesaic lm-eval quickstart --tasks mine --include-path tasks --json",
    ),
)
def lm_eval(
    run: RunArgument,
    tasks: Annotated[str, typer.Option(show_default=False, help="Names of tasks, with commas between.")],
    include_path: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder with tasks of your own, as YAML.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, show_default="all", help="Documents of each task.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, show_default="the task's own", help="Examples before each question.")
    ] = None,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Tasks of the Language Model Evaluation Harness.

    Needs the extra `eval`: pip install 'moesaic[eval]'. Most tasks download their data.
    """
    folder, config = _read_back(run)
    try:
        from moesaic.train.lm_eval import evaluate_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "lm-eval is not installed; it comes with the extra `eval`: pip install 'moesaic[eval]'"
        ) from None

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    result = evaluate_tasks(
        config, folder, names, include_path=include_path, limit=limit, shots=shots, step=step
    )
    if as_json:
        print_json(result)
        return
    from moesaic.launch.reports import tasks_view

    print_view(tasks_view(f"{folder.name}, step {result['step']}", result["tasks"]))


@app.command(
    epilog=examples(
        "moesaic generate runs/quickstart --prompt 'def main():'",
        "moesaic generate quickstart --prompt 'import os' --prompt 'class A:' --json",
    )
)
def generate(
    run: RunArgument,
    prompt: Annotated[
        list[str], typer.Option(show_default=False, help="How a text begins; give it again for more texts.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens with this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Let a trained model continue texts."""
    folder, config = _read_back(run)
    from moesaic.train.generate import generate_run

    texts = generate_run(
        config,
        folder,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        step=step,
    )
    if as_json:
        print_json([{"prompt": each, "text": text} for each, text in zip(prompt, texts, strict=True)])
        return
    from moesaic.train.units import visible

    for i, (each, text) in enumerate(zip(prompt, texts, strict=True)):
        if i:
            print("-" * 40)
        print(visible(each + text))


@app.command(
    epilog=examples(
        "moesaic report runs/quickstart",
        "moesaic report quickstart quickstart_dense --out compared.html",
    )
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", show_default=False, help="Folders of runs, or names within `runs`."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default="report.html, in the run's folder or here", help="File to write."
        ),
    ] = None,
) -> None:
    """Draw runs as one HTML page.

    Loss, expert loads, router health, speed, texts, config and machine, in a file that needs no network. Several runs
    are compared in the same charts. `train` draws it at the end of every run; it may be drawn while a run goes on.
    """
    folders = list({folder.resolve(): folder for folder in map(find_run, runs)}.values())
    from moesaic.train.report import write_report
    from moesaic.train.run_log import read_log

    logs = [_with_sizes(read_log(folder)) for folder in folders]
    out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    write_report(logs, out)
    for log in logs:
        for note in log.notes:
            print(f"note: {note}", file=sys.stderr)
    print(out)


@app.command(
    epilog=examples(
        "moesaic inspect quickstart",
        "moesaic inspect quickstart model.ffn.num_experts=64 --json",
        "moesaic inspect my.yaml --ranks 64",
    )
)
def inspect(
    config: ConfigArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, show_default="of the layout", help="Processes that the run would have."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs and memory of a config, the latter per process.

    Nothing is allocated, and the corpus is not read. `active` parameters are those that one token uses.
    """
    facts = _inspect(config, overrides or [], ranks)
    if as_json:
        print_json(facts)
        return
    from moesaic.launch.reports import inspect_view

    print_view(inspect_view(facts))


@app.command(
    epilog=examples(
        "moesaic audit quickstart", "moesaic audit my.yaml --ranks 4 parallel.dp_replicate=2 --json"
    )
)
def audit(
    config: ConfigArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, show_default="of the layout, at least 2", help="Processes to start.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove a layout exact against one process.

    A shrunken model takes two steps on this machine's CPU in float64, with the config's layout, accumulation and
    recomputation, on uneven documents and padding. Exit code 1 where losses, gradients, norm, or weights and router
    biases after a step differ by more than 1e-10.
    """
    # before torch looks: autograd has a thread for every GPU that it sees, and a fork of a process with threads fails
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from moesaic.launch.config import read_run

    run = read_run(config, overrides or (), world_size=None)
    from moesaic.train.audit import audit as audit_run

    found = audit_run(run, ranks=ranks)
    if as_json:
        print_json(found.as_dict())
    else:
        from moesaic.launch.reports import audit_view

        print_view(audit_view(found.as_dict()))
    raise SystemExit(0 if found.passed else 1)


@data.command(
    epilog=examples("moesaic data prepare quickstart", "moesaic data prepare my.yaml data.workers=8")
)
def prepare(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Tokenize a corpus into its cache.

    `train` does it too where it was not done before. May be interrupted, and continues where it was.
    """
    prepared = _prepared(config, overrides or [])
    summary = prepared.summary()
    corpora = summary.get("parts", {"": summary})
    for name, part in corpora.items():
        told = f"{part['tokens']:,} tokens of {part['documents']:,} documents in {part['folder']}"
        print(f"{name}: {told}" if name else told)


@data.command(epilog=examples("moesaic data stats quickstart", "moesaic data stats my.yaml --json"))
def stats(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Documents, bytes and tokens of a corpus.

    It is prepared first where it was not.
    """
    summary = _prepared(config, overrides or []).summary()
    if as_json:
        print_json(summary)
        return
    from moesaic.launch.reports import stats_view

    print_view(stats_view(summary))


@app.command(epilog=examples("moesaic schema > moesaic.schema.json"))
def schema() -> None:
    """JSON Schema of config files, for editors.

    With the YAML language server, begin a config with `# yaml-language-server: $schema=moesaic.schema.json`.
    """
    from moesaic.launch import schema as schemas
    from moesaic.train.config import RunConfig

    print_json(schemas.schema(RunConfig))


def find_run(path_or_name: str) -> Path:
    """The folder of a run, by path or by name within `runs`. ValueError says which runs there are."""
    for folder in (Path(path_or_name).expanduser(), Path("runs") / path_or_name):
        if (folder / "config.yaml").is_file():
            return folder
    runs = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    known = f"runs here: {', '.join(runs)}" if runs else "there is no run in ./runs either"
    raise ValueError(f"{path_or_name}: no run there (a folder with config.yaml); {known}")


def _read_back(run: str) -> tuple[Path, Any]:
    from moesaic.launch.config import read_run

    folder = find_run(run)
    return folder, read_run(folder / "config.yaml", world_size=None)


def _with_sizes(log: Any) -> Any:
    """A run's log with its parameters; with a note where its config or tokenizer cannot be read any more."""
    from moesaic.data.tokenizer import load_tokenizer
    from moesaic.launch.config import read_run
    from moesaic.models.accounting import account

    try:
        run = read_run(log.folder / "config.yaml", world_size=None)
        size = account(run.model, load_tokenizer(log.folder / "tokenizer").vocab, seq_len=run.data.seq_len)
    except ValueError as error:
        return replace(log, notes=[*log.notes, f"{error} (so the page does not tell the parameters)"])
    return replace(log, parameters=size.parameters, active_parameters=size.active_parameters)


def _inspect(config: str, overrides: list[str], ranks: int | None) -> dict[str, Any]:
    from moesaic.launch.config import read_run

    run = read_run(config, overrides, world_size=ranks)
    ranks = ranks or run.parallel.ranks
    from moesaic.data.prepare import vocab_of
    from moesaic.models.accounting import account, meta_model
    from moesaic.train.device import choose_device, precision_name
    from moesaic.train.memory import estimate
    from moesaic.train.optim import parameter_groups
    from moesaic.train.words import layout_in_words

    vocab = vocab_of(run.data)
    model = account(run.model, vocab, seq_len=run.data.seq_len)
    parameter_groups(meta_model(run.model, vocab), run.optim)
    device = choose_device(run.train)
    tokens = run.train.steps * run.train.batch_tokens
    return {
        "name": run.name,
        "vocab": vocab,
        "model": model.as_dict(),
        "training": {
            "steps": run.train.steps,
            "batch_tokens": run.train.batch_tokens,
            "tokens": tokens,
            "flops": tokens * model.train_flops_per_token,
        },
        "device": str(device.device),
        "precision": precision_name(device.dtype),
        "precision_reason": device.why_dtype,
        "ranks": ranks,
        "layout": layout_in_words(run, ranks),
        "memory": estimate(run, vocab, dtype=device.dtype, device=device.device.type, ranks=ranks),
    }


def _prepared(config: str, overrides: list[str]) -> Any:
    from moesaic.launch.config import read_run

    run = read_run(config, overrides, world_size=None)
    from rich.console import Console

    from moesaic.data.prepare import prepare as prepare_corpus
    from moesaic.train.display import Display

    with Display(steps=run.train.steps, every=run.log.every, console=Console(stderr=True)) as display:
        return prepare_corpus(run.data, report=display.preparing)


def _world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
