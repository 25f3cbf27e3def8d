"""Stopping when asked to: a batch system sends TERM some time before it kills, Ctrl-C sends INT.

The stage saves after the iteration it is in, and the process ends with ``EXIT_STATUS``; the same command goes on from
there. TERM may come more than once, from the launcher and from the batch system. Whatever comes after an INT ends the
process at once. The terminal's INT reaches torchrun's agent only, since each rank has a session of its own: the agent
sends the first on to the ranks, a second one as TERM, and at a third it ends without them.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL: try again
INTERRUPTED = 128 + signal.SIGINT
_PR_SET_PDEATHSIG = 1

_asked = False
_interrupted = False


class Preempted(Exception):
    """Everything is saved; the process groups are still up on every rank."""


def follow_torchrun() -> None:
    """Make the end of torchrun's agent an INT for this rank, which would go on without it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def listen() -> None:
    """From now on neither TERM nor a first INT kills this process: :func:`is_asked` reports it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def is_asked() -> bool:
    """Whether any rank was told to stop. Collective, so that all stop after the same iteration."""
    from prism_megatron.parallel.collectives import max_over_ranks

    return bool(max_over_ranks(float(_asked)))


def _note(number: int, _frame: FrameType | None) -> None:
    global _asked, _interrupted
    if _interrupted:
        _say("ended at once; the same command goes on from the last checkpoint")
        os._exit(INTERRUPTED)  # what was not saved whole is passed over by the next start
    _asked = True
    if number == signal.SIGINT:
        _interrupted = True
        _say("told to stop: the iteration is finished and saved first; Ctrl-C once more ends at once")


def _say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{words}\n".encode())  # print() may not be called while the process is in another one
