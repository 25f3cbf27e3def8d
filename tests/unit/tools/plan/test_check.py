"""Predicted step times compared with every measured run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.convert.qwen3_vl import policy_table
from tools.bench import sync
from tools.bench.inputs import sizes_of
from tools.bench.tables import BASELINES
from tools.plan.check import calibrate, check, errors, sync_errors, training_runs

WITHIN = 0.3  # of the measured step: two ranks on two shared cores disturb each other


def test_measured_runs_are_predicted() -> None:
    results: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in BASELINES.glob("*.json")}
    runs = training_runs(results)
    assert {run["config"]["images"] for run in runs.values()} == {"mock", "shapes"}
    fitted = [run for name, run in runs.items() if name.startswith("train_calibrate")]
    off = errors(runs, calibrate(fitted, results["collectives"]))
    assert len(off) >= len(fitted) + 4
    assert max(map(abs, off.values())) < WITHIN, off


def a_sync(ranks: int, layers: int, seconds: float) -> dict[str, Any]:
    sizes = sizes_of(sync.model_overrides(128, layers))
    size = 4 * sum(rule.numel for rule in policy_table(sizes) if not rule.tied)
    measured = {"ranks": ranks, "weight_bytes": size, "push": {"seconds": {"median": seconds}}}
    return {"benchmark": "sync", "config": {"hidden": 128, "layers": layers}, **measured}


def test_the_weight_sync_is_predicted_next_to_the_measured_push(tmp_path: Path) -> None:
    """Loading at 1 GB a second, whatever the size; a second rank adds what it gathers, as collectives were measured."""
    small, large = a_sync(1, 2, 0.0), a_sync(1, 8, 0.0)
    for result in (small, large):
        result["push"]["seconds"]["median"] = result["weight_bytes"] / 1e9
    collectives = json.loads((BASELINES / "collectives.json").read_text())
    names = ("train_calibrate_small", "train_calibrate_large", "train_calibrate_wide")
    costs = calibrate([json.loads((BASELINES / f"{name}.json").read_text()) for name in names], collectives)
    gathered = costs.intra_latency + large["weight_bytes"] / 2 / costs.intra_bytes_per_second
    two = a_sync(2, 8, large["weight_bytes"] / 1e9 + gathered)
    off = sync_errors({"small": small, "large": large, "two": two}, costs)
    assert off == pytest.approx(dict.fromkeys(("small", "large", "two"), 0.0), abs=1e-6)

    (tmp_path / "sync_two.json").write_text(json.dumps(two))
    (tmp_path / "sync.json").write_text(json.dumps(large))
    paths = [*(BASELINES / f"{name}.json" for name in names), BASELINES / "collectives.json"]
    lines = check([*paths, tmp_path / "sync.json", tmp_path / "sync_two.json"]).splitlines()
    assert lines[-3].startswith("weight sync to the engine")
    assert lines[-2].startswith("sync ")
    assert lines[-2].endswith("+0% (fitted)")
    assert lines[-1].startswith("sync_two ")
    with pytest.raises(ValueError, match=r"fitted to a run of tools\.bench\.sync on one rank; got only two"):
        sync_errors({"two": two}, costs)
