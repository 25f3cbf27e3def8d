"""A pipeline's time from what its stages have logged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config import to_yaml
from recipes.tiny import tiny_collect, tiny_rlvr, tiny_sft
from tools.bench.harness import regressions
from tools.bench.pipeline import measure, rates


def write_stage(directory: Path, config: Any, rows: list[dict[str, Any]], start: float, ended: float) -> None:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(to_yaml(config))
    (directory / "finished.json").write_text("{}")
    os.utime(directory / "config.yaml", (start, start))
    os.utime(directory / "finished.json", (ended, ended))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sft, rlvr = tiny_sft(), tiny_rlvr()
    rlvr.prompts_per_iteration, rlvr.rollout.samples_per_prompt = 2, 4
    rows = [
        {"iteration": n, "time": 110.0 + n, "seconds_data": 0.25, "seconds_train": 0.5, "tokens_per_second": 100.0 * n}
        for n in (1, 2, 3)
    ]
    write_stage(tmp_path / "sft", sft, rows, start=100.0, ended=120.0)
    rows = [{"iteration": 1, "time": 210.0, "response_tokens": 30.0, "seconds_rollout": 6.0, "seconds_train": 2.0}]
    write_stage(tmp_path / "rlvr", rlvr, rows, start=201.0, ended=211.0)
    write_stage(tmp_path / "collect", tiny_collect(), [], start=130.0, ended=150.0)
    return tmp_path


def test_every_second_is_some_stages(run: Path) -> None:
    result = measure(run)
    sft, rlvr = result["stages"]["sft"], result["stages"]["rlvr"]
    assert sft["parts"] == {"data": 0.75, "train": 1.5, "setup": 110.25 - 100.0, "finish": 7.0}
    assert sft["iteration_seconds"]["median"] == 0.75
    assert sft["tokens_per_second"] == 200.0
    assert rlvr["parts"] == {"rollout": 6.0, "train": 2.0, "setup": 1.0, "finish": 1.0}
    assert rlvr["engine_tokens_per_second"] == 8 * 30 / 6
    assert result["seconds"] == pytest.approx(sft["seconds"] + 10 + 20)
    assert result["stages"]["collect"]["parts"] == {"whole": 20.0}
    assert result["share_of_engine"] == pytest.approx(6 / result["seconds"])
    assert sum(result["share_of_stages"].values()) == pytest.approx(1)


def test_a_slower_stage_is_named(run: Path) -> None:
    before, now = measure(run), measure(run)
    now["stages"]["rlvr"]["iterations_per_second"] *= 0.8
    assert regressions(now, before, rates(now), 0.1) == [
        "stages.rlvr.iterations_per_second is 0.1, the baseline's 0.125: worse by more than 10%"
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no stage with a line in metrics"):
        measure(tmp_path)
