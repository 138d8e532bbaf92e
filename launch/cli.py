"""The command line. It reads arguments and shows results; what is done is done by the folders below.

What needs torch is imported within the command that needs it: help, and errors in a file, come at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moesaic import __version__

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Step = Annotated[int | None, typer.Option(show_default="the newest", help="Checkpoint to use.")]


def _examples(*lines: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])  # \b: keep the line breaks


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
    epilog=_examples(
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
    name="eval", epilog=_examples("moesaic eval runs/quickstart", "moesaic eval quickstart --step 400 --json")
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
        _print_json(result)
        return
    from moesaic.launch.reports import facts_view

    _print(facts_view(folder.name, result))


@app.command(
    name="lm-eval",
    epilog=_examples(
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
        _print_json(result)
        return
    from moesaic.launch.reports import tasks_view

    _print(tasks_view(f"{folder.name}, step {result['step']}", result["tasks"]))


@app.command(
    epilog=_examples(
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
        _print_json([{"prompt": each, "text": text} for each, text in zip(prompt, texts, strict=True)])
        return
    from moesaic.train.units import visible

    for i, (each, text) in enumerate(zip(prompt, texts, strict=True)):
        if i:
            print("-" * 40)
        print(visible(each + text))


@app.command(
    epilog=_examples(
        "moesaic inspect quickstart", "moesaic inspect quickstart model.ffn.num_experts=64 --json"
    )
)
def inspect(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Parameters, FLOPs and memory of a config.

    Nothing is allocated, and the corpus is not read. `active` parameters are those that one token uses.
    """
    facts = _inspect(config, overrides or [])
    if as_json:
        _print_json(facts)
        return
    from moesaic.launch.reports import inspect_view

    _print(inspect_view(facts))


@data.command(
    epilog=_examples("moesaic data prepare quickstart", "moesaic data prepare my.yaml data.workers=8")
)
def prepare(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Tokenize a corpus into its cache.

    `train` does it too where it was not done before. May be interrupted, and continues where it was.
    """
    prepared = _prepared(config, overrides or [])
    summary = prepared.summary()
    print(f"{summary['tokens']:,} tokens of {summary['documents']:,} documents in {summary['folder']}")


@data.command(epilog=_examples("moesaic data stats quickstart", "moesaic data stats my.yaml --json"))
def stats(config: ConfigArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Documents, bytes and tokens of a corpus.

    It is prepared first where it was not.
    """
    summary = _prepared(config, overrides or []).summary()
    if as_json:
        _print_json(summary)
        return
    from moesaic.launch.reports import stats_view

    _print(stats_view(summary))


@app.command(epilog=_examples("moesaic schema > moesaic.schema.json"))
def schema() -> None:
    """JSON Schema of config files, for editors.

    With the YAML language server, begin a config with `# yaml-language-server: $schema=moesaic.schema.json`.
    """
    from moesaic.launch import schema as schemas
    from moesaic.train.config import RunConfig

    _print_json(schemas.schema(RunConfig))


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
    return folder, read_run(folder / "config.yaml")


def _inspect(config: str, overrides: list[str]) -> dict[str, Any]:
    from moesaic.launch.config import read_run

    run = read_run(config, overrides, world_size=_world_size())
    from moesaic.data.tokenizer import expected_vocab
    from moesaic.models.accounting import account
    from moesaic.train.device import choose_device, precision_name
    from moesaic.train.memory import estimate

    vocab = expected_vocab(run.data.tokenizer)
    model = account(run.model, vocab, seq_len=run.data.seq_len)
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
        "memory": estimate(run, vocab, dtype=device.dtype, device=device.device.type),
    }


def _prepared(config: str, overrides: list[str]) -> Any:
    from moesaic.launch.config import read_run

    run = read_run(config, overrides, world_size=_world_size())
    from rich.console import Console

    from moesaic.data.prepare import prepare as prepare_corpus
    from moesaic.train.display import Display

    with Display(steps=run.train.steps, every=run.log.every, console=Console(stderr=True)) as display:
        return prepare_corpus(run.data, report=display.preparing)


def _world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _print(view: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(view)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
