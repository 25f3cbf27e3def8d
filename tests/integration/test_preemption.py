"""TERM and Ctrl-C within a stage: it saves, ends with a status of its own, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prism_megatron.observe.metrics import LOSS, MFU, TFLOPS_PER_RANK, TOKENS_PER_SECOND
from prism_megatron.stages.preemption import EXIT_STATUS

pytestmark = pytest.mark.skipif(
    shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is not None and os.geteuid() == 0,
    reason="tests/slurm stops alignment and RLVR on the SLURM that is here",
)
ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 30


def test_told_to_stop(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    shared = [
        *("tiny_sft", f"run.dir={tmp_path}", f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl"),
        *("global_batch_size=16", f"run.train_iters={ITERATIONS}", "run.save_interval=1000", "eval.num_questions=0"),
    ]
    straight = start([*shared, "run.name=straight"])
    assert straight.wait(900) == 0
    stopped = start([*shared, "run.name=stopped"])
    wait_for(tmp_path / "stopped" / "metrics.jsonl", stopped)
    stopped.send_signal(signal.SIGTERM)
    stopped.send_signal(signal.SIGTERM)  # a launcher and the batch system may both send it
    stopped.send_signal(signal.SIGINT)  # and the user may press Ctrl-C
    output, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == EXIT_STATUS, output
    done = len(losses(tmp_path / "stopped"))
    assert 0 < done < ITERATIONS
    assert f"sft: told to stop, saved iteration {done}; the same command goes on from there" in output
    assert not (tmp_path / "stopped" / "finished.json").exists()
    assert start([*shared, "run.name=stopped"]).wait(900) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    last = rows(tmp_path / "straight")[-1]
    # Six operations for each of the decoder's 786,432 weights, and some for attention, head and tower.
    assert 4.7e6 < 1e12 * last[TFLOPS_PER_RANK] / last[TOKENS_PER_SECOND] < 7e6
    assert MFU not in last  # of a CPU no peak is known


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "prism_megatron.train", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(log: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) >= 2:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"never logged two iterations:\n{process.communicate()[0][-4000:]}")


def losses(stage: Path) -> list[float]:
    return [row[LOSS] for row in rows(stage)]


def rows(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
