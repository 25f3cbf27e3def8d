"""Chains of stages and the pooled table of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config import RLVRConfig, stage_dir
from prism_megatron.stages.collect import PAIRS, PROMPTS
from recipes.pipeline import PRODUCTION_PIPELINES, baseline_step, production_steps, tiny_steps
from recipes.results import write_study


def result(stage: str, accuracy: float, **changed: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": stage, "accuracy": accuracy, "num_questions": 100, "format_valid": 1.0, "response_tokens": 50.0,
        "caption_recall": 0.5, "caption_recall_stderr": 0.01, "step_correct": 0.25, "step_correct_stderr": 0.02,
    }  # fmt: skip
    return row | changed


def test_each_stage_starts_from_the_one_before():
    steps = {step.name: step.config() for step in tiny_steps("r", seed=7)}
    assert list(steps) == ["sft", "collect", "warmup", "align", "rlvr"]
    assert {config.run.seed for config in steps.values()} == {7}
    assert steps["align"].model.hf_checkpoint == "runs/r/sft/hf"
    assert steps["rlvr"].model.hf_checkpoint == "runs/r/align/hf"


def test_production_stages_start_from_the_one_before():
    assert len(PRODUCTION_PIPELINES) == 3 * (6 + 3), "three algorithms; six sizes in BF16, three in FP8"
    for pipeline, recipes in PRODUCTION_PIPELINES.items():
        steps = {step.name: step for step in production_steps(pipeline, "r", ["rlvr.run.train_iters=7"])}
        assert {stage: step.recipe for stage, step in steps.items()} == recipes
        configs = {stage: step.config() for stage, step in steps.items()}
        assert [stage_dir(config) for config in configs.values()] == [Path("runs/r") / stage for stage in recipes]
        assert configs["collect"].model.hf_checkpoint == configs["align"].model.hf_checkpoint == "runs/r/sft/hf"
        assert configs["align"].discriminator.hf_checkpoint == "runs/r/warmup/hf"
        assert configs["warmup"].data == f"runs/r/collect/{PAIRS}"
        assert configs["rlvr"].model.hf_checkpoint == "runs/r/align/hf"
        assert configs["rlvr"].data == f"runs/r/collect/{PROMPTS}"
        assert configs["rlvr"].run.train_iters == 7
        assert {config.run.on_change for config in configs.values()} == {"restart"}
        precision = pipeline.rpartition("_")[2]
        assert {configs[stage].model.precision for stage in ("sft", "align", "rlvr")} == {precision}


def test_the_baseline_has_as_many_policy_updates_as_alignment_and_rlvr():
    steps = tiny_steps("r", ["align.run.train_iters=11", "rlvr.run.train_iters=6", "rlvr.optimizer.lr=0.5"])
    config = baseline_step("r", steps).config()
    assert isinstance(config, RLVRConfig)
    assert config.run.train_iters == 17
    assert config.model.hf_checkpoint == "runs/r/sft/hf"
    assert config.optimizer.lr == 0.5
    assert config.run.name == "r/rlvr_only"


def test_a_baseline_of_as_many_updates_needs_their_number():
    with pytest.raises(ValueError, match=r"give align and rlvr run.train_iters, not run.num_epochs"):
        baseline_step("r", tiny_steps("r", ["rlvr.run.num_epochs=1"]))


def test_an_override_must_name_its_stage():
    with pytest.raises(ValueError, match=r"override 'run.train_iters=1' must start with a stage"):
        tiny_steps("r", ["run.train_iters=1"])


def test_study_table(tmp_path: Path):
    """Two seeds, 100 questions: 0.5 after SFT (stderr sqrt(0.25 / 100) = 5 %), 0.8 after RLVR (4 %)."""
    for seed, (sft, rlvr) in enumerate([(0.4, 0.75), (0.6, 0.85)]):
        (tmp_path / f"seed{seed}").mkdir()
        rows = [result("sft", sft), result("rlvr", rlvr, caption_recall=0.9 + 0.1 * seed, response_tokens=90.4)]
        (tmp_path / f"seed{seed}" / "results.json").write_text(json.dumps(rows))
    table = write_study(tmp_path, [tmp_path / "seed0", tmp_path / "seed1"])
    assert table.splitlines()[2:] == [
        "| sft | 50.0 ± 5.0 % | 40.0 60.0 | – | 50.0 ± 1.0 % | 25.0 ± 2.0 % | 100.0 % | 50 |",
        # sqrt(5.0^2 + 4.0^2) = 6.4
        "| rlvr | 80.0 ± 4.0 % | 75.0 85.0 | +30.0 ± 6.4 | 95.0 ± 1.0 % | 25.0 ± 2.0 % | 100.0 % | 90 |",
    ]
    assert (tmp_path / "table.md").read_text() == table + "\n"
    pooled = json.loads((tmp_path / "results.json").read_text())
    assert [(row["stage"], row["num_seeds"], row["num_questions"]) for row in pooled] == [
        ("sft", 2, 100),
        ("rlvr", 2, 100),
    ]
