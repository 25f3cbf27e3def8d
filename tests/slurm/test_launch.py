"""``recipes.launch --executor slurm`` on a real SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PRODUCTION = (
    "sft_qwen3_vl_8b_1n8g_h100_bf16",
    "align_qwen3_vl_8b_2n8g_h100_bf16",
    "rlvr_gspo_qwen3_vl_30b_a3b_4n8g_h100_bf16",
)


@pytest.mark.parametrize("recipe", PRODUCTION)
def test_production_scripts(recipe: str, slurm: dict[str, str], tmp_path: Path) -> None:
    """Accepted by sbatch on nodes of eight GPUs, and as they were: PRISM_UPDATE_GOLDEN=1 writes them anew."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{account: none, partition: batch, workdir: /shared, pass_environment: [HF_TOKEN]}")
    secret = slurm | {"HF_TOKEN": "not-to-be-written"}
    launch(secret, recipe, "--executor", "slurm", "--cluster", str(cluster), "--dryrun")
    (script,) = (Path(slurm["NEMORUN_HOME"]) / "experiments" / recipe).glob("*/*_sbatch.sh")
    ask(slurm, "sbatch", "--test-only", str(script))
    text = script.read_text().replace(str(script.parent / recipe), "JOB_DIR")
    golden = GOLDEN / f"{recipe}.sh"
    if os.environ.get("PRISM_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    written = [path.read_bytes() for path in script.parent.rglob("*") if path.is_file()]
    assert not any(secret["HF_TOKEN"].encode() in content for content in written)


def launch(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "recipes.launch", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
