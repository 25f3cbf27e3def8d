"""The log of a stage: metrics.jsonl, rollouts.jsonl with its pictures, TensorBoard and the console."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_megatron.files import drop_rows_after, write_atomic
from prism_megatron.observe import metrics as names

METRICS, ROLLOUTS, PICTURES = "metrics.jsonl", "rollouts.jsonl", "pictures"


class MetricsLog:
    """Open for one stage, closed at its end. Ranks other than the main one write nothing.

    On resume, whatever an interrupted run logged after ``resume_from`` is dropped: those iterations are run again.
    """

    def __init__(self, stage_dir: Path, stage: str, total_iterations: int, resume_from: int, is_main: bool) -> None:
        self._stage, self._total, self._start = stage, total_iterations, resume_from
        self._is_main = is_main
        self._began = time.monotonic()
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        stage_dir.mkdir(parents=True, exist_ok=True)
        self._pictures = stage_dir / PICTURES
        self._metrics = _reopen(stage_dir / METRICS, resume_from)
        self._rollouts = _reopen(stage_dir / ROLLOUTS, resume_from)
        self._tensorboard: Any = SummaryWriter(str(stage_dir / "tensorboard"), purge_step=resume_from + 1)
        self._progress = _progress_bar(stage, total_iterations, resume_from)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._is_main:
            return
        self._metrics.close()
        self._rollouts.close()
        self._tensorboard.close()
        if self._progress is not None:
            self._progress.stop()

    def log(self, iteration: int, measured: Mapping[str, float | None]) -> None:
        """Write one iteration (counted from 1). A metric that is None is undefined and left out.

        Raises FloatingPointError for a value that is not finite: training on would only hide where it came from.
        """
        defined = {name: float(value) for name, value in measured.items() if value is not None}
        for name, value in defined.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{self._stage}: {name} is {value} at iteration {iteration}")
        if not self._is_main:
            return
        line = {"stage": self._stage, "iteration": iteration, "time": round(time.time(), 3), **defined}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in defined.items():
            self._tensorboard.add_scalar(f"{self._stage}/{name}", value, iteration)
        shown = self._line(iteration, defined)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=iteration)
            self._progress.console.print(shown, highlight=False)
        else:
            print(shown, flush=True)

    def rollouts(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store some of an iteration's rollouts for the report.

        A row's ``image`` is an encoded picture, or None. It becomes the name of a file in ``pictures/``, where each
        distinct picture is stored once.
        """
        if not self._is_main:
            return
        for row in rows:
            assert row["iteration"] == iteration
            stored = {**row, "image": self._store(row.get("image"))}
            self._rollouts.write(json.dumps(stored, ensure_ascii=False) + "\n")
        self._rollouts.flush()

    def _store(self, picture: bytes | None) -> str | None:
        if picture is None:
            return None
        name = hashlib.sha256(picture).hexdigest()[:32]
        if not (self._pictures / name).is_file():
            write_atomic(self._pictures / name, picture, durable=False)
        return name

    def _line(self, iteration: int, defined: Mapping[str, float]) -> str:
        per_iteration = (time.monotonic() - self._began) / (iteration - self._start)
        minutes, seconds = divmod(round(per_iteration * (self._total - iteration)), 60)
        width = len(str(self._total))
        shown = [f"{name} {_short(defined[name])}" for name in names.ON_CONSOLE if name in defined]
        return "  ".join(
            [f"{self._stage:7s} {iteration:{width}d}/{self._total}", *shown, f"eta {minutes}:{seconds:02d}"]
        )


def _progress_bar(stage: str, total: int, start: int) -> Progress | None:
    """A bar with the time left, where somebody is looking."""
    if not sys.stderr.isatty():
        return None
    columns = (TextColumn(stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns)
    progress.add_task(stage, total=total, completed=start)
    progress.start()
    return progress


def _reopen(path: Path, resume_from: int) -> IO[str]:
    """Open for appending, without the rows of iterations that will be run again."""
    drop_rows_after(path, resume_from)
    return path.open("a", encoding="utf-8", newline="\n")


def _short(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
