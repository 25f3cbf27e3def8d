"""Stopping when asked to: a batch system sends TERM some time before it kills, Ctrl-C sends INT.

The stage saves after the iteration it is in, and the process ends with ``EXIT_STATUS``; the same command goes on from
there. TERM may come more than once, from the launcher and from the batch system; a second INT ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL: try again
INTERRUPTED = 128 + signal.SIGINT

_asked = False
_interrupts = 0


class Preempted(Exception):
    """Everything is saved; the process groups are still up on every rank."""


def listen() -> None:
    """From now on neither TERM nor a first INT kills this process: :func:`is_asked` reports it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def is_asked() -> bool:
    """Whether any rank was told to stop. Collective, so that all stop after the same iteration."""
    from prism_megatron.parallel.collectives import max_over_ranks

    return bool(max_over_ranks(float(_asked)))


def _note(number: int, _frame: FrameType | None) -> None:
    global _asked, _interrupts
    _asked = True
    _interrupts += number == signal.SIGINT
    if _interrupts > 1:
        os._exit(INTERRUPTED)  # what was not saved whole is passed over by the next start
