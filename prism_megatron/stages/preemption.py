"""Stopping when asked to: a batch system sends TERM some time before it kills.

The stage saves after the iteration it is in, and the process ends with ``EXIT_STATUS``; the same command goes on from
there. TERM may come more than once, from the launcher and from the batch system.
"""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL: try again

_asked = False


class Preempted(Exception):
    """Everything is saved; the process groups are still up on every rank."""


def listen() -> None:
    """From now on TERM does not kill this process: :func:`is_asked` reports it."""
    signal.signal(signal.SIGTERM, _note)


def is_asked() -> bool:
    """Whether any rank was told to stop. Collective, so that all stop after the same iteration."""
    from prism_megatron.parallel.collectives import max_over_ranks

    return bool(max_over_ranks(float(_asked)))


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
