"""Ctrl-C under torchrun and under the launcher: the stage saves and goes on from there; a second one ends it at once.

The starts go on from each other. Each has a session of its own and is sent INT as a group, as by a terminal: the ranks
are not in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from prism_megatron.observe.metrics import MFU, TFLOPS_PER_RANK, TOKENS_PER_SECOND

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "recipes.train"]
GO_ON = "the same command goes on from there"
MANY = 100_000  # iterations, of which some are done
PATIENCE = 240  # seconds until a hang is a failure


@dataclass
class Start:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def has_iterated(self) -> bool:
        return f"/{MANY}  " in self.output

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = [
        *("tiny_sft", f"run.dir={tmp_path}", "run.name=sft", f"run.train_iters={MANY}", f"run.save_interval={MANY}"),
        *(f"model.hf_checkpoint={tiny_checkpoint}", f"data={tiny_data}/sft.jsonl", "global_batch_size=8"),
        "eval.num_questions=0",
    ]
    stage = tmp_path / "sft"

    with started([*TORCHRUN, *recipe], tmp_path / "once.log") as once:
        once.wait_for(once.has_iterated)
        ranks = psutil.Process(once.process.pid).children(recursive=True)
        once.ctrl_c()
        once.process.wait(PATIENCE)
    saved = saved_iteration(stage)
    assert saved == rows(stage)[-1]["iteration"], once.output
    assert once.output.count(f"sft: preempted, saved iteration {saved}; {GO_ON}\n") == 1
    assert once.output.count("stopping after this iteration is finished and saved; press Ctrl-C again") == 1
    assert not (stage / "finished.json").exists()
    assert not alive(ranks)

    with started([*TORCHRUN, *recipe], tmp_path / "twice.log") as twice:
        twice.wait_for(twice.has_iterated)
        ranks = psutil.Process(twice.process.pid).children(recursive=True)
        (rank,) = ranks
        rank.suspend()  # within an iteration, however fast the machine is
        twice.ctrl_c()
        twice.wait_for(lambda: "closing signal SIGINT" in twice.output)
        twice.ctrl_c()
        twice.wait_for(lambda: "closing signal SIGTERM" in twice.output)
        rank.resume()
        twice.process.wait(PATIENCE)
    assert twice.output.count("interrupted; the same command resumes from the last checkpoint\n") == 1
    assert saved_iteration(stage) == saved
    assert not alive(ranks)

    launcher = ["recipes.launch", *recipe, "--ranks", "1"]
    with started(launcher, tmp_path / "launched.log") as launched:
        launched.wait_for(launched.has_iterated)
        ranks = psutil.Process(launched.process.pid).children(recursive=True)
        launched.ctrl_c()
        assert launched.process.wait(PATIENCE) == 128 + signal.SIGINT, launched.output
    assert saved_iteration(stage) == rows(stage)[-1]["iteration"] > saved
    assert launched.output.splitlines()[-2:] == [
        "stopping: the iteration is finished and saved; once more to end at once",
        f"stopped: tiny_sft is saved at iteration {saved_iteration(stage)}; {GO_ON}",
    ]
    assert "Traceback" not in launched.output
    assert not alive(ranks)

    last = rows(stage)[-1]
    # Six operations for each of the decoder's 786,432 weights, and some for attention, head and tower.
    assert 4.7e6 < 1e12 * last[TFLOPS_PER_RANK] / last[TOKENS_PER_SECOND] < 7e6
    assert MFU not in last  # of a CPU no peak is known


@contextmanager
def started(module: list[str], log: Path) -> Iterator[Start]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "NEMORUN_HOME": str(log.parent / "nemo_run")},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    everything = psutil.Process(process.pid)
    try:
        yield Start(process, log)
    finally:
        if process.poll() is None:
            for one in [*everything.children(recursive=True), everything]:
                one.kill()
            process.wait()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end by themselves; what nobody waits for stays as a zombie."""
    deadline = time.monotonic() + PATIENCE
    left = processes
    while left and time.monotonic() < deadline:
        left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.02)
    return left


def saved_iteration(stage: Path) -> int:
    return int((stage / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def rows(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
