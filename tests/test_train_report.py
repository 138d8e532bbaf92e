"""The report: what it tells of one run and of several, of damaged folders, and that it never harms a run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moesaic.data.config import ByteTokenizer, TextData
from moesaic.launch import cli
from moesaic.launch.config import run_to_yaml
from moesaic.models.transformer import Transformer
from moesaic.moe import MoE, TopKRouter
from moesaic.train import session
from moesaic.train.checkpoints import CheckpointConfig
from moesaic.train.config import EvalConfig, LogConfig, RunConfig, TrainConfig
from moesaic.train.optim import AdamWConfig, Cosine
from moesaic.train.report import render, write_report
from moesaic.train.run_log import ReportError, read_log

CONFIG: dict[str, Any] = {"name": "tiny", "train": {"steps": 40, "batch_tokens": 64}, "optim": {"lr": 0.1}}
RANK_CHARTS = [f"report_ranks.{name}" for name in ("wait_chart", "rows_chart", "stack_chart")]
START = {"started": "2030-01-01", "command": "moesaic train tiny", "packages": {"torch": "2.99"}, "gpus": []}


@pytest.fixture
def drawn() -> None:
    """For tests that want real charts: they take most of the time."""


@pytest.fixture(autouse=True)
def stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        for name in ("figures.line_chart", "report.load_chart", *RANK_CHARTS):
            monkeypatch.setattr(f"moesaic.train.{name}", lambda *_, **__: "<svg></svg>")


def make_run(folder: Path, *, name: str = "tiny", layers: int = 2, records: int = 20) -> Path:
    """A run's folder as `train` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"name": name}))
    (folder / "environment.json").write_text(json.dumps([START | {"outcome": "finished"}]))
    (folder / "samples.txt").write_text("=== step 40, sample 1\nif a < b & c: <script>x</script>\x1b[0m\n\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(2, 2 * records + 1, 2):
            file.write(json.dumps(record(step, layers)) + "\n")
            if step % 10 == 0:
                file.write(
                    json.dumps({"step": step, "eval/loss": 5 - step / 20, "eval/bits_per_byte": 2.5}) + "\n"
                )
    return folder


def record(step: int, layers: int) -> dict[str, Any]:
    values: dict[str, Any] = {"step": step, "tokens": step * 64, "train/loss": 5 - step / 25, "train/lr": 0.1}
    values |= {"train/bits_per_byte": None if step == 2 else 2.0, "train/grad_norm": 1.0}
    values |= {"time/seconds": step / 2, "time/tokens_per_second": 128.0, "time/memory": 2**30}
    if layers:
        values |= {"experts/max_vio": 1.0, "experts/load_entropy": 0.9, "experts/dead": 1}
    for layer in range(layers):
        names = {
            "max_vio": 1.0,
            "load_entropy": 0.9,
            "router_entropy": 1.2,
            "dead": 1,
            "load": [0.5, 0.25, 0.25, 0],
        }
        values |= {f"layer_{layer:02d}/{key}": value for key, value in names.items()}
    return values


def command(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["report", *arguments])
    assert result.exit_code == code, result.output
    return result


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


def test_a_sparse_run_is_told_whole(tmp_path: Path, drawn: None) -> None:
    log = replace(read_log(make_run(tmp_path / "a")), parameters=12_300_000, active_parameters=4_100_000)
    page = render([log])
    assert titles(page) == [
        "Loss",
        "Bits per byte",
        "Expert load",
        "MaxVio",
        "Entropy of the load",
        "Entropy of the router",
        "Dead experts",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Memory",
    ]
    for text in (
        "tiny",
        "finished",
        "12.3M",
        "4.10M",
        "33% of all",
        "2.56k",
        "40 steps",
        "20s",
        "3.000",
        "2.500",
    ):
        assert text in page, text
    for text in ("1.00 GiB", "layer 1", "moesaic train tiny", "torch 2.99", "batch_tokens: 64", "held-out"):
        assert text in page, text
    assert log.notes == []
    assert page.count("<svg") == 11
    assert "<!--" not in page


def test_the_page_needs_nothing_from_outside(tmp_path: Path, drawn: None) -> None:
    page = render([read_log(make_run(tmp_path / "a"))])
    assert "<script" not in page
    assert "<link" not in page
    assert "default-src 'none'" in page
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(source.startswith(("#", "data:")) for source in sources)


def test_texts_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", name="<b>&$x_1$")
    (folder / "environment.json").write_text(json.dumps([START | {"command": "<i>"}]))
    page = render([read_log(folder)])
    assert "if a &lt; b &amp; c: &lt;script&gt;x&lt;/script&gt;\\x1b[0m" in page
    assert "&lt;b&gt;&amp;$x_1$" in page
    assert "<b>&" not in page
    assert "<i>" not in page.replace("<i></i>", "")


def test_loads_are_relative_to_the_mean(tmp_path: Path) -> None:
    loads = read_log(make_run(tmp_path / "a")).loads
    assert loads is not None
    assert loads.layers[1][:, 0].tolist() == [2, 1, 1, 0]
    assert loads.tokens[-1] == 40 * 64


def test_a_dense_run_has_no_routers(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "a", layers=0))
    assert log.loads is None
    page = render([log])
    assert titles(page) == ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput", "Memory"]
    assert "Experts" not in page


def own(folder: Path, waited: dict[int, list[float]], *, sent: int = 3 << 20) -> Path:
    """Let a run's records tell of ranks that own experts, from each of these steps on; an empty list: of none."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        now = waited[max(first for first in waited if first <= line["step"])]
        if "train/loss" in line and now:
            line |= {"traffic/rows": [3] * len(now), "traffic/rows_max_over_mean": 1.0, "time/waited": now}
            line |= {"traffic/bytes_tokens": sent, "traffic/bytes_counts": 512, "traffic/bytes_weights": 0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_ranks_that_own_experts_have_a_section(tmp_path: Path, drawn: None) -> None:
    log = read_log(own(make_run(tmp_path / "a"), {0: [0.05, 0.1]}))
    assert "time/waited" in log.of_ranks
    assert log.of_ranks["time/waited"].values[:, 3] == pytest.approx(
        [0.1, 0.2]
    )  # a step takes 64 / 128 seconds
    assert log.of_ranks["time/waited"].tokens[[0, -1]].tolist() == [2 * 64, 40 * 64]
    page = render([log])
    assert "<h2>Ranks</h2>" in page
    assert titles(page)[7:10] == ["Waiting", "Rows of the busiest rank", "Bytes sent"]
    assert "<span>0</span><i></i><span>&ge; 50%</span>" in page
    assert "no such rank" not in page
    cells = re.search(r"<th>tokens</th>(.*?)</tr>", page[page.index("Bytes sent") :])
    assert cells is not None
    assert cells.group(1).startswith("<td>3.00 MiB</td><td>rows to experts")
    assert "<tr><th>all</th><td>3.00 MiB</td>" in page
    assert "<tr><th>gradients</th><td>-</td>" in page  # not recorded


def test_a_run_on_changing_ranks_has_gaps_in_its_map(tmp_path: Path, drawn: None) -> None:
    waits = {0: [], 10: [0.1], 20: [0.1, 0.2, 0.3], 30: [0.1, 0.2]}
    log = read_log(own(make_run(tmp_path / "a"), waits))
    assert "time/waited" in log.of_ranks
    assert log.of_ranks["time/waited"].values.shape[0] == 3
    of_step = dict(
        zip(
            (log.of_ranks["time/waited"].tokens / 64).tolist(),
            log.of_ranks["time/waited"].values.T.tolist(),
            strict=True,
        )
    )
    assert of_step[8] == pytest.approx([math.nan] * 3, nan_ok=True)
    assert of_step[12] == pytest.approx([0.2, math.nan, math.nan], nan_ok=True)
    assert of_step[22] == pytest.approx([0.2, 0.4, 0.6])
    assert of_step[32] == pytest.approx([0.2, 0.4, math.nan], nan_ok=True)
    assert "grey: no such rank" in render([log])


def test_runs_with_and_without_owned_experts_are_compared(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "a", name="plain")
    assert read_log(plain).of_ranks == {}
    assert "<h2>Ranks</h2>" not in render([read_log(plain)])
    owned = [
        own(make_run(tmp_path / name, name=name), {0: [0.1] * 2}, sent=sent << 10)
        for name, sent in (("<two>", 2), ("four", 4))
    ]
    page = render([read_log(folder) for folder in (plain, *owned)])
    assert titles(page).count("Waiting: four") == 1
    assert "Waiting: plain" not in titles(page)
    assert "<thead><tr><th>class</th><th>&lt;two&gt;</th><th>four</th><th>what</th></tr></thead>" in page
    assert "<tr><th>tokens</th><td>2.00 KiB</td><td>4.00 KiB</td>" in page


def copy(folder: Path) -> Path:
    """Let a run's records tell of two ranks, of which the first has most rows, and of copies from step 20 on."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "train/loss" in line:
            late = line["step"] >= 20
            line |= {"traffic/rows": [4, 4] if late else [6, 2], "traffic/rows_alone": [6, 2]}
            line |= {"traffic/rows_max_over_mean": 1.0 if late else 1.5, "traffic/copies": [0, 6 * late]}
            line |= {"traffic/bytes_copies": late << 20, "traffic/bytes_copy_gradients": late << 20}
            line |= {"plan/copies": 3.0 * late, "plan/changed": float(line["step"] == 20)}
            line |= {"time/waited": [0.1, 0.0], "time/waited_for_copies": [0.0, 0.05]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_copies_have_charts_of_their_own(tmp_path: Path, drawn: None) -> None:
    folder = copy(make_run(tmp_path / "a"))
    (folder / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"train": CONFIG["train"] | {"micro_batch_tokens": 32}})
    )
    log = read_log(folder)
    assert log.copied
    rows, alone = (
        log.of_ranks[name].values[:, [0, -1]].T.tolist() for name in ("traffic/rows", "traffic/rows_alone")
    )
    assert (rows, alone) == ([[1.5, 0.5], [1.0, 1.0]], [[1.5, 0.5], [1.5, 0.5]])
    assert log.of_ranks["time/waited_for_copies"].values[:, 0] == pytest.approx([0.0, 0.1])
    assert log.of("traffic/rows_alone_max_over_mean").values[-1] == 1.5
    assert log.of("traffic/copies_used").values[-1] == 3.0  # six in two micro-batches
    page = render([log])
    ranks = titles(page)[7:16]
    assert ranks == [
        "Waiting",
        "Waiting for copies",
        "Rows of each rank",
        "Rows of each rank without copies",
        "Rows of the busiest rank",
        "Copies",
        "Bytes by class",
        "Changes of plan",
        "Bytes sent",
    ]
    assert page.count("<span>&le; &frac12;</span><i></i><span>&ge; 2</span>") == 2
    assert "no such rank" not in page
    assert "<tr><th>copy gradients</th><td>" in page
    without = titles(render([read_log(own(make_run(tmp_path / "b"), {0: [0.1, 0.1]}))]))
    assert not {"Copies", "Bytes by class", "Waiting for copies"} & set(without)


def test_several_runs_share_charts_and_a_table(tmp_path: Path) -> None:
    logs = [
        read_log(make_run(tmp_path / "a", name="one")),
        read_log(make_run(tmp_path / "b", name="two", layers=0)),
    ]
    page = render(logs)
    assert "2 runs compared" in page
    assert "Expert load: one" in titles(page)
    assert titles(page).count("Loss") == 1
    assert page.count('<li><i class="dash0" style="border-color: var(--c1)"></i>two</li>') == 6  # no routers
    assert re.search(r"<th>one</th><td class=\"good\">finished</td>", page)
    same = [replace(log, name="one") for log in logs]
    assert str(tmp_path / "b") in re.findall(r"<th>(.*?)</th>", render(same))


def test_keys_that_differ_are_listed(tmp_path: Path) -> None:
    first, second = (read_log(make_run(tmp_path / name)) for name in "ab")
    changed = replace(second, config={**CONFIG, "optim": {"lr": 0.2}})
    assert "<tr><th>optim.lr</th><td>0.1</td><td>0.2</td></tr>" in render([first, changed])
    assert "What differs" not in render([first, second])


def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "train/lo')
    result = command(str(folder))
    assert (
        f"note: {folder / 'metrics.jsonl'}: its last line is unfinished and was left out; --resume"
        in result.stderr
    )
    page = (folder / "report.html").read_text()
    assert "last line is unfinished" in page
    assert read_log(folder).step == 40
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "12", "{", *lines[1:-1]]))
    assert "2 lines are damaged and were left out (2, 3)" in command(str(folder)).stderr


def test_missing_pieces_become_notes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "samples.txt").unlink()
    (folder / "environment.json").write_text("[{")
    log = read_log(folder)
    assert [note.partition(": ")[0] for note in log.notes] == [
        str(folder / "environment.json"),
        str(folder / "samples.txt"),
    ]
    assert "Texts the model wrote" not in render([log])
    assert "Environment" not in render([log])


@pytest.mark.parametrize("content", ["", "\n", '{"ste'])
def test_no_record_is_an_error(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text(content)
    result = command(str(folder), code=2)
    assert result.stderr.startswith(f"error: {folder / 'metrics.jsonl'}: holds no record; ")
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "report.html").exists()
    (folder / "metrics.jsonl").unlink()
    assert f"error: {folder / 'metrics.jsonl'}: is not there" in command(str(folder), code=2).stderr


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        f"error: {tmp_path}: no run there (a folder with config.yaml)"
        in command(str(tmp_path), code=2).stderr
    )
    with pytest.raises(ReportError, match=r"is no run \(no config.yaml in it\)"):
        read_log(tmp_path)
    folder = make_run(tmp_path / "a")
    for content, message in (("a: [", "cannot be read as YAML"), ("12", "is not a mapping")):
        (folder / "config.yaml").write_text(content)
        assert message in command(str(folder), code=2).stderr


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    out = tmp_path / "missing" / "x.html"
    assert (
        f"error: {out}: cannot be written (No such file"
        in command(str(folder), "--out", str(out), code=2).stderr
    )


def test_the_command_writes_beside_the_run_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        make_run(tmp_path / "runs" / name, name=name)
    assert command("one").stdout.strip() == "runs/one/report.html"
    assert command("one", "two").stdout.strip() == "report.html"
    assert "2 runs compared" in Path("report.html").read_text()
    assert command("one", "two", "--out", "x.html").stdout.strip() == "x.html"
    assert (
        "runs compared" not in Path(command("one", "runs/one").stdout.strip()).read_text()
    )  # the same run twice
    assert not list(tmp_path.rglob("*.tmp"))


def test_outcomes_are_told_where_the_run_could_not_say(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "environment.json").write_text(json.dumps([START | {"outcome": "stopped by SIGINT"}, START]))
    assert read_log(folder).outcome == "finished"
    (folder / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"train": {"steps": 100, "batch_tokens": 64}})
    )
    log = read_log(folder)
    assert log.outcome == "not finished: step 40 of 100"
    assert "start 1 of 2" in render([log])
    only = replace(log, starts=log.starts[:1])
    assert '<span class="outcome open">stopped by SIGINT</span>' in render([only])


def test_evaluations_alone_are_enough(tmp_path: Path, drawn: None) -> None:
    folder = make_run(tmp_path / "a")
    lines = [
        {"step": step, "eval/loss": None if step == 20 else 3.0, "eval/bits_per_byte": 1.0}
        for step in (10, 20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_log(folder)
    assert log.tokens == 20 * 64
    assert log.best == (3.0, 1.0, 640.0)
    assert math.isnan(log.of("eval/loss").values[1])
    assert titles(render([log])) == ["Loss", "Bits per byte"]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"line < of file {number}\n" * 20)
    router = TopKRouter.Config(k=2, bias_rate=0.01)
    return RunConfig(
        name="run",
        dir=str(tmp_path / "runs"),
        model=Transformer.Config(
            dim=16, layers=2, heads=2, ffn=MoE.Config(num_experts=4, hidden=8, router=router)
        ),
        data=TextData(path=str(text), seq_len=16, tokenizer=ByteTokenizer(), eval_fraction=0.2, workers=1),
        train=TrainConfig(steps=6, batch_tokens=64, threads=1, precision="fp32"),
        optim=AdamWConfig(lr=0.01, schedule=Cosine(warmup=2)),
        checkpoint=CheckpointConfig(every=3),
        eval=EvalConfig(every=3, tokens=128, prompts=("line <",), sample_tokens=8),
        log=LogConfig(every=1, tensorboard=False),
    )


def train(run: RunConfig, *, resume: bool = False) -> int:
    return session.train(run, run_to_yaml(run), resume=resume, profile=False, command=["test", "<now>"])


def test_a_run_draws_its_report_however_it_ends(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(run.dir) / run.name
    with monkeypatch.context() as patch:
        patch.setattr(session.StopRequest, "signal", "SIGTERM", raising=False)
        patch.setattr(session.StopRequest, "__init__", lambda _: None)
        patch.setattr(session.StopRequest, "__enter__", lambda self: self)
        patch.setattr(session.StopRequest, "__exit__", lambda *_: None)
        assert train(run) == 0
    page = (folder / "report.html").read_text()
    assert "stopped by SIGTERM" in page
    assert "samples.txt: is not there" in page

    assert train(run, resume=True) == 0
    assert f"report       {folder / 'report.html'}"[:40] in capsys.readouterr().out.replace("\n", "")
    page = (folder / "report.html").read_text()
    assert '<span class="outcome good">finished</span>' in page
    assert "line &lt;" in page
    assert "start 2 of 2" in page
    assert "<small>active</small>" in page
    log = read_log(folder)
    assert log.notes == []
    assert log.of("train/loss").tokens.tolist() == [64 * step for step in range(1, 7)]  # none twice
    assert [start["outcome"] for start in log.starts] == ["stopped by SIGTERM", "finished"]
    assert log.outcome == "finished"

    command(str(folder))
    again = (folder / "report.html").read_text()
    assert re.sub(r"drawn .*<", "", again) == re.sub(r"drawn .*<", "", page)


@pytest.mark.parametrize(
    "error", [RuntimeError("no font"), ReportError("x: cannot be written"), ImportError("mpl")]
)
def test_a_report_that_fails_does_not_fail_the_run(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("moesaic.train.report.write_report", fail)
    assert train(run) == 0
    folder = Path(run.dir) / run.name
    log = (folder / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "no report was drawn" in line]
    assert str(error) in line
    assert f"moesaic report {folder}" in line
    assert "finished" in log
    assert not (folder / "report.html").exists()


def test_what_draws_is_imported_when_it_draws() -> None:
    """`moesaic train` starts without matplotlib and Jinja2."""
    sources = [path.read_text() for path in Path(session.__file__).parent.glob("*.py")]
    assert len(sources) > 20
    assert not [s for s in sources if re.search(r"^(import|from) (matplotlib|jinja2)", s, re.MULTILINE)]
    assert "\nfrom moesaic.train.report" not in Path(session.__file__).read_text()


def test_writing_replaces_the_page_whole(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "a"))
    path = tmp_path / "x.html"
    path.write_text("old")
    write_report([log], path)
    assert path.read_text().startswith("<!doctype html>")
