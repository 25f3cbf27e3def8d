"""How many prompts of a batch are answered, for whoever is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_megatron.parallel import groups


@contextmanager
def progress_bar(prompts: int) -> Iterator[Callable[[int], None]]:
    """A bar below the stage's own, on the main rank's terminal; elsewhere nothing. Yields what to tell how many."""
    if not (groups.is_main_rank() and sys.stderr.isatty()):
        yield lambda answered: None
        return
    columns = (TextColumn("rollout"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("rollout", total=prompts)
        yield lambda answered: progress.update(task, completed=answered)
