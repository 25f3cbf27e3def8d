"""Chains of stages: which recipe, with which overrides, reading what the one before wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron import config as cfg
from recipes import STAGE_RECIPES


@dataclass(frozen=True)
class Step:
    """A stage recipe and its overrides: exactly the command line that would run it alone."""

    recipe: str
    overrides: tuple[str, ...]

    def config(self) -> cfg.StageConfig:
        return cfg.apply_overrides(STAGE_RECIPES[self.recipe](), self.overrides)


def tiny_steps(name: str, extra: Sequence[str] = (), seed: int = 1) -> list[Step]:
    """SFT -> collect -> warm-up -> alignment -> RLVR under ``runs/<name>``, one checkpoint lineage."""
    root = f"runs/{name}"
    data = f"{root}/data"
    heldout = f"eval.data={data}/heldout.parquet"
    wiring = {
        "sft": (f"model.hf_checkpoint={root}/base", f"data={data}/sft.jsonl", heldout),
        "collect": (
            f"model.hf_checkpoint={root}/sft/hf",
            f"alignment_data={data}/alignment.parquet",
            f"candidates={data}/rlvr_candidates.parquet",
        ),
        "warmup": (
            f"model.hf_checkpoint={root}/sft/hf",
            f"discriminator.hf_checkpoint={root}/sft/hf",
            f"data={root}/collect/warmup_pairs.jsonl",
        ),
        "align": (
            f"model.hf_checkpoint={root}/sft/hf",
            f"discriminator.hf_checkpoint={root}/warmup/hf",
            f"data={data}/alignment.parquet",
            heldout,
        ),
        "rlvr": (f"model.hf_checkpoint={root}/align/hf", f"data={root}/collect/rlvr.parquet", heldout),
    }
    by_stage = _by_stage(extra, set(wiring))
    return [
        Step(f"tiny_{stage}", (f"run.name={name}/{stage}", f"run.seed={seed}", *wired, *by_stage.get(stage, ())))
        for stage, wired in wiring.items()
    ]


def _by_stage(extra: Sequence[str], stages: set[str]) -> dict[str, list[str]]:
    """Pipeline overrides name their stage first: ``rlvr.run.train_iters=40``."""
    sorted_out: dict[str, list[str]] = {}
    for override in extra:
        stage, separator, rest = override.partition(".")
        if not separator or stage not in stages:
            raise ValueError(
                f"override {override!r} must start with a stage ({', '.join(sorted(stages))}), "
                "for example rlvr.run.train_iters=40"
            )
        sorted_out.setdefault(stage, []).append(rest)
    return sorted_out


def collect_results(run_dir: Path, steps: Sequence[Step]) -> None:
    """Gather the stages' results into ``results.json`` and put the last policy at ``hf/``."""
    results = []
    last: Path | None = None
    for step in steps:
        stage = cfg.stage_dir(step.config())
        if (stage / "results.json").is_file():
            results += json.loads((stage / "results.json").read_text())
            last = stage / "hf"
    place = run_dir / "results.json"
    place.with_suffix(".partial").write_text(json.dumps(results, indent=2) + "\n")
    os.replace(place.with_suffix(".partial"), place)
    if last is not None:
        partial = run_dir / ".hf.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(last, partial)
        shutil.rmtree(run_dir / "hf", ignore_errors=True)
        os.replace(partial, run_dir / "hf")
