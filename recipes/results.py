"""Results of a pipeline's stages, and the pooled table of a study."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_megatron import config as cfg
from prism_megatron.files import directory_written_atomically, write_atomic
from recipes.pipeline import BASELINE, Step


def collect_results(run_dir: Path, steps: Sequence[Step]) -> None:
    """Write the stages' results to ``results.json`` and copy the last policy, not the baseline's, to ``hf/``."""
    results: list[dict[str, Any]] = []
    last: Path | None = None
    for step in steps:
        stage = cfg.stage_dir(step.config())
        if (stage / "results.json").is_file():
            results += [row | {"stage": step.name} for row in json.loads((stage / "results.json").read_text())]
            last = last if step.name == BASELINE else stage / "hf"
    write_atomic(run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if last is not None:
        with directory_written_atomically(run_dir / "hf") as partial:
            shutil.copytree(last, partial, dirs_exist_ok=True)


def write_study(study_dir: Path, run_dirs: Sequence[Path]) -> str:
    """Pool the results of a study's runs by stage. Writes ``results.json`` and a Markdown table, which is returned.

    All seeds answer the same held-out questions, so the standard error is that of one seed's questions, an upper bound
    of the pooled mean's. The error of a difference to the first stage treats the two as independent, which is an upper
    bound as well.
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
