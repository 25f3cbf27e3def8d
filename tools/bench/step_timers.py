"""Where a step's time goes, by the timers that Megatron-core itself starts and stops."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

_PASS = "forward-backward"  # Megatron's name for all of a schedule


class StepTimers:
    """Stands where Megatron's schedule and optimizers look for their timers, and adds up seconds by part of a step.

    ``layout`` is what comes before each pass of the schedule, since the step began or the last timer stopped: rows to
    packed batches, gradients set to zero and, where a stage takes several passes, what it makes of the one before.
    ``other`` is what else no timer covers, such as the reduction of what is logged. A GPU is waited for at every timer,
    so that a step with them is slower than one without.
    """

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}
        self._step = _Timer(self)
        self.layout = self.stopped = 0.0  # seconds; when the last timer stopped

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return self._timers.setdefault(name, (_PassTimer if name == _PASS else _Timer)(self))

    def attach(self, model: Any) -> None:
        """To a ``TrainableModel`` model, from now on."""
        for chunk in model.chunks:
            chunk.config.timers = self
        if model.optimizer is not None:
            for part in (model.optimizer, *getattr(model.optimizer, "chained_optimizers", ())):
                part.config.timers = self

    def begin_step(self) -> None:
        self._step.start()
        self.stopped = self._step.began

    def end_step(self) -> None:
        self._step.stop()

    def mean(self, steps: int) -> dict[str, float]:
        """Seconds of a step by part, ``step`` being all of it."""
        parts: dict[str, float] = defaultdict(float, layout=self.layout / steps)
        for name, timer in self._timers.items():
            if part := part_of(name):
                parts[part] += timer.seconds / steps
        step = self._step.seconds / steps
        return parts | {"other": step - sum(parts.values()), "step": step}


class _Timer:
    """What Megatron calls between ``start`` and ``stop``; ``began`` is when it was last started."""

    def __init__(self, of: StepTimers) -> None:
        self.seconds, self.began = 0.0, 0.0
        self._of = of

    def start(self, barrier: bool = False) -> None:
        self.began = _now()

    def stop(self, barrier: bool = False) -> None:
        self._of.stopped = _now()
        self.seconds += self._of.stopped - self.began


class _PassTimer(_Timer):
    """Of a whole schedule."""

    def start(self, barrier: bool = False) -> None:
        super().start(barrier)
        self._of.layout += self.began - self._of.stopped


def part_of(name: str) -> str | None:
    """The part of a step that one of Megatron's timers belongs to; None for one that only holds others."""
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
