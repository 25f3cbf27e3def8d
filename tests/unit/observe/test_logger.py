"""The log of a stage: what is written, and what a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron.files import drop_rows_after, iteration_rows
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


def rows(directory: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / name).read_bytes().decode().split("\n")[:-1]]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\r"])
def test_a_text_with_other_line_ends_is_one_row(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    for resume_from in (0, 1):
        with open_log(tmp_path, resume_from) as log:
            log.rollouts(resume_from + 1, [{"iteration": resume_from + 1, "response": text}])
    assert [row["response"] for row in rows(tmp_path, "rollouts.jsonl")] == [text, text]
    assert [row["response"] for row in iteration_rows(tmp_path / "rollouts.jsonl")] == [text, text]


def test_each_distinct_picture_is_stored_once(tmp_path: Path) -> None:
    for resume_from in (0, 1):
        with open_log(tmp_path, resume_from) as log:
            pictures = (b"red", b"blue", b"red", None)
            log.rollouts(resume_from + 1, [{"iteration": resume_from + 1, "image": one} for one in pictures])
    red, blue, again, none = (row["image"] for row in rows(tmp_path, "rollouts.jsonl")[4:])
    assert red == again != blue
    assert none is None
    assert {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == {red: b"red", blue: b"blue"}


FOREIGN = (b"[1]\n", b"7\n", b'"text"\n', b"{}\n", b'{"iteration": "2"}\n', b"\xff\xfe\n", b"\n", b"not JSON\n")


@pytest.mark.parametrize("foreign", FOREIGN)
def test_lines_that_are_not_rows_are_removed_with_a_warning(
    tmp_path: Path, foreign: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(foreign)
    with open_log(tmp_path, resume_from=1) as log:
        log.log(2, {"loss": 2.0})
    assert logged(tmp_path) == [(1, 1), (2, 2)]
    assert "metrics.jsonl: removed 1 lines at its end that are not rows" in capsys.readouterr().out


def test_only_the_end_of_a_log_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So a start takes as long after a million rows as after one."""
    log = tmp_path / "rollouts.jsonl"
    log.write_bytes(b"no row\n" + b'{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n')
    drop_rows_after(log, 2)
    assert log.read_bytes() == b"no row\n" + b'{"iteration": 1}\n{"iteration": 2}\n'
    assert capsys.readouterr().out == ""
    drop_rows_after(log, 0)
    assert log.read_bytes() == b""


def test_a_value_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with open_log(tmp_path) as log, pytest.raises(FloatingPointError, match="sft: loss is nan at iteration 4"):
        log.log(4, {"loss": float("nan")})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "stage", is_main=False) as log:
        log.log(1, {"loss": 1.0})
        log.rollouts(1, [{"iteration": 1}])
    assert not (tmp_path / "stage").exists()
