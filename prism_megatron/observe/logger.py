"""The log of a stage: metrics.jsonl, rollouts.jsonl with its pictures, TensorBoard and the console."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.files import JSONLines, drop_rows_after, write_atomic
from prism_megatron.observe import metrics as names
from prism_megatron.observe.progress import ProgressBar

METRICS, ROLLOUTS, PICTURES = "metrics.jsonl", "rollouts.jsonl", "pictures"


class MetricsLog:
    """Log of one stage. Ranks other than the main one write nothing.

    When a run is resumed, rows after ``resume_from`` are removed, since those iterations are run again.
    """

    def __init__(self, stage_dir: Path, stage: str, total_iterations: int, resume_from: int, is_main: bool) -> None:
        self._stage, self._total = stage, total_iterations
        self._is_main = is_main
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        stage_dir.mkdir(parents=True, exist_ok=True)
        self._pictures = stage_dir / PICTURES
        self._metrics = _reopen(stage_dir / METRICS, resume_from)
        self._rollouts = _reopen(stage_dir / ROLLOUTS, resume_from)
        self._tensorboard: Any = SummaryWriter(str(stage_dir / "tensorboard"), purge_step=resume_from + 1)
        self._bar = ProgressBar(stage, total_iterations, completed=resume_from)

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
        self._bar.close()

    def log(self, iteration: int, metrics: Mapping[str, float | None]) -> None:
        """Write one iteration (counted from 1). A metric that is None is undefined and left out.

        Raises FloatingPointError for a value that is not finite; training on would only hide its origin.
        """
        defined = {name: float(value) for name, value in metrics.items() if value is not None}
        for name, value in defined.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{self._stage}: {name} is {value} at iteration {iteration}")
        if not self._is_main:
            return
        row = {"stage": self._stage, "iteration": iteration, "time": round(time.time(), 3), **defined}
        self._metrics.append(row)
        for name, value in defined.items():
            self._tensorboard.add_scalar(f"{self._stage}/{name}", value, iteration)
        self._bar.update(iteration)
        self._bar.print(self._line(iteration, defined))

    def rollouts(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store some of an iteration's rollouts for the report.

        A row's ``image`` is an encoded picture, or None. It is replaced by the name of a file in ``pictures/``, where
        each distinct picture is stored once.
        """
        if not self._is_main:
            return
        for row in rows:
            assert row["iteration"] == iteration
            self._rollouts.append({**row, "image": self._store(row.get("image"))})

    def _store(self, picture: bytes | None) -> str | None:
        if picture is None:
            return None
        name = hashlib.sha256(picture).hexdigest()[:32]
        if not (self._pictures / name).is_file():
            write_atomic(self._pictures / name, picture, durable=False)
        return name

    def _line(self, iteration: int, defined: Mapping[str, float]) -> str:
        width = len(str(self._total))
        values = [f"{name} {_short(defined[name])}" for name in names.ON_CONSOLE if name in defined]
        eta = self._bar.eta(iteration)
        return "  ".join([f"{self._stage:7s} {iteration:{width}d}/{self._total}", *values, f"eta {eta}"])


def _reopen(path: Path, resume_from: int) -> JSONLines:
    """Open for appending, without the rows of iterations that are run again."""
    drop_rows_after(path, resume_from)
    return JSONLines(path)


def _short(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
