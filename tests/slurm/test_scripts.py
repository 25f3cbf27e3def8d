"""The scripts without NeMo-Run: lines of a rank get a time that sorts, and the pipeline is submitted as a chain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import shape_of
from recipes.pipeline import steps_of

ROOT = Path(__file__).resolve().parents[2]


def test_lines_of_all_ranks_in_order_of_time_where_a_comma_is_the_decimal_point(tmp_path: Path) -> None:
    """Ranks take turns, each line of one after the line of the other."""
    source = Path("/usr/share/i18n/locales/de_DE")
    if not shutil.which("localedef") or not source.exists():
        pytest.skip("no localedef, or no locales to compile: apt-get install locales")
    german = tmp_path / "locales" / "de_DE"
    german.parent.mkdir()
    subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(german)], check=True, timeout=300)
    environment = os.environ | {"LOCPATH": str(german.parent), "LC_ALL": "de_DE"}
    logs = tmp_path / "start0"
    logs.mkdir()
    for turn in range(3):
        for rank in ("0", "1"):
            numbers = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank, "PRISM_LOGS": str(logs)}
            command = ["bash", "slurm/rank.sh", "echo", f"turn {turn}: Grüße"]
            subprocess.run(command, cwd=ROOT, env=environment | numbers, check=True, timeout=30)
    merged = subprocess.run(
        ["slurm/merge_logs.sh", str(logs)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    stamped = [
        re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) \[(\d)\] turn (\d): Grüße", line) for line in merged
    ]
    assert all(stamped), merged
    assert [found.groups()[1:] for found in stamped if found] == [(rank, turn) for turn in "012" for rank in "01"]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_pipeline_is_a_chain_of_jobs(precision: str, slurm: dict[str, str]) -> None:
    """Held, so that nothing runs: nodes, dependencies and command lines are those of the launcher's steps."""
    pipeline = f"pipeline_gspo_qwen3_vl_30b_a3b_h100_{precision}"
    overrides = ["sft.data=data/my demonstrations.jsonl", "rlvr.run.train_iters=7"]
    arguments = ["30b_a3b", "gspo", *(["fp8"] if precision == "fp8" else []), "--partition=batch", "--hold", *overrides]
    done = submit(slurm, *arguments)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^(\w+): job (\d+), (\w+)$", done.stdout, re.MULTILINE)
    steps = steps_of(pipeline, pipeline, overrides)
    assert [(name, recipe) for name, _, recipe in jobs] == [(step.name, step.recipe) for step in steps]
    try:
        before = "(null)"
        for (name, job, recipe), step in zip(jobs, steps, strict=True):
            described = subprocess.run(
                ["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, check=True, timeout=30
            ).stdout
            nodes, _ = shape_of(recipe) or (0, 0)
            words = " ".join([f"runs/{pipeline}/{name}", recipe, *step.overrides])
            assert f"JobName=prism.{name}\n" in described
            assert f" Dependency={before}\n" in described
            assert re.search(rf"NumNodes={nodes}(-{nodes})? ", described)
            assert f"/slurm/train.sbatch {words}\n" in described
            before = f"afterok:{job}(unfulfilled)"
    finally:
        subprocess.run(["scancel", *(job for _, job, _ in jobs)], env=slurm, check=True, timeout=30)


def test_a_pipeline_that_is_none_is_refused_in_a_line(slurm: dict[str, str]) -> None:
    for arguments, message in [
        (["8b", "ppo"], "error: unknown recipe or pipeline 'pipeline_ppo_qwen3_vl_8b_h100_bf16'; there are pipeline_"),
        (["8b", "grpo", "lr=1"], "error: override 'lr=1' must start with a stage"),
    ]:
        done = submit(slurm, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = environment | {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    command = ["slurm/pipeline.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=120)
