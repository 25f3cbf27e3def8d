"""Symbolic equality by math-verify (and sympy) in a child process.

A short answer can keep a computer algebra system busy for ever or fill the memory, and Python cannot interrupt a long
integer operation, nor any outside its main thread: math-verify's own timeouts, concurrent.futures and threads do not
help. The kernel therefore limits a child's CPU time and memory; beyond the limits the answer is wrong and the child
replaced. Limits in CPU time make verdicts independent of the machine's load; wall time only ends a child that hangs.

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
_START_SECONDS = 120.0  # wall time: many ranks at once import sympy from a shared file system
_STARTS = 3
_MEMORY_BYTES = 2 << 30
_READY = b"ready\n"
_RELATIVE_TOLERANCE = 1e-6  # spec 5.3
_MAX_VERDICTS = 1 << 16

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None
_parent_pid = 0
# Verdicts so far, None for too hard. The responses of a group give the same few answers.
_verdicts: dict[tuple[str, str, str], bool | None] = {}


class TooHard(Exception):
    """A comparison exceeded its limit or the rest of its verdict's budget."""


@dataclass
class Budget:
    """Remaining seconds for all comparisons of one verdict.

    ``wall_seconds`` count only while the child compares, not while it starts or answers another thread.
    """

    cpu_seconds: float = 4.0
    wall_seconds: float = 180.0  # on a busy machine a CPU second takes ten


def same_symbolically(prediction: str, truth: str, budget: Budget) -> bool:
    """Return whether two LaTeX expressions (without delimiters) are equal; deduct the time from ``budget``.

    Raises:
        TooHard: The comparison takes too much time or memory.
        RuntimeError: math-verify cannot be started, a fault of the machine: training on "wrong" for every answer would
            be worse than stopping.
    """
    return _ask(prediction, truth, "latex", budget)


def same_as_extracted(prediction: str, truth: str, budget: Budget) -> bool:
    """Return whether the answers that math-verify extracts from two texts are equal; raises as same_symbolically."""
    return _ask(prediction, truth, "text", budget)


def start() -> None:
    """Start the child now, so that a missing math-verify is noticed before the first answer.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    with _lock:
        _running_child()


def _ask(prediction: str, truth: str, kind: str, budget: Budget) -> bool:
    question = (prediction, truth, kind)
    with _lock:
        verdict = _verdicts[question] if question in _verdicts else _compare(question, budget)
    if verdict is None:
        raise TooHard
    return verdict


def _compare(question: tuple[str, str, str], budget: Budget) -> bool | None:
    limit = min(_CPU_SECONDS, budget.cpu_seconds)
    if limit <= 0 or budget.wall_seconds <= 0:
        return None
    child = _running_child()
    start_time, reply, exit_code = time.monotonic(), b"", None
    try:
        reply = _exchange(child, json.dumps([*question, limit]).encode() + b"\n", start_time + budget.wall_seconds)
    finally:
        budget.wall_seconds -= time.monotonic() - start_time
        if not reply:  # also after an interrupt: the late reply would be taken for that of the next question
            exit_code = _stop_child()
    if reply:
        same, seconds = json.loads(reply)
        budget.cpu_seconds -= seconds
        _remember(question, same)
        return bool(same)
    budget.cpu_seconds -= limit
    if limit == _CPU_SECONDS and exit_code != -signal.SIGKILL:  # killed for wall time or by the system: no verdict
        _remember(question, None)
    return None


def _remember(question: tuple[str, str, str], verdict: bool | None) -> None:
    if len(_verdicts) >= _MAX_VERDICTS:
        del _verdicts[next(iter(_verdicts))]
    _verdicts[question] = verdict


def _exchange(child: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Send ``request`` and return the child's next line; empty if the child ends first or the deadline passes."""
    assert child.stdin is not None
    assert child.stdout is not None
    to, from_ = child.stdin.fileno(), child.stdout.fileno()
    poll = select.poll()  # select.select has a limit on descriptors
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
    """Return the running child or start one; RuntimeError with the last child's output if none starts."""
    global _child, _parent_pid
    if _child is not None and _parent_pid == os.getpid() and _child.poll() is None:
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
            except OSError as error:  # out of memory or processes, perhaps temporarily
                fault = str(error)
                continue
            _parent_pid = os.getpid()
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
    """Stop the child unless it has already ended, and return its exit code."""
    global _child
    child, _child = _child, None
    if child is None or _parent_pid != os.getpid():
        return None
    with child:  # waits, and closes the pipes
        try:
            child.wait(0.1)  # its pipe closes shortly before it exits
        except subprocess.TimeoutExpired:
            child.kill()
    return child.returncode


atexit.register(_stop_child)


def _serve() -> None:
    """Answer comparisons, one JSON line each, until the parent exits."""
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries must not be read as a verdict
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
        # The rounding of math-verify is absolute (small numbers would be equal), so ask for exactness.
        return bool(verify(*sides, float_rounding=15, allow_set_relation_comp=True, timeout_seconds=None))

    print(_READY.decode(), end="", file=replies, flush=True)
    for line in sys.stdin:
        *question, limit = json.loads(line)
        start_time = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)  # SIGPROF ends a process that does not handle it
        same = compare(*question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([same, time.process_time() - start_time]), file=replies, flush=True)


def _close(prediction: Any, truth: Any) -> bool | None:
    """Compare two numbers of which one is a decimal, with relative tolerance; None for other expressions."""
    from sympy import Expr, Float

    numbers = [side for side in (prediction, truth) if isinstance(side, Expr) and side.is_number]
    if len(numbers) < 2 or not (prediction.has(Float) or truth.has(Float)):
        return None
    difference, scale = abs((prediction - truth).evalf()), abs(truth.evalf())
    return bool(difference <= _RELATIVE_TOLERANCE * scale)


if __name__ == "__main__":
    _serve()
