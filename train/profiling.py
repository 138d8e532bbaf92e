"""`--profile`: a trace of a few steps, and a table of where the time went."""

from pathlib import Path

import torch

WAIT, WARMUP, ACTIVE = 3, 2, 5


class Profiler:
    """Records `ACTIVE` steps after the first few, then stops by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def step(self) -> None:
        """One training step is over."""
        self._profile.step()

    def close(self) -> None:
        """Write what was recorded if the run was shorter than the recording."""
        self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(self.folder / "trace.json"))
        table = profile.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60
        )
        (self.folder / "table.txt").write_text(table, encoding="utf-8")
