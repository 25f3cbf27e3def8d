"""Pipelines: the stage recipes of each, with overrides that connect a stage to the output of earlier ones.

``python -m recipes.pipeline NAME [stage.key=value ...]`` prints the steps for ``slurm/pipeline.sh``, a line each with
stage, nodes, seconds between TERM and the time limit, run folder, recipe and overrides, separated by tabs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron import config as cfg
from prism_megatron.errors import UserError
from recipes import STAGE_RECIPES, is_config_file, nearest, shape_of, stage_recipe
from recipes.cluster import GRACE_SECONDS
from recipes.layouts import recipe_name

BASELINE = "rlvr_only"  # of a study: RLVR straight after SFT
STUDY_SEEDS = (1, 2, 3)
_RESTART = "run.on_change=restart"
_PRODUCTION = (
    "pipeline_grpo_qwen3_vl_2b_h100_bf16",
    "pipeline_grpo_qwen3_vl_4b_h100_bf16",
    "pipeline_grpo_qwen3_vl_8b_h100_bf16",
    "pipeline_grpo_qwen3_vl_32b_h100_bf16",
    "pipeline_grpo_qwen3_vl_30b_a3b_h100_bf16",
    "pipeline_grpo_qwen3_vl_235b_a22b_h100_bf16",
    "pipeline_dapo_qwen3_vl_2b_h100_bf16",
    "pipeline_dapo_qwen3_vl_4b_h100_bf16",
    "pipeline_dapo_qwen3_vl_8b_h100_bf16",
    "pipeline_dapo_qwen3_vl_32b_h100_bf16",
    "pipeline_dapo_qwen3_vl_30b_a3b_h100_bf16",
    "pipeline_dapo_qwen3_vl_235b_a22b_h100_bf16",
    "pipeline_gspo_qwen3_vl_2b_h100_bf16",
    "pipeline_gspo_qwen3_vl_4b_h100_bf16",
    "pipeline_gspo_qwen3_vl_8b_h100_bf16",
    "pipeline_gspo_qwen3_vl_32b_h100_bf16",
    "pipeline_gspo_qwen3_vl_30b_a3b_h100_bf16",
    "pipeline_gspo_qwen3_vl_235b_a22b_h100_bf16",
    "pipeline_grpo_qwen3_vl_8b_h100_fp8",
    "pipeline_grpo_qwen3_vl_32b_h100_fp8",
    "pipeline_grpo_qwen3_vl_30b_a3b_h100_fp8",
    "pipeline_dapo_qwen3_vl_8b_h100_fp8",
    "pipeline_dapo_qwen3_vl_32b_h100_fp8",
    "pipeline_dapo_qwen3_vl_30b_a3b_h100_fp8",
    "pipeline_gspo_qwen3_vl_8b_h100_fp8",
    "pipeline_gspo_qwen3_vl_32b_h100_fp8",
    "pipeline_gspo_qwen3_vl_30b_a3b_h100_fp8",
)


def _production_stages(pipeline: str) -> dict[str, str]:
    """Return the recipe of each stage: in the pipeline's precision where there is one, else in BF16."""
    found = re.fullmatch(r"pipeline_(\w+)_qwen3_vl_(\w+)_h100_(bf16|fp8)", pipeline)
    assert found is not None, pipeline
    algorithm, size, precision = found.groups()
    stages = {}
    for family in ("sft", "collect", "warmup", "align", f"rlvr_{algorithm}"):
        name = recipe_name(family, size, precision) or recipe_name(family, size, "bf16")
        assert name is not None, f"{pipeline} has no recipe of {family}"
        stages[family.partition("_")[0]] = name
    return stages


PRODUCTION_PIPELINES = {pipeline: _production_stages(pipeline) for pipeline in _PRODUCTION}


PIPELINES = ("tiny_pipeline", "tiny_study", *PRODUCTION_PIPELINES)


@dataclass(frozen=True)
class Step:
    """One stage to run: its folder ``name``, its recipe (or configuration file) and overrides."""

    name: str
    recipe: str
    overrides: tuple[str, ...]

    def config(self) -> cfg.StageConfig:
        return cfg.apply_overrides(stage_recipe(self.recipe)(), self.overrides)

    def arguments(self) -> list[str]:
        """Command line of ``recipes.train``."""
        return [*["--config"] * is_config_file(self.recipe), self.recipe, *self.overrides]


def steps_of(name: str, run_name: str, overrides: Sequence[str]) -> list[Step]:
    """Return the steps of a pipeline, a recipe or a configuration file.

    Raises UserError for an unknown name or a bad override.
    """
    if name == "tiny_study":
        raise UserError("tiny_study runs here only; submit tiny_pipeline with stage.run.seed=N for each seed")
    if name == "tiny_pipeline":
        steps = tiny_steps(run_name, overrides)
    elif name in PRODUCTION_PIPELINES:
        steps = production_steps(name, run_name, overrides)
    elif is_config_file(name):
        steps = [Step(Path(name).stem, name, tuple(overrides))]
    elif name in STAGE_RECIPES:
        steps = [Step(name, name, tuple(overrides))]
    else:
        raise UserError(f"unknown recipe or pipeline {name!r}; {nearest(name, [*PIPELINES, *STAGE_RECIPES])}")
    check_steps(steps)
    return steps


def study_steps(study: str, overrides: Sequence[str]) -> dict[int, list[Step]]:
    """Return the steps of a study by seed: the tiny pipeline under ``runs/<study>/seedN``, and the baseline."""
    by_seed = {}
    for seed in STUDY_SEEDS:
        name = f"{study}/seed{seed}"
        steps = tiny_steps(name, overrides, seed)
        check_steps(steps)
        by_seed[seed] = [*steps, baseline_step(name, steps)]
    return by_seed


def check_steps(steps: Sequence[Step]) -> None:
    """Raise UserError for the first step whose configuration is wrong, before any of them runs."""
    for step in steps:
        step.config()


def tiny_steps(name: str, extra: Sequence[str] = (), seed: int = 1) -> list[Step]:
    """Return the steps of the tiny pipeline, which reads data and base model from ``runs/<name>``."""
    root = f"runs/{name}"
    heldout, seeded = f"eval.data={root}/data/heldout.parquet", f"run.seed={seed}"
    own = {
        "sft": (seeded, f"model.hf_checkpoint={root}/base", f"data={root}/data/sft.jsonl", heldout),
        "collect": (
            seeded,
            f"alignment_data={root}/data/alignment.parquet",
            f"candidates={root}/data/rlvr_candidates.parquet",
        ),
        "warmup": (seeded, f"discriminator.hf_checkpoint={root}/sft/hf"),
        "align": (seeded, f"data={root}/data/alignment.parquet", heldout),
        "rlvr": (seeded, heldout),
    }
    return _chain(name, {stage: (f"tiny_{stage}", overrides) for stage, overrides in own.items()}, extra)


def production_steps(pipeline: str, name: str, extra: Sequence[str] = ()) -> list[Step]:
    """Return the steps of one of ``PRODUCTION_PIPELINES`` in ``runs/<name>``, on the recipes' data and base model."""
    return _chain(name, {stage: (recipe, ()) for stage, recipe in PRODUCTION_PIPELINES[pipeline].items()}, extra)


def _chain(name: str, stages: Mapping[str, tuple[str, tuple[str, ...]]], extra: Sequence[str]) -> list[Step]:
    """Connect SFT -> collect -> warm-up -> alignment -> RLVR; overrides in ``extra`` come last.

    A stage whose settings or inputs have changed since it ran is moved aside and run again.
    """
    root = f"runs/{name}"
    inputs = {
        "sft": (),
        "collect": (f"model.hf_checkpoint={root}/sft/hf",),
        "warmup": (f"model.hf_checkpoint={root}/sft/hf", f"data={root}/collect/warmup_pairs.jsonl"),
        "align": (f"model.hf_checkpoint={root}/sft/hf", f"discriminator.hf_checkpoint={root}/warmup/hf"),
        "rlvr": (f"model.hf_checkpoint={root}/align/hf", f"data={root}/collect/rlvr.parquet"),
    }
    overrides = _by_stage(extra, inputs)
    return [
        Step(stage, recipe, (f"run.name={name}/{stage}", _RESTART, *inputs[stage], *own, *overrides.get(stage, ())))
        for stage, (recipe, own) in stages.items()
    ]


def baseline_step(name: str, steps: Sequence[Step]) -> Step:
    """Return RLVR straight after SFT, with as many policy updates as alignment and RLVR have together."""
    align, rlvr = (next(step for step in steps if step.name == stage) for stage in ("align", "rlvr"))
    runs = [run for step in (align, rlvr) if isinstance(run := step.config().run, cfg.RunConfig)]
    if any(run.num_epochs for run in runs):
        raise UserError("a study counts updates: give align and rlvr run.train_iters, not run.num_epochs")
    iterations = sum(run.train_iters for run in runs)
    changes = (
        f"run.name={name}/{BASELINE}",
        f"model.hf_checkpoint=runs/{name}/sft/hf",
        f"run.train_iters={iterations}",
    )
    return Step(BASELINE, rlvr.recipe, (*rlvr.overrides, *changes))


def _by_stage(extra: Sequence[str], stages: Collection[str]) -> dict[str, list[str]]:
    """Group overrides such as ``rlvr.run.train_iters=40`` by the stage that they start with."""
    by_stage: dict[str, list[str]] = {}
    for override in extra:
        stage, separator, rest = override.partition(".")
        if not separator or stage not in stages:
            raise UserError(
                f"override {override!r} must start with a stage ({', '.join(stages)}), "
                "for example rlvr.run.train_iters=40"
            )
        if rest.partition("=")[0] in ("run.name", "run.dir"):
            raise UserError(
                f"override {override!r} would take {stage} out of the pipeline's folder, where the other stages look "
                "for what it writes; give the pipeline a folder of its own with --name"
            )
        by_stage.setdefault(stage, []).append(rest)
    return by_stage


def main() -> int:
    """Print the steps of a production pipeline. A user error is one line on stderr and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    name, *overrides = sys.argv[1:]
    try:
        for step in steps_of(name, name, overrides):
            config, (nodes, _) = step.config(), shape_of(step.recipe) or (1, 1)
            print(step.name, nodes, GRACE_SECONDS[config.stage], cfg.stage_dir(config), *step.arguments(), sep="\t")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
