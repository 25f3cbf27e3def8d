"""Symbolic equality by math-verify (and sympy under it), in a process of its own that can be ended.

A computer algebra system can be kept busy for ever, or made to fill the memory, by an answer of a few characters; and
Python cannot interrupt itself inside one long integer operation, nor outside its main thread. So the algebra lives in a
child, and each comparison has a budget of processor time and of memory that the kernel enforces. A child that exceeds
it is gone, the answer counts as wrong, and the next comparison starts another child. Processor time, not the clock,
so that the verdict does not depend on what else the machine does.

Run as a script, this file is the child. It imports nothing of this package.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any

_CPU_SECONDS = 2.0  # per comparison; the slowest honest answers of the tests take 0.2
_MEMORY_BYTES = 2 << 30
_READY = "ready"
_RELATIVE_TOLERANCE = 1e-6  # spec 5.3

_lock = threading.Lock()
_child: subprocess.Popen[str] | None = None
_child_of = 0


class TooHard(Exception):
    """A comparison exceeded its budget."""


def same_symbolically(prediction: str, truth: str) -> bool:
    """Whether two LaTeX expressions (without delimiters) are equal.

    Raises TooHard where that takes too much time or memory, and RuntimeError if math-verify cannot be started at all.
    """
    return _ask(prediction, truth, "latex")


def same_as_extracted(prediction: str, truth: str) -> bool:
    """Whether whatever math-verify extracts from two texts, by its defaults, is equal. Raises as above."""
    return _ask(prediction, truth, "text")


def _ask(prediction: str, truth: str, kind: str) -> bool:
    verdict = _compare(prediction, truth, kind)
    if verdict is None:
        raise TooHard
    return verdict


@lru_cache(maxsize=1 << 16)  # the responses of a group say the same few things
def _compare(prediction: str, truth: str, kind: str) -> bool | None:
    with _lock:
        child = _running_child()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([prediction, truth, kind]) + "\n")
            child.stdin.flush()
            verdict = child.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if not verdict:
            _stop_child()
            return None
        return verdict == "1\n"


def _running_child() -> subprocess.Popen[str]:
    global _child, _child_of
    if _child is not None and _child_of == os.getpid() and _child.poll() is None:
        return _child
    _child_of = os.getpid()
    # -P: this folder must not shadow a library's modules.
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    _child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert _child.stdout is not None
    if _child.stdout.readline().strip() != _READY:
        raise RuntimeError(f"math-verify does not start; `{' '.join(command)}` says why")
    return _child


def _stop_child() -> None:
    global _child
    if _child is not None and _child_of == os.getpid():
        _child.kill()
        _child.communicate()
    _child = None


atexit.register(_stop_child)


def _serve() -> None:
    """Answer comparisons, one JSON line each, until the parent is gone."""
    import logging
    import resource
    import signal

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

    print(_READY, file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # SIGPROF ends a process that does not handle it
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(verdict), file=replies, flush=True)


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
