"""``recipes.launch --executor slurm`` on a real SLURM: two nodes, a rank on each (two cores have no room for more)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prism_megatron.observe.metrics import LOSS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PRODUCTION = (
    "sft_qwen3_vl_8b_1n8g_h100_bf16",
    "align_qwen3_vl_8b_2n8g_h100_bf16",
    "rlvr_gspo_qwen3_vl_30b_a3b_4n8g_h100_bf16",
)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    path.write_text(
        "{account: none, partition: batch, time: '00:10:00', nodes: 2, ranks_per_node: 1, gpus_per_node: 0, "
        "exclusive: false, mem: 2G, grace_seconds: 60, max_crashes: 1, environment: {GLOO_SOCKET_IFNAME: lo}, "
        f"setup: ['export PATH={Path(sys.executable).parent}:$PATH']}}"
    )
    return path


def test_preempted_and_crashed_and_resumed(
    slurm: dict[str, str], cluster: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """TERM to the ranks is what SLURM sends before a time limit (--signal); then a rank is killed."""
    arguments = [
        *("tiny_sft", "--executor", "slurm", "--cluster", str(cluster), "--detach", f"run.dir={tmp_path}"),
        *(f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl", "eval.num_questions=0"),
        *("global_batch_size=16", "run.train_iters=30", "run.save_interval=1000"),
    ]
    jobs = []
    for name in ("straight", "disturbed"):
        launch(slurm, *arguments, f"run.name={name}")
        jobs.append(ask(slurm, "squeue", "-h", "-t", "all", "-o", "%i", "--sort=-i").split()[0])
    stage = tmp_path / "disturbed"
    logs = stage / "logs" / f"job{jobs[1]}"

    wait_for(lambda: iterations(stage) >= 2)
    ask(slurm, "scancel", "--signal=TERM", jobs[1])
    wait_for(lambda: "told to stop, and saved" in report(logs / "start0"))
    saved = iterations(stage)
    wait_for(lambda: iterations(stage) > saved)
    kill_rank(1, "run.name=disturbed")
    wait_for(lambda: "failed" in report(logs / "start1"))
    assert re.search(r"rank 1 on node\d, GPU 0, was the first to end, with status 137", report(logs / "start1"))

    wait_for(lambda: {job_state(slurm, job) for job in jobs} <= ENDED)
    assert [job_state(slurm, job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert sorted(path.name for path in (logs / "start2").iterdir()) == ["rank_0000.log", "rank_0001.log"]
    assert losses(stage) == losses(tmp_path / "straight")


def test_a_stage_that_fails_cancels_those_after_it(slurm: dict[str, str], cluster: Path, tmp_path: Path) -> None:
    arguments = ["tiny_pipeline", "--executor", "slurm", "--cluster", str(cluster), "--name", "fails"]
    environment = slurm | {"PYTHONPATH": str(ROOT)}
    said = launch(environment, *arguments, "sft.data=nowhere.jsonl", cwd=tmp_path, expect=1)
    assert "sft did not finish; why is at the end of runs/fails/sft/logs/*/*/report.txt" in said
    (logs,) = (tmp_path / "runs" / "fails" / "sft" / "logs").glob("job*/start0")
    assert "nowhere.jsonl" in report(logs).splitlines()[-1]
    states = ask(slurm, "squeue", "-h", "-t", "all", "-o", "%j %T", "--sort=i").splitlines()[-5:]
    after = [f"prism.{stage} CANCELLED" for stage in ("collect", "warmup", "align", "rlvr")]
    assert states == ["prism.sft FAILED", *after]


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


def launch(environment: dict[str, str], *arguments: str, cwd: Path = ROOT, expect: int = 0) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "recipes.launch", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout


def job_state(environment: dict[str, str], job: str) -> str:
    """Empty where SLURM did not answer: it may be too busy."""
    command = ["scontrol", "show", "job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"JobState=(\w+)", done.stdout)
    return found[1] if found else ""


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"nothing happened for {seconds} s")
        time.sleep(0.2)


def iterations(stage: Path) -> int:
    log = stage / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def report(logs: Path) -> str:
    path = logs / "report.txt"
    return path.read_text() if path.exists() else ""


def kill_rank(rank: int, argument: str) -> None:
    killed = 0
    for process in psutil.process_iter(["cmdline", "name"]):
        is_ours = argument in (process.info["cmdline"] or []) and process.info["name"].startswith("python")
        if is_ours and process.environ().get("RANK") == str(rank):
            process.kill()
            killed += 1
    assert killed


def losses(stage: Path) -> list[float]:
    return [json.loads(line)[LOSS] for line in (stage / "metrics.jsonl").read_text().splitlines()]
