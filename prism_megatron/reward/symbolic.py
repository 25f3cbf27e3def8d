"""Symbolic equality by math-verify (and sympy under it), in a process of its own that can be ended.

A computer algebra system can be kept busy for ever, or made to fill the memory, by an answer of a few characters; and
Python cannot interrupt itself inside one long integer operation, nor outside its main thread. So the algebra lives in a
child, and each comparison has a limit of processor time and of memory that the kernel enforces; all comparisons of one
verdict share a budget. A child that exceeds it is gone, the answer counts as wrong, and the next comparison starts
another child. Processor time, not the clock, so that the verdict does not depend on what else the machine does; the
clock is only there for a child that does not compute at all.

Run as a script, this file is the child. It imports nothing of this package.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

_CPU_SECONDS = 2.0  # per comparison; the slowest honest answers of the tests take 0.2
_START_SECONDS = 120.0  # by the clock: sympy is imported from a shared file system, by many ranks at once
_STARTS = 3
_MEMORY_BYTES = 2 << 30
_READY = b"ready\n"
_RELATIVE_TOLERANCE = 1e-6  # spec 5.3
_MAX_KNOWN = 1 << 16

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None
_child_of = 0
# Verdicts so far, None: too hard. The responses of a group say the same few things.
_known: dict[tuple[str, str, str], bool | None] = {}


class TooHard(Exception):
    """A comparison exceeded its limit, or what was left of its verdict's budget."""


@dataclass
class Budget:
    """Seconds that are left to one verdict, for all its comparisons together.

    ``wall_seconds`` run only while the child is asked, not while it starts or answers another thread.
    """

    cpu_seconds: float = 4.0
    wall_seconds: float = 180.0  # on a crowded machine a second of the processor takes ten


def same_symbolically(prediction: str, truth: str, budget: Budget) -> bool:
    """Whether two LaTeX expressions (without delimiters) are equal. What that takes is deducted from ``budget``.

    Raises TooHard where it takes too much time or memory, and RuntimeError if math-verify cannot be started at all:
    that is a fault of the machine, and calling every answer wrong would train on it.
    """
    return _ask(prediction, truth, "latex", budget)


def same_as_extracted(prediction: str, truth: str, budget: Budget) -> bool:
    """Whether whatever math-verify extracts from two texts, by its defaults, is equal. Raises as above."""
    return _ask(prediction, truth, "text", budget)


def start() -> None:
    """Start the child now, so that a missing math-verify is noticed before there is anything to judge.

    Raises RuntimeError as above.
    """
    with _lock:
        _running_child()


def _ask(prediction: str, truth: str, kind: str, budget: Budget) -> bool:
    question = (prediction, truth, kind)
    with _lock:
        verdict = _known[question] if question in _known else _compare(question, budget)
    if verdict is None:
        raise TooHard
    return verdict


def _compare(question: tuple[str, str, str], budget: Budget) -> bool | None:
    limit = min(_CPU_SECONDS, budget.cpu_seconds)
    if limit <= 0 or budget.wall_seconds <= 0:
        return None
    child = _running_child()
    began, reply, ended = time.monotonic(), b"", None
    try:
        reply = _exchange(child, json.dumps([*question, limit]).encode() + b"\n", began + budget.wall_seconds)
    finally:
        budget.wall_seconds -= time.monotonic() - began
        if not reply:  # an interrupted one, too: its reply would be taken for the next one's
            ended = _stop_child()
    if reply:
        same, seconds = json.loads(reply)
        budget.cpu_seconds -= seconds
        _remember(question, same)
        return bool(same)
    budget.cpu_seconds -= limit
    if limit == _CPU_SECONDS and ended != -signal.SIGKILL:  # killed by the clock or the machine: that says nothing
        _remember(question, None)
    return None


def _remember(question: tuple[str, str, str], verdict: bool | None) -> None:
    if len(_known) >= _MAX_KNOWN:
        del _known[next(iter(_known))]
    _known[question] = verdict


def _exchange(child: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """The child's next line after ``request``; nothing if the child ends first or the deadline passes."""
    assert child.stdin is not None
    assert child.stdout is not None
    to, from_ = child.stdin.fileno(), child.stdout.fileno()
    poll = select.poll()  # select.select refuses the descriptors of a process with many files
    poll.register(from_, select.POLLIN)
    if request:
        poll.register(to, select.POLLOUT)
    reply = b""
    while not reply.endswith(b"\n"):
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            return b""
        for file, _ in ready:
            if file == from_:
                received = os.read(from_, 4096)
                if not received:
                    return b""
                reply += received
            else:
                try:
                    request = request[os.write(to, request) :]
                except BrokenPipeError:
                    request = b""
                if not request:
                    poll.unregister(to)
    return reply


def _running_child() -> subprocess.Popen[bytes]:
    """The child that is there, or another; RuntimeError, with what the last one said, if none starts."""
    global _child, _child_of
    if _child is not None and _child_of == os.getpid() and _child.poll() is None:
        return _child
    # -P: this folder must not shadow a library's modules.
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    fault = ""
    for _ in range(_STARTS):
        with tempfile.TemporaryFile() as errors:
            try:
                _child = subprocess.Popen(
                    command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
                )
            except OSError as error:  # no memory or no process left, for the moment perhaps
                fault = str(error)
                continue
            _child_of = os.getpid()
            assert _child.stdin is not None
            os.set_blocking(_child.stdin.fileno(), False)
            if _exchange(_child, b"", time.monotonic() + _START_SECONDS) == _READY:
                return _child
            code = _stop_child()
            errors.seek(0)
            fault = f"exit code {code}; {errors.read().decode(errors='replace').strip()[-500:]}"
    raise RuntimeError(
        f"math-verify did not start {_STARTS} times, the last time: {fault}. Without it answers that need algebra "
        f"cannot be judged. Make `{' '.join(command)}` print {_READY.decode().strip()} (it needs the packages of "
        f"requirements.txt and {_MEMORY_BYTES >> 30} GiB of memory), then resume"
    )


def _stop_child() -> int | None:
    """End the child, and say how it ended: by itself, if it already had."""
    global _child
    child, _child = _child, None
    if child is None or _child_of != os.getpid():
        return None
    with child:  # waits, and closes the pipes
        try:
            child.wait(0.1)  # its pipe is closed a little before it is gone
        except subprocess.TimeoutExpired:
            child.kill()
    return child.returncode


atexit.register(_stop_child)


def _serve() -> None:
    """Answer comparisons, one JSON line each, until the parent is gone."""
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not be taken for a verdict
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)

    def compare(prediction: str, truth: str, kind: str) -> bool:
        if kind == "text":
            texts = [parse(text, parsing_timeout=None) for text in (truth, prediction)]
            return bool(verify(*texts, timeout_seconds=None))
        sides = [
            parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
            for text in (truth, prediction)
        ]
        if not all(sides):
            return False
        close = _close(sides[1][0], sides[0][0])
        if close is not None:
            return close
        # Its own rounding is absolute (two small numbers would be the same), so it is asked for exactness.
        return bool(verify(*sides, float_rounding=15, allow_set_relation_comp=True, timeout_seconds=None))

    print(_READY.decode(), end="", file=replies, flush=True)
    for line in sys.stdin:
        *question, limit = json.loads(line)
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)  # SIGPROF ends a process that does not handle it
        same = compare(*question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([same, time.process_time() - began]), file=replies, flush=True)


def _close(prediction: Any, truth: Any) -> bool | None:
    """Whether two numbers agree, where one of them is a decimal; None where there is more to compare."""
    from sympy import Expr, Float

    numbers = [side for side in (prediction, truth) if isinstance(side, Expr) and side.is_number]
    if len(numbers) < 2 or not (prediction.has(Float) or truth.has(Float)):
        return None
    difference, scale = abs((prediction - truth).evalf()), abs(truth.evalf())
    return bool(difference <= _RELATIVE_TOLERANCE * scale)


if __name__ == "__main__":
    _serve()
