"""Functions that the benchmarks share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench.harness import (
    interleaved,
    median_and_p90,
    peak_bytes_of_children,
    provenance,
    read_baseline,
    regressions,
)


def result(speed: float, **changed: Any) -> dict[str, Any]:
    same = {"benchmark": "train", "config": {"recipe": "tiny_sft"}, "hardware": "CPU", "threads": 1}
    return same | {"ours": {"tokens_per_second": speed}} | changed


def test_sides_alternate_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    sides = {name: lambda number, name=name: order.append(f"{name}{number}") for name in "ab"}
    seconds = interleaved(sides, steps=2, warmup=1)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_median_and_p90() -> None:
    assert median_and_p90([float(n) for n in range(11)]) == {"median": 5.0, "p90": 9.0}


def test_memory_of_children_and_grandchildren() -> None:
    before = peak_bytes_of_children()
    holds = "held = bytearray(b'1') * (64 << 20); print(flush=True); input()"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}], check=False)"
    with subprocess.Popen(
        [sys.executable, "-c", grandchild], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 64 << 20 < peak_bytes_of_children() - before < 128 << 20
        process.communicate("\n")
    assert peak_bytes_of_children() == before


def test_a_figure_that_got_worse_is_named() -> None:
    assert regressions(result(90), result(100), ["ours.tokens_per_second"], 0.15) == []
    assert regressions(result(80), result(100), ["ours.tokens_per_second"], 0.15) == [
        "ours.tokens_per_second is 80, the baseline's 100: worse by more than 15%"
    ]


def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the baseline's hardware is 'H200', this run's is 'CPU'"):
        regressions(result(1), result(1, hardware="H200"), ["ours.tokens_per_second"], 0.1)
    with pytest.raises(ValueError, match=r"the baseline has none of hf\.tokens_per_second"):
        regressions(result(1), result(1), ["hf.tokens_per_second"], 0.1)
    with pytest.raises(ValueError, match="cannot be read"):
        read_baseline(tmp_path / "none.json")


def test_where_a_figure_comes_from() -> None:
    found = provenance()
    assert {"commit", "uncommitted_changes", "versions", "hardware", "cores", "threads"} == found.keys()
