"""What is shown says what is, fits its width, and survives foreign text."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console, RenderableType

from moesaic.train.facts import Closing, Evaluation, Progress, Sample, Start
from moesaic.train.health import LayerLoad
from moesaic.train.views import (
    closing_view,
    evaluation_view,
    health_view,
    preparation_view,
    progress_line,
    progress_view,
    start_view,
)

START = Start(
    name="quickstart",
    folder="runs/[bold]quickstart",
    model="6 layers, width 256; 16 experts, 2 per token",
    parameters=12_345_678,
    embedding_parameters=1_048_576,
    active_parameters=4_123_456,
    flops_per_token=9.8e6,
    train_flops_per_token=29.4e6,
    steps=600,
    batch_tokens=16384,
    seq_len=256,
    micro_batches=4,
    memory={"weights": 48 << 20, "gradients": 48 << 20, "logits": 0, "optimizer": 96 << 20},
    device="CPU, 2 threads",
    device_reason="no CUDA device was found",
    precision="bf16",
    precision_reason="1.8 times faster than fp32 here",
    kernels="C++, compiled for this processor",
    layout="1 process",
    corpus="python",
    documents=3412,
    train_tokens=4_100_000,
    eval_tokens=82_000,
    bytes_per_token=3.62,
    epochs=2.4,
)
FULL = Progress(
    step=240,
    loss=2.3143,
    bits_per_byte=1.2142,
    tokens_per_second=412_345.0,
    mfu=0.414,
    imbalance=12.32,
    memory=1_288_490_189,
    learning_rate=3e-4,
    grad_norm=0.8123,
)


def render(view: RenderableType, *, width: int = 80, encoding: str = "utf-8", color: bool = False) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    Console(file=stream, width=width, force_terminal=color, legacy_windows=False).print(view)
    stream.seek(0)
    return stream.read()


def test_start_table_tells_every_fact():
    shown = render(start_view(START), width=100)
    for fact in (
        "quickstart",
        "12.3M parameters, 11.3M without embeddings, 4.12M active",
        "6 layers, width 256; 16 experts, 2 per token",
        "9.80 MFLOP/token, with backward 29.4 MFLOP, in all 289 TFLOP",
        "600 steps x 16,384 = 9.83M tokens in sequences of 256",
        "python: 3,412 documents, 4.10M tokens of 3.62 bytes",
        "2.40 epochs; 82.0k tokens held out",
        "CPU, 2 threads - no CUDA device was found",
        "bf16 - 1.8 times faster than fp32 here",
        "1 process; 4 micro-batches",
        "about 192 MiB:  weights 48.0 MiB  gradients 48.0 MiB  optimizer 96.0 MiB",
        "runs/[bold]quickstart",
    ):
        assert fact in shown
    assert "logits" not in shown  # nothing to show
    assert "costs" not in shown
    copied = replace(
        START, costs=("layer1: a row 1 us", "layer2: a row 2 us"), memory={"copies_up_to": 1 << 20}
    )
    shown = render(start_view(copied), width=100)
    assert "costs      layer1: a row 1 us" in shown
    assert "copies up to 1.00 MiB" in shown
    assert "resumed" not in shown


def test_memory_bar_is_in_proportion():
    bar = [line for line in render(start_view(START)).splitlines() if "\u2501" in line]
    assert len(bar) == 1
    colored = render(start_view(START), color=True)
    lengths = [part.count("\u2501") for part in colored.split("\x1b[") if "\u2501" in part]
    assert len(lengths) == 3
    assert lengths[0] + lengths[1] == pytest.approx(lengths[2], abs=1)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_everything_fits_the_width(width: int):
    for view in (
        start_view(START),
        health_view(loads(20)),
        closing_view(CLOSING),
        evaluation_view(EVALUATION),
    ):
        assert max(map(len, render(view, width=width).splitlines())) <= width
    for view in (progress_view(FULL, total=600, eta=3700.0), preparation_view("tokenizing", 12, 40)):
        lines = render(view, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= 2


def test_progress_at_80_columns_shows_every_field():
    bar, fields = render(progress_view(FULL, total=600, eta=135.0)).splitlines()
    assert bar.startswith("training  \u2501")
    assert bar.endswith("  240/600  40%  2m 15s left")
    assert fields == "loss 2.314  bits/byte 1.214  tok/s 412k  MFU 41%  imbalance 12.32  mem 1.20 GiB"


def test_the_load_of_ranks_stands_last_where_it_fits():
    owned = replace(FULL, rank_imbalance=1.234)
    lines = {width: render(progress_view(owned, total=600, eta=None), width=width) for width in (80, 100)}
    assert lines[80] == render(progress_view(FULL, total=600, eta=None))
    assert lines[100].splitlines()[1].endswith("  mem 1.20 GiB  rank load 1.23")
    assert "  mem 1.20 GiB  rank load 1.23  lr " in progress_line(owned, total=600, eta=None)
    copied = progress_line(replace(owned, copies=12), total=600, eta=None)
    assert "  rank load 1.23  copies 12  lr " in copied


def test_progress_leaves_out_what_is_unknown():
    bar, fields = render(progress_view(Progress(step=600, loss=math.nan), total=600, eta=None)).splitlines()
    assert fields == "loss nan"
    assert bar.endswith("600/600  100%")


def test_bar_is_as_full_as_the_work():
    for done in (0, 10, 20, 40, 50):
        colored = render(preparation_view("x", done, 40), color=True)
        lengths = {part[0:2]: part.count("\u2501") for part in colored.split("\x1b[") if "\u2501" in part}
        full, rest = lengths.get("36", 0), lengths.get("90", 0)
        assert full == int(min(done, 40) / 40 * (full + rest))


def test_progress_line_is_one_line():
    assert progress_line(FULL, total=6000, eta=95.0) == (
        "step  240/6000  loss 2.314  bits/byte 1.214  tok/s 412k  MFU 41%  imbalance 12.32  mem 1.20 GiB  "
        "lr 3.00e-04  grad norm 0.812  1m 35s left"
    )


EVALUATION = Evaluation(step=1200, loss=2.31434, bits_per_byte=1.19871, seconds=3.2, best=True)


def test_evaluation_line():
    assert evaluation_view(EVALUATION).plain == (
        "step 1,200: held-out loss 2.3143 nats, 1.1987 bits/byte  best  (3.2s)"
    )
    worse = Evaluation(step=5, loss=2.0, bits_per_byte=1.0, seconds=1.0, best=False)
    assert "best" not in evaluation_view(worse).plain


def loads(layers: int) -> list[LayerLoad]:
    made = []
    for layer in range(layers):
        counts = torch.full((16,), 100)
        counts[3] += 10 * layer
        made.append(LayerLoad(layer=layer, counts=counts, tokens=800, entropy=1.5))
    return made


def test_health_table_by_hand():
    collapsed = LayerLoad(layer=7, counts=torch.tensor([6, 2, 0, 0]), tokens=4)
    lines = render(health_view([collapsed])).splitlines()
    assert lines[-1].split() == ["7", "2.00", "2/4", "150%", "0.406", "-", "\u2588\u2584xx"]
    assert "x" in render(health_view([collapsed]), encoding="ascii").splitlines()[-1]


def test_health_table_keeps_the_worst_layers_in_order():
    shown = render(health_view(loads(20), rows=3))
    layers = [line.split()[0] for line in shown.splitlines()[3:-1]]
    assert layers == ["17", "18", "19"]
    assert "and 17 better balanced layers" in shown


def test_many_experts_share_bars_by_the_largest():
    counts = torch.ones(1000)
    counts[500] = 30
    shown = render(health_view([LayerLoad(layer=0, counts=counts, tokens=1000)]))
    bars = shown.splitlines()[-1].split()[-1]
    assert len(bars) <= 64
    assert bars.count("\u2588") == 1


CLOSING = Closing(
    outcome="stopped by SIGINT",
    step=480,
    steps=600,
    tokens=7_864_320,
    seconds=243.2,
    tokens_per_second=32_338.0,
    peak_memory=1_400_000_000,
    best_loss=2.1034,
    best_bits_per_byte=1.0412,
    best_step=400,
    final_loss=2.2,
    paths={"folder": "runs/quickstart", "continue": "moesaic train quickstart --resume"},
    samples=[Sample(prompt="def [red]f", text="():\n\treturn '\x1b[31m[/red]'\n\n\n")],
)


def test_closing_block_tells_every_fact():
    shown = render(closing_view(CLOSING), width=100)
    for fact in (
        "stopped by SIGINT",
        "2.1034 nats, 1.0412 bits/byte at step 400; 2.2000 nats at the end",
        "7.86M tokens in 480 of 600 steps, 4m 03s, 32.3k tokens/s",
        "1.30 GiB",
        "moesaic train quickstart --resume",
        "def [red]f():",
        "    return '\\x1b[31m[/red]'",
    ):
        assert fact in shown
    assert "\x1b" not in shown
    assert "[/red]'" in shown.splitlines()[-2]  # no empty lines at the end of a sample


def test_closing_without_any_evaluation():
    early = Closing(
        outcome="finished", step=1, steps=1, tokens=64, seconds=0.5, tokens_per_second=128.0, peak_memory=None
    )
    shown = render(closing_view(early))
    assert "held-out" not in shown
    assert "peak" not in shown
    assert "64 tokens in 1 of 1 steps, 0.5s, 128 tokens/s" in shown


def test_an_ascii_terminal_gets_ascii():
    for view in (
        start_view(START),
        progress_view(FULL, total=600, eta=1.0),
        health_view(loads(2)),
        closing_view(CLOSING),
    ):
        render(view, encoding="ascii").encode("ascii")
