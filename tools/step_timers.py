"""Where a step's time goes, by the timers that Megatron-core itself starts and stops."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch


class StepTimers:
    """Stands where Megatron's schedule and optimizers look for their timers, and adds up seconds by part of a step.

    ``layout`` is what comes before the schedule: rows to packed batches, gradients set to zero. ``other`` is what no
    timer covers, such as the reduction of what is logged. A GPU is waited for at every timer, so that a step with them
    is slower than one without.
    """

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = defaultdict(_Timer)
        self._step, self._layout = _Timer(), 0.0

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return self._timers[name]

    def attach(self, policy: Any) -> None:
        """To a ``Trained`` model, from now on."""
        for chunk in policy.chunks:
            chunk.config.timers = self
        for part in (policy.optimizer, *getattr(policy.optimizer, "chained_optimizers", ())):
            part.config.timers = self

    def begin_step(self) -> None:
        self._step.start()

    def end_step(self) -> None:
        self._step.stop()
        self._layout += self._timers["forward-backward"].began - self._step.began

    def mean(self, steps: int) -> dict[str, float]:
        """Seconds of a step by part, ``step`` being all of it."""
        parts: dict[str, float] = defaultdict(float, layout=self._layout / steps)
        for name, timer in self._timers.items():
            if part := part_of(name):
                parts[part] += timer.seconds / steps
        step = self._step.seconds / steps
        return parts | {"other": step - sum(parts.values()), "step": step}


class _Timer:
    """What Megatron calls between ``start`` and ``stop``; ``began`` is when it was last started."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, 0.0

    def start(self, barrier: bool = False) -> None:
        self.began = _now()

    def stop(self, barrier: bool = False) -> None:
        self.seconds += _now() - self.began


def part_of(name: str) -> str | None:
    """The part of a step that one of Megatron's timers belongs to; None for one that only holds others."""
    if name == "forward-backward":
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
