"""The algebra's child process: budgets of a verdict, and children that hang or do not start."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_megatron.reference import answer as reference
from prism_megatron.reward import answer, symbolic
from prism_megatron.reward.answer import is_correct
from prism_megatron.reward.symbolic import Budget, TooHard, same_symbolically


@pytest.fixture(autouse=True)
def no_child() -> Iterator[None]:
    """Start and end every test without a child and without verdicts."""
    forget()
    yield
    forget()


def forget() -> None:
    """Drop the child and all verdicts so far."""
    symbolic._stop_child()
    symbolic._verdicts.clear()


def test_all_comparisons_of_a_verdict_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five parts in no order are up to 15 comparisons, each far below its own limit."""
    asked = ", ".join(rf"\sin({n})+\sqrt{{8}}" for n in range(1, 6))
    truth = ", ".join(rf"2\sqrt{{2}}+\sin({n})" for n in range(5, 0, -1))
    spent = Budget(cpu_seconds=60.0, wall_seconds=600.0)
    monkeypatch.setattr(answer, "Budget", lambda: spent)
    assert is_correct(asked, truth)
    seconds = 60.0 - spent.cpu_seconds
    assert 0 < seconds < 60

    forget()
    small = Budget(cpu_seconds=seconds / 4)
    monkeypatch.setattr(answer, "Budget", lambda: small)
    assert not is_correct(asked, truth)
    assert small.cpu_seconds <= 0
    assert is_correct("x = 3.0", "3"), "what needs no algebra needs no budget"

    # An alternative truth has what the first one left, and the reference's verdict has one budget, too.
    assert not is_correct(r"1+\sin(7)", "8", [r"\sin(7)+1"])
    monkeypatch.setattr(reference, "Budget", lambda: small)
    assert not reference.is_correct(r"1+\sin(7)", r"\sin(7)+1")


def test_what_was_cut_short_is_not_remembered_as_too_hard() -> None:
    question = (r"\sin(1)+\sqrt{8}", r"2\sqrt{2}+\sin(1)")
    with pytest.raises(TooHard):
        same_symbolically(*question, Budget(cpu_seconds=1e-4))
    assert same_symbolically(*question, Budget())


def test_a_child_that_stands_still_is_replaced() -> None:
    """A stopped process uses no processor time: only the clock can tell."""
    assert same_symbolically("x+x", "2x", Budget())
    child = symbolic._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(TooHard):
        same_symbolically("y+y", "2y", Budget(wall_seconds=0.5))
    assert child.returncode == -signal.SIGKILL
    assert same_symbolically("y+y", "2y", Budget()), "another child answers"


def test_an_interrupted_question_does_not_answer_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    assert same_symbolically("x+x", "2x", Budget())
    before = signal.signal(signal.SIGALRM, interrupt)
    child = symbolic._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)  # so that the question is certainly open when the signal comes
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            same_symbolically("y+y", "2y", Budget())
    finally:
        signal.signal(signal.SIGALRM, before)
        child.send_signal(signal.SIGCONT)
    assert not same_symbolically("x+x", "3x", Budget())


def python_that(does: str, folder: Path) -> str:
    """Write a program that replaces the Python that runs the child."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def test_a_child_that_fails_once_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does = f'[ -e {tmp_path}/tried ] && exec {sys.executable} "$@"; touch {tmp_path}/tried; exit 3'
    monkeypatch.setattr(sys, "executable", python_that(does, tmp_path))
    assert is_correct("2(x+1)", "2x+2")


def test_a_child_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong verdicts for lack of a library would be trained on, so this one stops the run, at its start."""
    monkeypatch.setattr(sys, "executable", python_that("echo 'No module named math_verify' >&2; exit 3", tmp_path))
    message = "exit code 3; No module named math_verify.*algebra cannot be judged.*requirements.txt"
    with pytest.raises(RuntimeError, match=message):
        symbolic.start()
    with pytest.raises(RuntimeError, match=message):
        is_correct("2(x+1)", "2x+2")
    assert is_correct("7.0", "7"), "what needs no algebra needs no child"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"No such file.*algebra cannot be judged"):
        symbolic.start()
