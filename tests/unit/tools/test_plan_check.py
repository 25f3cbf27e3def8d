"""Predicted step times beside every measured run we have."""

from __future__ import annotations

import json
from typing import Any

from tools.bench_tables import BASELINES
from tools.plan_check import calibrate, errors

WITHIN = 0.3  # of the measured step: two ranks on two shared cores disturb each other


def test_measured_runs_are_predicted() -> None:
    results: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in BASELINES.glob("*.json")}
    trained = {name: run for name, run in results.items() if run.get("benchmark") == "train"}
    runs = {name: run for name, run in trained.items() if run["config"]["images"] == "mock"}
    fitted = [run for name, run in runs.items() if name.startswith("train_calibrate")]
    off = errors(runs, calibrate(fitted, results["collectives"]))
    assert len(off) >= len(fitted) + 4
    assert max(map(abs, off.values())) < WITHIN, off
