"""Progress where there is no terminal: lines of a long activity, and nothing of the others."""

from __future__ import annotations

import pytest

from prism_megatron.observe import progress
from prism_megatron.observe.progress import ProgressBar


def test_lines_are_printed_at_intervals_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressBar("sampling", 8, with_lines=True) as bar:
        for clock[0], completed in ((4.0, 1), (12.0, 3), (13.0, 4), (14.0, 8)):
            bar.update(completed)
    assert capsys.readouterr().out == "sampling 3/8  eta 0:20\nsampling 8/8  eta 0:00\n"


@pytest.mark.parametrize("options", [{}, {"with_lines": True, "is_enabled": False}])
def test_nothing_is_printed_otherwise(options: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("rollout", 2, **options) as bar:
        bar.update(1)
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_eta_counts_what_this_process_did(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert ProgressBar("sft", 100, completed=40).eta(50) == "2:30"
