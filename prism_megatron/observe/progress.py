"""Progress bars, one display for stages, rollouts and tools."""

from __future__ import annotations

import sys
import time

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_SECONDS = 10.0


class ProgressBar:
    """A bar with the remaining time, on a terminal only. Several bars are displayed one below another.

    Args:
        title: text in front of the bar.
        total: number of items, or of bytes if ``is_bytes``; None while it is unknown.
        completed: items that are done already.
        is_bytes: display sizes and the transfer speed.
        is_transient: remove the bar at the end.
        with_lines: without a terminal, print a line every ten seconds and at the end.
        is_enabled: False displays nothing, for ranks other than the main one.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        completed: int = 0,
        is_bytes: bool = False,
        is_transient: bool = False,
        with_lines: bool = False,
        is_enabled: bool = True,
    ) -> None:
        self._title, self._total, self._first = title, total, completed
        self._start_time = self._line_time = time.monotonic()
        self._progress: Progress | None = None
        self._with_lines = with_lines and is_enabled and not sys.stderr.isatty()
        if is_enabled and sys.stderr.isatty():
            amounts: list[ProgressColumn] = (
                [DownloadColumn(), TransferSpeedColumn()] if is_bytes else [MofNCompleteColumn()]
            )
            columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
            self._progress = Progress(*columns, transient=is_transient)
            self._task = self._progress.add_task(title, total=total, completed=completed)
            self._progress.start()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop displaying the bar."""
        if self._progress is not None:
            self._progress.stop()

    def update(self, completed: int, total: int | None = None) -> None:
        """Display that ``completed`` items are done; ``total`` changes their number."""
        self._total = total or self._total
        if self._progress is not None:
            self._progress.update(self._task, completed=completed, total=self._total)
        elif self._with_lines and (time.monotonic() >= self._line_time + _LINE_SECONDS or completed == self._total):
            self._line_time = time.monotonic()
            print(f"{self._title} {completed}/{self._total}  eta {self.eta(completed)}", flush=True)

    def print(self, line: str) -> None:
        """Print a line above the bar, or just print it."""
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def eta(self, completed: int) -> str:
        """Time until all items are done, as minutes and seconds."""
        assert self._total is not None
        per_item = (time.monotonic() - self._start_time) / max(completed - self._first, 1)
        minutes, seconds = divmod(round(per_item * (self._total - completed)), 60)
        return f"{minutes}:{seconds:02d}"
