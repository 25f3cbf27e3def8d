"""The log of a stage: what is written, and what a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron.observe.logger import MetricsLog


def open_log(directory: Path, resume_from: int = 0, is_main: bool = True) -> MetricsLog:
    return MetricsLog(directory, "sft", 10, resume_from, is_main)


def logged(directory: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["loss"]) for row in rows]


def test_undefined_metrics_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 0.5, "perception_gap": None})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"stage", "iteration", "time", "loss"}
    assert "1/10  loss 0.5" in capsys.readouterr().out
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_rewrites_what_it_runs_again(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for iteration in (1, 2, 3):
            log.log(iteration, {"loss": iteration})
            log.rollouts(iteration, [{"iteration": iteration}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "iter')  # killed while writing
    with open_log(tmp_path, resume_from=2) as log:
        log.log(3, {"loss": 30})
    assert logged(tmp_path) == [(1, 1), (2, 2), (3, 30)]
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 2


def test_a_value_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with open_log(tmp_path) as log, pytest.raises(FloatingPointError, match="sft: loss is nan at iteration 4"):
        log.log(4, {"loss": float("nan")})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "stage", is_main=False) as log:
        log.log(1, {"loss": 1.0})
        log.rollouts(1, [{"iteration": 1}])
    assert not (tmp_path / "stage").exists()
