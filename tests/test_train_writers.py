"""metrics.jsonl and TensorBoard: what is written is what is read, also after a kill."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.train.writers import MetricsWriter, each_record


def test_lines_are_whole_when_append_returns(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.append({"step": 1, "train/loss": 0.1 + 0.2, "note": "caf\u00e9"})
    writer.append({"step": 2, "train/loss": math.nan, "layer_00/load": [0.5, math.inf]})
    lines = writer.path.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "train/loss": 0.1 + 0.2, "note": "caf\u00e9"}
    assert json.loads(lines[1]) == {"step": 2, "train/loss": None, "layer_00/load": [0.5, None]}
    assert [record and record["step"] for record in each_record(writer.path)] == [1, 2]
    writer.close()


def test_rewind_moves_later_records_and_discards_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30, 40)) + '{"step": 50, "lo'
    )
    writer = MetricsWriter(path)
    assert writer.rewind(20) == 3
    writer.append({"step": 30, "again": True})
    writer.close()
    assert [*each_record(path)] == [{"step": 10}, {"step": 20}, {"step": 30, "again": True}]
    assert [*each_record(tmp_path / "metrics.dropped.jsonl")] == [{"step": 30}, {"step": 40}]


def test_rewind_with_nothing_to_drop_leaves_the_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    before = path.stat().st_ino
    writer = MetricsWriter(path)
    assert writer.rewind(10) == 0
    assert path.stat().st_ino == before
    assert not (tmp_path / "metrics.dropped.jsonl").exists()
    assert writer.rewind(-1) == 1
    assert path.read_text() == ""
    writer.close()


def test_full_disk_is_one_message():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    writer = MetricsWriter(Path("/dev/full"))
    with pytest.raises(ValueError, match=r"/dev/full: cannot be written \(No space left.*--resume"):
        writer.append({"step": 1})


def test_tensorboard_holds_scalars_and_loads(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events")
    writer.append(
        {"step": 3, "train/loss": 2.5, "train/mfu": math.nan, "text": "no", "layer_01/load": [0.25, 0.75]}
    )
    writer.close()
    (event,) = [
        event
        for event in events(tmp_path / "events")
        if event.step == 3 and "loss" in event.summary.value[0].tag
    ]
    assert event.summary.value[0].simple_value == 2.5
    values = {value.tag: value for event in events(tmp_path / "events") for value in event.summary.value}
    assert set(values) == {"train/loss", "layer_01/load"}
    histogram = values["layer_01/load"].histo
    assert list(histogram.bucket)[-2:] == [0.25, 0.75]
    assert list(histogram.bucket_limit)[-2:] == [1.0, 2.0]


def test_resumed_tensorboard_hides_dropped_steps(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events")
    writer.rewind(20)
    writer.append({"step": 21, "train/loss": 1.0})
    writer.close()
    starts = [event.step for event in events(tmp_path / "events") if event.HasField("session_log")]
    assert starts == [21]


def test_tensorboard_is_imported_late():
    code = "import sys, moesaic.train.writers; print('tensorboardX' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def events(folder: Path) -> list[Any]:
    """All events of all files, by TensorBoard's record format: length, crc, payload, crc."""
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(messages.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found
