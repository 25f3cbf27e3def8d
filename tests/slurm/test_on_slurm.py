"""``recipes.launch --executor slurm`` on a real SLURM of two nodes: a rank on each, two for the whole pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_megatron.checkpoint.checkpointer import Checkpointer
from prism_megatron.data.shapes import MANIFEST, ShapesConfig
from recipes.pipeline import tiny_steps

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PRODUCTION = "pipeline_gspo_qwen3_vl_30b_a3b_h100_fp8"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
ITERATIONS = 6
STAGES = Path(__file__).resolve().parents[1] / "integration" / "stages_worker.py"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    path.write_text(
        "{account: none, partition: batch, time: '02:00:00', nodes: 2, ranks_per_node: 1, gpus_per_node: 0, "
        "exclusive: false, mem: 4G, grace_seconds: 60, max_crashes: 1, environment: {GLOO_SOCKET_IFNAME: lo}, "
        f"setup: ['export PATH={Path(sys.executable).parent}:$PATH']}}"
    )
    return path


@pytest.fixture(autouse=True)
def _launchers_end_with_their_test() -> Iterator[None]:
    yield
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.startswith("recipes") for word in child.cmdline()):
                child.kill()


def test_preempted_and_requeued(
    slurm: dict[str, str], tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    """Two nodes with a rank each, without NeMo-Run. SLURM sends TERM before a time limit (--signal)."""
    small = [f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl", "eval.num_questions=0"]
    run = [f"run.dir={tmp_path}", "run.train_iters=60", "run.save_interval=100"]
    arguments = ["tiny_sft", *small, *run]
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    job = submit_without_nemo_run(slurm, stopped, [*arguments, "run.name=stopped"])
    wait_for(lambda: iterations(stopped) >= 1)
    ask(slurm, "scancel", "--signal=TERM", job)
    logs = stopped / "logs" / f"job{job}"
    wait_for(lambda: "received SIGTERM and saved; it continues from there" in report(logs / "start0"))
    assert 0 < iterations(stopped) < 60
    assert not (stopped / "finished.json").exists()
    launch(2, ["-m", "recipes.train", *arguments, "run.name=straight"], threads=1)
    wait_for(lambda: job_state(slurm, job) in ENDED)
    assert job_state(slurm, job) == "COMPLETED"
    assert sorted(path.name for path in (logs / "start1").iterdir()) == ["rank_0000.log", "rank_0001.log"]
    assert measured(stopped) == measured(straight)
    assert len(measured(straight)) == 60
    assert "name: stopped" in (stopped / "config.yaml").read_text()
    merged = ask(slurm, "slurm/merge_logs.sh", str(logs / "start1")).splitlines()
    times_and_ranks = [line.split()[:3] for line in merged]
    assert times_and_ranks == sorted(times_and_ranks, key=lambda words: words[:2])
    assert {words[2] for words in times_and_ranks} == {"[0]", "[1]"}


@pytest.mark.timeout(3600)
def test_the_whole_pipeline_preempted_in_two_of_its_stages(
    slurm: dict[str, str],
    cluster: Path,
    speaking_checkpoint: Path,
    tiny_data: Path,
    launch: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Two nodes of two ranks. Alignment and RLVR then run again from the same checkpoints, undisturbed, on four."""
    pairs = tmp_path / "cluster.yaml"
    pairs.write_text(cluster.read_text().replace("ranks_per_node: 1", "ranks_per_node: 2").replace("4G", "10G"))
    small = ["rollout.samples_per_prompt=4", "rollout.max_response_tokens=96", "prompts_per_iteration=8"]
    own = {
        "sft": [
            f"model.hf_checkpoint={speaking_checkpoint}",
            "run.train_iters=2",
            "optimizer.lr=1e-5",
            "optimizer.min_lr=0",
        ],
        "collect": [f"alignment_data={tiny_data}/alignment.parquet", "num_candidates=16", "band_low=0", "band_high=1"],
        "warmup": ["run.train_iters=2", "global_batch_size=8"],
        "align": [*small, f"run.train_iters={ITERATIONS}", f"data={tiny_data}/alignment.parquet"],
        "rlvr": [*small, f"run.train_iters={ITERATIONS}"],
    }
    for stage in ("sft", "align", "rlvr"):
        own[stage].append("eval.num_questions=0")
    overrides = [f"{stage}.{override}" for stage, values in own.items() for override in values]
    whole = tmp_path / "runs" / "whole"
    put_data(tiny_data, whole)
    arguments = ["tiny_pipeline", "--name", "whole", "--executor", "slurm", "--cluster", str(pairs), *overrides]
    process = start(slurm | {"PYTHONPATH": str(ROOT)}, *arguments, cwd=tmp_path)
    for stage in ("align", "rlvr"):
        wait_for(lambda stage=stage: iterations(whole / stage) >= 1 or process.poll() is not None, 1800)
        assert process.poll() is None, process.communicate()[0]
        job = ask(slurm, "squeue", "-h", "-n", f"prism.{stage}", "-o", "%i").strip()
        ask(slurm, "scancel", "--signal=TERM", job)
        logs = whole / stage / "logs" / f"job{job}"
        wait_for(lambda logs=logs: "received SIGTERM and saved; it continues from there" in report(logs / "start0"))
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    assert [stage for stage in own if (whole / stage / "finished.json").exists()] == list(own)
    undisturbed = [step for step in tiny_steps("whole", overrides) if step.name in ("align", "rlvr")]
    runs = [[step.recipe, *step.overrides, f"run.name=whole/{step.name}_again"] for step in undisturbed]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch(4, [str(STAGES), str(tmp_path / "runs.json")], cwd=tmp_path, threads=1)
    for stage in ("align", "rlvr"):
        assert measured(whole / stage) == measured(whole / f"{stage}_again")
        assert len(measured(whole / stage)) == ITERATIONS
        logs = whole / stage / "logs"
        assert len(list(logs.glob("job*/start*"))) == 2


@pytest.mark.slow
def test_weak_scaling_over_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    """Two cores say nothing of the speed; what is shown is that ranks meet, and that a table comes of it."""
    settings = slurm | {"PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    shape = ["--ntasks-per-node=1", "--gpus-per-node=0", "--mem=4G", f"--output={tmp_path}/%j.out", "--parsable"]
    results, jobs = [tmp_path / f"{nodes}.json" for nodes in (1, 2)], []
    for nodes, out in enumerate(results, start=1):
        small = ["--steps", "2", "--warmup", "1", "--images", "mock", f"global_batch_size={4 * nodes}"]
        jobs.append(ask(settings, "sbatch", f"--nodes={nodes}", *shape, "slurm/bench.sbatch", str(out), *small).strip())
    wait_for(lambda: {job_state(slurm, job) for job in jobs} <= ENDED)
    assert [json.loads(out.read_text())["ranks"] for out in results] == [1, 2]
    table = ask(settings, sys.executable, "-m", "tools.bench.sweep", "--out", str(tmp_path), *map(str, results))
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.strip().splitlines()[2:]]
    assert rows == [["1", "4"], ["2", "8"]]


def test_a_stage_that_crashes_too_often_cancels_those_after_it(
    slurm: dict[str, str], cluster: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """A rank is killed; the next start cannot save, for a folder is where a file goes; there is no third."""
    stage = tmp_path / "runs" / "fails" / "sft"
    (stage / "checkpoints" / "latest_checkpointed_iteration.txt").mkdir(parents=True)
    put_data(tiny_data, stage.parent)
    arguments = ["tiny_pipeline", "--executor", "slurm", "--cluster", str(cluster), "--name", "fails"]
    overrides = ["sft.run.save_interval=12", "sft.eval.num_questions=0"]
    process = start(slurm | {"PYTHONPATH": str(ROOT)}, *arguments, *overrides, cwd=tmp_path)
    wait_for(lambda: iterations(stage) >= 2)
    kill_rank(1, "run.name=fails/sft")
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 1, said
    (logs,) = (stage / "logs").glob("job*")
    assert re.search(r"rank 1 on node\d, GPU 0, was the first to end, with status 137", report(logs / "start0"))
    text = report(logs / "start1")
    assert re.search(r"rank 0 on node\d, GPU 0, was the first to end, with status 1;", text)
    assert "Traceback (most recent call last)" in text
    assert re.search(r"Error: .*runs/fails/sft/checkpoints", text.splitlines()[-1])
    assert "sft did not finish; why is at the end of runs/fails/sft/logs/*/*/report.txt" in said
    assert said.endswith(text), "the traceback is the last thing printed"
    assert not (logs / "start2").exists()
    states = ask(slurm, "squeue", "-h", "-t", "all", "-o", "%j %T", "--sort=i").splitlines()[-5:]
    after = [f"prism.{stage} CANCELLED" for stage in ("collect", "warmup", "align", "rlvr")]
    assert states == ["prism.sft FAILED", *after]


def test_a_node_that_is_not_healthy_is_named_and_avoided(slurm: dict[str, str], cluster: Path, tmp_path: Path) -> None:
    """Only node1 has a nvidia-smi that answers: the second start, on other nodes, has no more luck than the first."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$(hostname)" = node1 ]\n')
    program.chmod(0o755)
    file = tmp_path / "cluster.yaml"
    file.write_text(cluster.read_text().replace("export PATH=", f"export PATH={program.parent}:"))
    arguments = ["tiny_sft", f"run.dir={tmp_path}", "run.name=sft", "--executor", "slurm", "--cluster", str(file)]
    process = start(slurm | {"PYTHONPATH": str(ROOT)}, *arguments, cwd=tmp_path)
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 1, said
    (logs,) = (tmp_path / "sft" / "logs").glob("job*")
    refused = []
    for number in range(2):
        first, *reasons = report(logs / f"start{number}").splitlines()
        assert first.endswith(f"sft did not start, on nodes that are not healthy; logs: {logs}/start{number}")
        found = [re.fullmatch(r"prism: (node\d): nvidia-smi does not answer; drain the node", line) for line in reasons]
        assert found
        assert all(found)
        refused.append({one[1] for one in found if one})
    assert not refused[0] & refused[1]
    assert said.endswith(report(logs / "start1"))
    assert not (logs / "start2").exists()
    job = logs.name.removeprefix("job")
    assert job_state(slurm, job) == "FAILED"
    assert f"ExcNodeList={','.join(sorted(refused[0]))}\n" in ask(slurm, "scontrol", "show", "job", job)


@pytest.mark.slow
def test_native_factory_and_nemo_run_s_own_commands(
    slurm: dict[str, str], cluster: Path, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Cancelled, nothing goes on running and only whole checkpoints are left."""
    overrides = [
        *(f"config.run.dir={tmp_path}", "config.run.name=native", "config.run.save_interval=1"),
        "config.eval.num_questions=0",
        *(f"config.model.hf_checkpoint={tiny_checkpoint}", f"config.data={tiny_data}/sft.jsonl"),
    ]
    environment = slurm | {"PRISM_CLUSTER": str(cluster), "PYTHONPATH": str(ROOT)}
    native = ["recipes", "--factory", "tiny_sft", "--name", "native", "run.executor=slurm", "--yes"]
    python(environment, *native, "--detach", *overrides)
    job = newest_job(slurm)
    stage = tmp_path / "native"
    wait_for(lambda: iterations(stage) >= 3)
    assert re.search(r"Status: RUNNING.*Job id: " + job, nemo(environment, "status", "native"), re.DOTALL)
    nemo(environment, "cancel", "native")
    wait_for(lambda: job_state(slurm, job) == "CANCELLED")
    wait_for(lambda: not ranks_of(str(tmp_path)))
    logged = nemo(environment, "logs", "native")  # ends by itself, for the job has
    assert re.search(r"sft +3/\d+  loss ", logged)
    assert not (stage / "finished.json").exists()
    assert Checkpointer(stage / "checkpoints", keep=2).latest() >= 2


def test_production_pipeline(slurm: dict[str, str], tmp_path: Path) -> None:
    """Scripts accepted by sbatch on nodes of eight GPUs, and as they were: PRISM_UPDATE_GOLDEN=1 writes them anew."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{account: none, partition: batch, workdir: /shared, pass_environment: [HF_TOKEN]}")
    secret = slurm | {"HF_TOKEN": "not-to-be-written"}
    said = python(secret, "recipes.launch", PRODUCTION, "--executor", "slurm", "--cluster", str(cluster), "--dryrun")
    (experiment,) = (Path(slurm["NEMORUN_HOME"]) / "experiments" / PRODUCTION).iterdir()
    scripts = sorted(experiment.glob("*_sbatch.sh"))
    assert len(scripts) == 5
    assert all(f"\n  {script}\n" in said for script in scripts)
    for script in scripts:
        ask(slurm, "sbatch", "--test-only", str(script))
        text = script.read_text().replace(str(experiment), "EXPERIMENT")
        golden = GOLDEN / script.name
        if os.environ.get("PRISM_UPDATE_GOLDEN"):
            golden.write_text(text)
        assert text == golden.read_text()
    written = [path.read_bytes() for path in experiment.rglob("*") if path.is_file()]
    assert not any(secret["HF_TOKEN"].encode() in content for content in written)


def put_data(data: Path, run_dir: Path) -> None:
    """Few rows where the launcher would write many: the manifest says that it has."""
    shutil.copytree(data, run_dir / "data")
    (run_dir / "data" / MANIFEST).write_text(json.dumps(asdict(ShapesConfig()), indent=2) + "\n")


def python(environment: dict[str, str], *arguments: str) -> str:
    process = start(environment, *arguments[1:], module=arguments[0])
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    return said


def start(
    environment: dict[str, str], *arguments: str, cwd: Path = ROOT, module: str = "recipes.launch"
) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def submit_without_nemo_run(environment: dict[str, str], stage: Path, arguments: list[str]) -> str:
    """``slurm/train.sbatch`` as it is, on two nodes with a rank on each."""
    settings = environment | {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={stage.parent}.out"]
    stage.mkdir(parents=True)
    return ask(settings, "sbatch", *options, "slurm/train.sbatch", str(stage), *arguments).strip()


def nemo(environment: dict[str, str], command: str, title: str) -> str:
    program = str(Path(sys.executable).parent / "nemo")
    arguments = [program, "experiment", command, title]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=True
    ).stdout


def newest_job(environment: dict[str, str]) -> str:
    return ask(environment, "squeue", "-h", "-t", "all", "-o", "%i", "--sort=-i").split()[0]


def job_state(environment: dict[str, str], job: str) -> str:
    """Empty where SLURM did not answer: it may be too busy."""
    command = ["scontrol", "show", "job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"JobState=(\w+)", done.stdout)
    return found[1] if found else ""


def wait_for(condition: Callable[[], bool], seconds: float = 900) -> None:
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


def ranks_of(argument: str) -> list[psutil.Process]:
    """Python processes with ``argument`` in a word of their command line or in their environment's stage folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "name", "environ"]):
        folder = (process.info["environ"] or {}).get("PRISM_STAGE_DIR", "")
        words = [*(process.info["cmdline"] or []), folder]
        if process.info["name"].startswith("python") and any(argument in word for word in words):
            found.append(process)
    return found


def kill_rank(rank: int, argument: str) -> None:
    killed = [process for process in ranks_of(argument) if process.environ().get("RANK") == str(rank)]
    for process in killed:
        process.kill()
    assert killed


def measured(stage: Path) -> list[dict[str, Any]]:
    """Logged metrics without those that depend on the clock."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "tflops_per_rank")
    return [{k: v for k, v in row.items() if k not in clock and not k.startswith("seconds_")} for row in rows]
