"""Where an iteration's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """``with timers("rollout"): ...`` adds up wall-clock seconds under ``seconds_rollout`` until they are popped."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            key = f"seconds_{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.monotonic() - began

    def pop(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
