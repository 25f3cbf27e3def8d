"""Wall-clock time of the parts of an iteration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Timers of named parts: ``with timers("rollout"): ...`` adds wall-clock seconds to ``seconds_rollout``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_time = time.monotonic()
        try:
            yield
        finally:
            key = f"seconds_{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.monotonic() - start_time

    def pop(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
