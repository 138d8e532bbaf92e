import io
from typing import Any

from rich.console import Console, RenderableType

from moesaic.launch.reports import facts_view, inspect_view, stats_view, tasks_view


def lines(view: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(view)
    found = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, found)) <= width
    return [" ".join(line.split()) for line in found]


INSPECTED: dict[str, Any] = {
    "name": "[red]run",
    "vocab": 4096,
    "model": {
        "parameters": 12_000_000,
        "non_embedding_parameters": 11_000_000,
        "embedding_parameters": 1_000_000,
        "active_parameters": 3_000_000,
        "expert_parameters": 9_000_000,
        "flops_per_token": 6_000_000,
        "train_flops_per_token": 18_000_000,
    },
    "training": {"steps": 700, "batch_tokens": 4096, "tokens": 2_867_200, "flops": 51_609_600_000_000},
    "ranks": 1,
    "layout": "1 process",
    "device": "cpu",
    "precision": "bf16",
    "precision_reason": "as configured",
    "memory": {"weights": 48 << 20, "optimizer": 96 << 20},
}


def test_inspect():
    found = lines(inspect_view(INSPECTED))
    for line in (
        "[red]run",
        "parameters 12.0M 12,000,000",
        "without embeddings 11.0M",
        "active per token 3.00M 25% of all",
        "in experts 9.00M 75% of all",
        "vocabulary 4,096",
        "forward 6.00 MFLOP per token",
        "with backward 18.0 MFLOP per token",
        "training 2.87M tokens 700 steps of 4,096",
        "arithmetic 51.6 TFLOP",
        "precision bf16 on cpu; as configured",
        "weights 48.0 MiB",
    ):
        assert line in found
    assert "layout 1 process" in found
    assert any(line.startswith("memory 144 MiB estimated") for line in found)
    over = {"ranks": 2, "layout": "2 processes: copies by auto", "memory": {"copies_up_to": 1 << 20}}
    found = lines(inspect_view(INSPECTED | over))
    assert {"layout 2 processes copies by auto", "copies up to 1.00 MiB"} <= set(found)


def counts(documents: int, size: int, tokens: int) -> dict[str, Any]:
    return {"documents": documents, "bytes": size, "tokens": tokens, "bytes_per_token": size / tokens}


STATS: dict[str, Any] = {
    "folder": "cache/python-0123",
    "kind": "python",
    "tokenizer": {"name": "bpe", "vocab": 2048},
    **counts(1100, 11_000_000, 4_000_000),
    "splits": {
        "train": counts(1078, 10_800_000, 3_900_000)
        | {"domains": {"code": counts(1000, 10_000_000, 3_600_000), "prose": counts(78, 800_000, 300_000)}},
        "eval": counts(22, 200_000, 100_000) | {"domains": {"code": counts(22, 200_000, 100_000)}},
    },
    "held_out_by": "hash",
    "files": 1099,
    "duplicates": 4,
    "skipped": [],
    "longest": [["big.py", 90_000], ["second.py", 80_000], ["third.py", 7], ["fourth.py", 6]],
}


def test_stats():
    found = lines(stats_view(STATS))
    assert "train 1,078 10,800,000 3,900,000 2.77" in found
    assert "prose 78 800,000 300,000 2.67" in found
    assert "eval 22 200,000 100,000 2.00" in found
    assert "tokenizer bpe, 2,048 tokens" in found
    assert "files 1,099, 4 duplicates left out" in found
    assert "folder cache/python-0123" in found
    assert sum("code" in line for line in found) == 1  # a split of one domain is not said twice
    assert "longest 90,000 tokens big.py" in found
    assert "7 tokens third.py" in found
    assert not any("fourth.py" in line or "skipped" in line for line in found)


def test_stats_name_what_was_skipped():
    skipped = [["a.py", "not UTF-8"], ["b.py", "null bytes"]]
    assert "skipped 2 files: a.py (not UTF-8), b.py (null bytes)" in lines(
        stats_view(STATS | {"skipped": skipped})
    )


def test_tasks():
    found = lines(
        tasks_view("run, step 3", {"my_task": {"acc": 0.5, "acc_stderr": 0.25}, "other": {"f1": 1}})
    )
    assert found == ["run, step 3", "my_task acc 0.5000", "acc_stderr 0.2500", "other f1 1"]


def test_facts():
    view = facts_view("run", {"loss": 1.23456, "bits_per_byte": 2.0, "tokens": 65536, "folder": "x"})
    assert lines(view) == [
        "run",
        "loss 1.2346",
        "bits per byte 2.0000",
        "tokens 65,536",
        "folder x",
    ]
