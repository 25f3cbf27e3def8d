"""Saves in a loop until it is killed. Modules are imported once; each run is a fork.

    saving_worker.py kill DIR REPORT SEED RUNS    runs that are killed at random moments, each resuming the last one
    saving_worker.py full DIR REPORT              a disk that is full, then not

Weights and optimizer state are functions of the iteration, so that loaded state can be checked.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from prism_megatron.checkpoint.checkpointer import Checkpointer
from prism_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from prism_megatron.model.build import build_policy, wrap_for_training
from prism_megatron.model.sizes import HFSizes
from prism_megatron.optim.optimizer import build_optimizer
from prism_megatron.parallel import groups
from recipes.tiny_model import TEXT_CONFIG, VISION_CONFIG

KEEP = 2


def main() -> None:
    command, directory, report = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if command == "kill":
        rng = random.Random(int(sys.argv[4]))
        report.write_text(json.dumps(killed_runs(directory, rng, int(sys.argv[5]))))
    else:
        report.write_text(json.dumps(full_disk(directory)))
    sys.stdout.flush()
    os._exit(0)  # the groups of the last case may be left as they are


def killed_runs(directory: Path, rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Repeat ``count`` runs until a quarter of ``count`` was killed during a save and as many saves were finished."""
    runs: list[dict[str, Any]] = []
    while len(runs) < 10 * count:
        seconds = seconds_per_save(directory)
        runs += [one_run(directory, rng, 3 * seconds) for _ in range(count)]
        saved = runs[-1]["resumed"] and runs[-1]["resumed"]["iteration"]
        if sum(run["during_save"] for run in runs) >= count // 4 and saved >= count // 4:
            break
    return runs


def seconds_per_save(directory: Path) -> float:
    """Measure the time of a save, so that kills can be timed to interrupt one."""
    pid, lines = fork_run(directory)
    with lines:
        lines.readline()  # it has started
        start_time = time.monotonic()
        lines.readline(), lines.readline()
        seconds = (time.monotonic() - start_time) / 2
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return seconds


def one_run(directory: Path, rng: random.Random, longest: float) -> dict[str, Any]:
    """Fork a run and kill it; return what it resumed from, what it finished and whether it was saving."""
    delay, whole_group = rng.uniform(0, longest), rng.random() < 0.5
    pid, lines = fork_run(directory)
    with lines:
        resumed = json.loads(lines.readline() or "null")
        time.sleep(delay)
        # If only the trainer is killed, its writer continues during the next run.
        (os.killpg if whole_group else os.kill)(pid, signal.SIGKILL)
        unfinished = len(list(directory.glob(".iter_*.partial")))
        os.waitpid(pid, 0)
        finished = [json.loads(line) for line in lines if line.endswith("\n")] if whole_group else []
    return {"resumed": resumed, "finished": finished, "during_save": unfinished > 0}


def fork_run(directory: Path) -> tuple[int, IO[str]]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(reader)
        run(directory, os.fdopen(writer, "w", buffering=1))
        os._exit(1)
    os.close(writer)
    return pid, os.fdopen(reader)


def run(directory: Path, out: IO[str]) -> None:
    parts = start()
    checkpointer = Checkpointer(directory, KEEP)
    iteration = checkpointer.latest()
    right = True
    if iteration:
        checkpointer.load(iteration, parts)
        right = holds(parts, iteration)
    print(json.dumps({"iteration": iteration, "right": right}), file=out)
    while True:
        iteration += 1
        fill(parts, iteration)
        checkpointer.save(iteration, parts)
        fill(parts, -1)  # training goes on while the copy is written
        checkpointer.close()
        print(iteration, file=out)


def full_disk(directory: Path) -> dict[str, Any]:
    parts = start()
    checkpointer = Checkpointer(directory, KEEP)
    for iteration in (1, 2):
        fill(parts, iteration)
        checkpointer.save(iteration, parts)
    checkpointer.close()
    size = sum(path.stat().st_size for path in (directory / "iter_0000002").iterdir())
    ballast = directory / "ballast"
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    ballast.write_bytes(bytes(free - size // 2))
    found: dict[str, Any] = {}
    try:
        fill(parts, 3)
        checkpointer.save(3, parts)
        checkpointer.close()
    except OSError as error:
        found["errno"] = error.errno
    found["left"] = sorted(path.name for path in directory.iterdir())
    found["latest_when_full"] = checkpointer.latest()
    ballast.unlink()
    checkpointer.save(3, parts)
    checkpointer.close()
    checkpointer.load(3, parts)
    found |= {"latest_after": checkpointer.latest(), "right": holds(parts, 3)}
    return found


def start() -> dict[str, tuple[Any, Any]]:
    groups.initialize(ParallelConfig(), seed=1)
    text = TEXT_CONFIG | {"vocab_size": 400, "rms_norm_eps": 1e-6}
    vision = VISION_CONFIG | {"in_channels": 3, "out_hidden_size": text["hidden_size"]}
    policy = build_policy(ModelConfig(hf_checkpoint=""), ParallelConfig(), HFSizes(text, vision, True))
    wrapped = wrap_for_training(policy, use_distributed_optimizer=False)
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), wrapped)
    for parameter in policy[0].parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()  # so that there is state
    return {"policy": (wrapped, optimizer)}


def fill(parts: Mapping[str, tuple[Any, Any]], iteration: int) -> None:
    with torch.no_grad():
        for tensor, factor in state(parts):
            tensor.fill_(iteration * factor)


def holds(parts: Mapping[str, tuple[Any, Any]], iteration: int) -> bool:
    return all(bool((tensor == iteration * factor).all()) for tensor, factor in state(parts))


def state(parts: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[torch.Tensor, float]]:
    (chunk,), optimizer = parts["policy"]
    for parameter in chunk.parameters():
        yield parameter.data, 1.0
    for values in optimizer.optimizer.state.values():
        yield values["exp_avg"], 2.0
        yield values["exp_avg_sq"], 4.0
        yield values["step"], 8.0


if __name__ == "__main__":
    main()
