"""Points of a sweep, and the table made of their results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench.step_timers import StepTimers, part_of
from tools.bench.sweep import combinations, facts, table, varied, write


def row(ranks: int, speed: float, *overrides: str) -> dict[str, Any]:
    config = {"recipe": "tiny", "resolutions": [[64, 64], [96, 32]], "overrides": list(overrides)}
    seconds = {"median": 0.1, "p90": 0.2}
    per_rank = {"tokens_per_second_per_rank": speed / ranks, "tokens_per_second_p90_slowest": speed / 2}
    ours = {"tokens_per_second": speed, "step_seconds": seconds, "tflops_per_rank": 1.5, "mfu": None, **per_rank}
    result = {"ranks": ranks, "config": config, "ours": ours, "peak_bytes_of_all_sides": [1e9] * ranks}
    return {"facts": facts(result), "result": result}


def test_every_combination_and_what_varies_together() -> None:
    assert combinations(["ranks:tp=1:1,2:2", "model.recompute=false,true"]) == [
        [("ranks", ranks), ("tp", ranks), ("model.recompute", again)]
        for ranks in ("1", "2")
        for again in ("false", "true")
    ]


@pytest.mark.parametrize("wrong", ["ranks", "ranks=", "ranks:tp=1:1,2", "=1,2"])
def test_what_is_no_sweep_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not KEY=V,W or A:B=V:W,X:Y"):
        combinations([wrong])


def test_the_table_names_what_varies_and_who_was_refused(tmp_path: Path) -> None:
    refused = {"facts": {"ranks": "2", "tp": "3"}, "refused": "error: 3 does not divide 2"}
    rows = [row(1, 100.0, "tp=1"), row(2, 150.0, "tp=2"), refused]
    assert varied(rows) == ["ranks", "tp"]
    lines = table(rows, varied(rows)).splitlines()
    assert lines[0].startswith("| ranks | tp | tokens/s/rank | tokens/s |")
    assert lines[3] == "| 2 | 2 | 75 | 150 | 100 | 200 | 1.5 | – | 0.75 | 1.00 |"
    assert lines[4].startswith("| 2 | 3 | error: 3 does not divide 2 |")
    write(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "table.md", "plot.svg"}


def test_every_second_of_a_step_is_in_one_part() -> None:
    timers = StepTimers()
    timers.begin_step()
    timers("forward-backward", log_level=1).start(barrier=False)
    for name in ("forward-compute", "forward-send", "backward-compute", "all-grads-sync"):
        timers(name).start()
        timers(name).stop()
    timers("forward-backward").stop()
    timers("optimizer-inner-step").start()
    timers("optimizer-inner-step").stop()
    before = timers.layout
    time.sleep(0.02)
    timers("forward-backward").start()
    assert timers.layout - before >= 0.02, "what comes before a second pass is layout, too"
    timers("forward-compute").start()
    timers("forward-compute").stop()
    timers("forward-backward").stop()
    timers.end_step()
    parts = timers.mean(steps=1)
    total = parts.pop("step")
    assert parts.keys() == {"layout", "forward", "pipeline", "backward", "gradients", "optimizer", "other"}
    assert sum(parts.values()) == pytest.approx(total)
    assert min(parts.values()) >= 0
    assert part_of("forward-backward") is None
