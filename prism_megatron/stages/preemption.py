"""Preemption: a batch system sends TERM some time before it kills a job, Ctrl-C sends INT.

The stage finishes its iteration, saves, and the process exits with ``EXIT_STATUS``; the same command resumes it. TERM
may arrive more than once, from the launcher and from the batch system. Any signal after an INT ends the process at
once. A terminal's INT reaches torchrun's agent only, because each rank has its own session: the agent forwards the
first one to the ranks and the second as TERM, and exits without them on the third.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL: try again
INTERRUPTED = 128 + signal.SIGINT
_PR_SET_PDEATHSIG = 1


class Preempted(Exception):
    """Raised on all ranks after a preempted stage has saved; the process groups still exist."""


def follow_torchrun() -> None:
    """Make the kernel send INT to this rank when torchrun's agent dies; it would continue otherwise."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


class StopSignals:
    """Requests to stop by TERM or INT: ``requested`` is set by the handlers that :meth:`listen` installs."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False

    def listen(self) -> None:
        """Install handlers for TERM and INT; from now on a first signal does not kill this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def requested_on_any_rank(self) -> bool:
        """Return whether any rank got a signal. Collective, so that all ranks stop after the same iteration."""
        from prism_megatron.parallel.collectives import max_over_ranks

        return bool(max_over_ranks(float(self.requested)))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._interrupted:
            _write_line("interrupted; the same command resumes from the last checkpoint")
            os._exit(INTERRUPTED)  # the next start ignores incomplete checkpoints
        self.requested = True
        if number == signal.SIGINT:
            self._interrupted = True
            _write_line("stopping after this iteration is finished and saved; press Ctrl-C again to stop at once")


def _write_line(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())  # print() is not reentrant, and the signal may interrupt one
