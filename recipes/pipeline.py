"""Chains of stages: which recipe, with which overrides, reading what the one before wrote."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron import config as cfg
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from recipes import stage_recipe
from recipes.layouts import LAYOUTS, SIZES
from recipes.qwen3_vl import ALGORITHMS, recipe_name

_RESTART = "run.on_change=restart"
BASELINE = "rlvr_only"  # what a study sets beside the method: RLVR straight after SFT


def _production_stages(algorithm: str, size: str, precision: str) -> dict[str, str]:
    """Recipe of each stage; what is never in FP8 is in BF16."""
    families = {stage: stage for stage in ("sft", "collect", "warmup", "align")} | {"rlvr": f"rlvr_{algorithm}"}
    return {
        stage: recipe_name(family, size, precision if (stage, size) in LAYOUTS[precision] else "bf16")
        for stage, family in families.items()
    }


PRODUCTION_PIPELINES = {
    f"pipeline_{algorithm}_qwen3_vl_{size}_h100_{precision}": _production_stages(algorithm, size, precision)
    for precision, layouts in LAYOUTS.items()
    for algorithm in ALGORITHMS
    for size in SIZES
    if all((stage, size) in layouts for stage in ("sft", "align", "rlvr"))
}


@dataclass(frozen=True)
class Step:
    """A stage recipe and its overrides: exactly the command line that would run it alone. ``name`` is its folder."""

    name: str
    recipe: str
    overrides: tuple[str, ...]

    def config(self) -> cfg.StageConfig:
        return cfg.apply_overrides(stage_recipe(self.recipe)(), self.overrides)


def tiny_steps(name: str, extra: Sequence[str] = (), seed: int = 1) -> list[Step]:
    """The tiny recipes under ``runs/<name>``, data and base model included."""
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
    """The stages of one of ``PRODUCTION_PIPELINES`` under ``runs/<name>``; data and base model are the recipes'."""
    return _chain(name, {stage: (recipe, ()) for stage, recipe in PRODUCTION_PIPELINES[pipeline].items()}, extra)


def _chain(name: str, stages: Mapping[str, tuple[str, tuple[str, ...]]], extra: Sequence[str]) -> list[Step]:
    """SFT -> collect -> warm-up -> alignment -> RLVR, one checkpoint lineage; ``extra`` comes last.

    A stage that was made from other inputs or settings than it would be now is moved aside and begun anew.
    """
    root = f"runs/{name}"
    handed_over = {
        "sft": (),
        "collect": (f"model.hf_checkpoint={root}/sft/hf",),
        "warmup": (f"model.hf_checkpoint={root}/sft/hf", f"data={root}/collect/warmup_pairs.jsonl"),
        "align": (f"model.hf_checkpoint={root}/sft/hf", f"discriminator.hf_checkpoint={root}/warmup/hf"),
        "rlvr": (f"model.hf_checkpoint={root}/align/hf", f"data={root}/collect/rlvr.parquet"),
    }
    by_stage = _by_stage(extra, handed_over)
    return [
        Step(stage, recipe, (f"run.name={name}/{stage}", _RESTART, *handed_over[stage], *own, *by_stage.get(stage, ())))
        for stage, (recipe, own) in stages.items()
    ]


def baseline_step(name: str, steps: Sequence[Step]) -> Step:
    """RLVR straight after SFT, with as many policy updates as alignment and RLVR have together."""
    align, rlvr = (next(step for step in steps if step.name == stage) for stage in ("align", "rlvr"))
    runs = [step.config().run for step in (align, rlvr)]
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
    """Pipeline overrides name their stage first: ``rlvr.run.train_iters=40``."""
    sorted_out: dict[str, list[str]] = {}
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
        sorted_out.setdefault(stage, []).append(rest)
    return sorted_out


def collect_results(run_dir: Path, steps: Sequence[Step]) -> None:
    """Gather the stages' results into ``results.json`` and put the last policy of the lineage at ``hf/``."""
    results: list[dict[str, Any]] = []
    last: Path | None = None
    for step in steps:
        stage = cfg.stage_dir(step.config())
        if (stage / "results.json").is_file():
            results += [row | {"stage": step.name} for row in json.loads((stage / "results.json").read_text())]
            last = last if step.name == BASELINE else stage / "hf"
    write_atomic(run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if last is not None:
        partial = run_dir / ".hf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(last, partial)
        shutil.rmtree(run_dir / "hf", ignore_errors=True)
        os.replace(partial, run_dir / "hf")


def write_study(study_dir: Path, run_dirs: Sequence[Path]) -> str:
    """Pool the runs' results, stage by stage, into ``results.json`` and a Markdown table, which is returned.

    All seeds answer the same held-out questions, so more seeds are not more questions: a standard error is that of one
    seed's questions, which bounds the pooled mean's from above. The seeds' own accuracies stand beside it. The error of
    a difference to the first stage takes the two as independent, another bound from above.
    """
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for run_dir in run_dirs:
        for row in json.loads((run_dir / "results.json").read_text()):
            by_stage.setdefault(row["stage"], []).append(row)
    pooled = [_pool(stage, rows) for stage, rows in by_stage.items()]
    first = pooled[0]
    lines = [
        f"| after | accuracy | seed by seed | over {first['stage']} | caption recall | steps correct "
        "| format valid | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in pooled:
        gain = "–"
        if row is not first:
            gain = f"{100 * (row['accuracy'] - first['accuracy']):+.1f} ± "
            gain += f"{100 * math.hypot(row['accuracy_stderr'], first['accuracy_stderr']):.1f}"
        cells = [
            row["stage"],
            _percent(row, "accuracy"),
            " ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"]),
            gain,
            _percent(row, "caption_recall"),
            _percent(row, "step_correct"),
            f"{100 * row['format_valid']:.1f} %",
            f"{row['response_tokens']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    write_atomic(study_dir / "results.json", json.dumps(pooled, indent=2) + "\n")
    write_atomic(study_dir / "table.md", table + "\n")
    return table


def _pool(stage: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    questions = rows[0]["num_questions"]
    assert all(row["num_questions"] == questions for row in rows), "the seeds answer the same questions"

    def mean(key: str) -> float:
        return float(sum(row[key] for row in rows) / len(rows))

    pooled: dict[str, Any] = {
        "stage": stage,
        "num_questions": questions,
        "num_seeds": len(rows),
        "accuracy_by_seed": [row["accuracy"] for row in rows],
    }
    for key in ("accuracy", "caption_recall", "step_correct", "format_valid", "response_tokens"):
        pooled[key] = mean(key)
    pooled["accuracy_stderr"] = math.sqrt(pooled["accuracy"] * (1 - pooled["accuracy"]) / questions)
    for key in ("caption_recall_stderr", "step_correct_stderr"):
        pooled[key] = mean(key)
    return pooled


def _percent(row: dict[str, Any], key: str) -> str:
    return f"{100 * row[key]:.1f} ± {100 * row[key + '_stderr']:.1f} %"
