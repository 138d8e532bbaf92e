"""A trained run under the Language Model Evaluation Harness (github.com/EleutherAI/lm-evaluation-harness).

Needs the extra `eval`; nothing else imports this file but the command that uses it.
"""

# pyright: reportMissingImports=false

import logging
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from moesaic.train.assemble import print_warning, restore_run
from moesaic.train.config import RunConfig
from moesaic.train.scoring import Scorer

BOOTSTRAP = 1000
"""Resamples behind a standard error that has no formula."""
MAX_TOKENS = 256
"""Most tokens of a text that is written, unless its task says otherwise."""


class Harnessed(TemplateLM):
    """A model as the harness wants it. Every text begins a document, so its context begins with the mark.

    Where context and continuation are cut apart follows the harness: both are tokenized as one text.
    """

    def __init__(self, scorer: Scorer, *, seed: int = 0) -> None:
        super().__init__()
        self.scorer = scorer
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.mark

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, the mark before them unless `add_special_tokens` is False."""
        tokens = self.scorer.encode(string)
        return tokens[1:] if add_special_tokens is False else tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score([(context + rest, len(rest)) for _, context, rest in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than the model's sequences."""
        texts = [self.scorer.encode(request.args[0]) for request in requests]
        return [score.log_likelihood for score in self.scorer.score([(ids, len(ids) - 1) for ids in texts])]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, one at a time; the likeliest token at each step unless a task asks for samples."""
        return [self._write(request.args, number) for number, request in enumerate(requests)]

    def _write(self, asked: tuple[Any, ...], number: int) -> str:
        text, options = asked
        until = options.get("until") or []
        sampled = options.get("do_sample", False)
        return self.scorer.write(
            text,
            stops=[until] if isinstance(until, str) else until,
            max_tokens=int(options.get("max_gen_toks") or MAX_TOKENS),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            seed=self.seed + number,
        )


def evaluate_tasks(
    run: RunConfig,
    folder: Path,
    tasks: list[str],
    *,
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    step: int | None,
) -> dict[str, Any]:
    """Metrics of the run in `folder` on the harness's tasks, and those in `include_path`, by task and metric.

    Raises ValueError where there is no such task or checkpoint.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path: {include_path} is not a folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not tasks:
        raise ValueError("--tasks: names no task")
    manager = task_manager(tasks, include_path)
    restored = restore_run(run, folder, step=step, say=print_warning)
    scorer = Scorer(
        model=restored.model,
        tokenizer=restored.tokenizer,
        seq_len=run.data.seq_len,
        batch_tokens=run.micro_batch_rows * run.data.seq_len,
        dtype=restored.compute.dtype,
    )
    evaluate: Any = simple_evaluate  # whose decorator hides its parameters
    found = evaluate(
        Harnessed(scorer, seed=run.seed),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
    )
    assert found is not None  # it is on other ranks only
    return {"step": restored.step, "tasks": {name: metrics(each) for name, each in found["results"].items()}}


def task_manager(tasks: list[str], include_path: Path | None) -> TaskManager:
    """What finds the tasks; the harness's own, whose index takes many seconds, are looked at only where needed."""
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"--tasks: no such task {task!r}; --include-path names a folder with more of them"
            )
    return manager


def metrics(result: Any) -> dict[str, float]:
    """The numbers of one task; the harness writes `acc,none` for the metric acc under the filter none."""
    return {
        name.removesuffix(",none"): value
        for name, value in result.items()
        if isinstance(value, int | float) and "," in name
    }
