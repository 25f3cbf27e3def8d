"""Time of a step by part, from the timers that Megatron-core starts and stops."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

_PASS = "forward-backward"  # Megatron's name for the full schedule


class StepTimers:
    """Timers object of Megatron's schedule and optimizers, which adds up seconds by part of a step.

    ``layout`` is the time before each pass of the schedule, since the step started or the last timer stopped: packing
    rows, zeroing gradients and, between passes, the use of the previous one's results. ``other`` is the remaining time,
    such as reducing metrics. Every timer synchronizes the GPU, so that a step with timers is slower than one without.
    """

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}
        self._step = _Timer(self)
        self.layout = self.stopped = 0.0  # seconds; time when the last timer stopped

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return self._timers.setdefault(name, (_PassTimer if name == _PASS else _Timer)(self))

    def attach(self, model: Any) -> None:
        """Attach the timers to a ``TrainableModel``."""
        for chunk in model.chunks:
            chunk.config.timers = self
        if model.optimizer is not None:
            for part in (model.optimizer, *getattr(model.optimizer, "chained_optimizers", ())):
                part.config.timers = self

    def begin_step(self) -> None:
        self._step.start()
        self.stopped = self._step.start_time

    def end_step(self) -> None:
        self._step.stop()

    def mean(self, steps: int) -> dict[str, float]:
        """Return the mean seconds of a step by part; ``step`` is their sum."""
        parts: dict[str, float] = defaultdict(float, layout=self.layout / steps)
        for name, timer in self._timers.items():
            if part := part_of(name):
                parts[part] += timer.seconds / steps
        step = self._step.seconds / steps
        return parts | {"other": step - sum(parts.values()), "step": step}


class _Timer:
    """Timer with Megatron's interface; ``start_time`` is of the last start."""

    def __init__(self, of: StepTimers) -> None:
        self.seconds, self.start_time = 0.0, 0.0
        self._of = of

    def start(self, barrier: bool = False) -> None:
        self.start_time = _now()

    def stop(self, barrier: bool = False) -> None:
        self._of.stopped = _now()
        self.seconds += self._of.stopped - self.start_time


class _PassTimer(_Timer):
    """Timer of a full schedule."""

    def start(self, barrier: bool = False) -> None:
        super().start(barrier)
        self._of.layout += self.start_time - self._of.stopped


def part_of(name: str) -> str | None:
    """Return the part of a step that a timer of Megatron belongs to; None for one that only contains others."""
    if name == _PASS:
        return None
    if name in ("forward-compute", "backward-compute"):
        return name.removesuffix("-compute")
    if name.startswith("optimizer-"):
        return "optimizer"
    return "pipeline" if "send" in name or "recv" in name else "gradients"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
