"""Run recipes and pipelines on this machine, a stage at a time under torchrun."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from prism_megatron.config import stage_dir
from prism_megatron.errors import UserError
from prism_megatron.observe.logger import METRICS
from prism_megatron.stages.identity import is_finished
from recipes import shape_of
from recipes.cluster import ROOT, local_environment
from recipes.pipeline import PRODUCTION_PIPELINES, Step, steps_of, study_steps
from recipes.results import collect_results, write_study

GO_ON = "the same command goes on from"
STOP_SECONDS = 300  # that an iteration and its save may take after a signal


def launch(name: str, run_name: str, overrides: Sequence[str], ranks: int | None, dryrun: bool = False) -> int:
    """Run the unfinished steps of a recipe or pipeline in order, or print their commands. Returns the exit status."""
    if name in PRODUCTION_PIPELINES:
        raise UserError(f"{name} is for SLURM: its stages take different numbers of GPUs; give --executor slurm")
    if name == "tiny_study":
        by_seed = study_steps(run_name, overrides)
        runs = {f"{run_name}/seed{seed}": (seed, steps) for seed, steps in by_seed.items()}
    else:
        runs = {run_name: (1, steps_of(name, run_name, overrides))}
    ranks = ranks_here(name, ranks)
    if dryrun:
        for _, steps in runs.values():
            for step in steps:
                print(shlex.join(["torchrun", *torchrun_arguments(step, ranks)]))
        return 0
    if name not in ("tiny_pipeline", "tiny_study"):
        ((_, (step,)),) = runs.values()
        run_stage(step, ranks)
        return _print_outputs(step)
    for run, (seed, steps) in runs.items():
        if status := run_steps(run, steps, ranks, seed):
            return status
    if name == "tiny_study":
        print(write_study(Path("runs") / run_name, [Path("runs") / run for run in runs]), flush=True)
    return 0


def ranks_here(name: str, requested: int | None) -> int:
    """Return the number of ranks on this machine: as requested, or as the recipe's name says.

    Tiny recipes have one rank on a GPU. On a CPU they have two data-parallel ranks with half of the cores each, which
    is faster than one with all of them; each takes up to 3 GB. Raises UserError for a recipe of several nodes.
    """
    if requested is not None:
        if requested < 1:
            raise UserError(f"--ranks is {requested}; it must be at least 1")
        return requested
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    nodes, ranks = shape_of(name) or (1, 1 if has_gpu else min(len(os.sched_getaffinity(0)), 2))
    if nodes > 1:
        raise UserError(
            f"{name} needs {nodes} nodes of {ranks} GPUs; "
            "give --executor slurm --cluster FILE, or --ranks N to run it here"
        )
    return ranks


def torchrun_arguments(step: Step, ranks: int) -> list[str]:
    """Return torchrun's arguments that start a stage's ranks on this machine, on a free port."""
    return ["--standalone", "--nproc-per-node", str(ranks), "-m", "recipes.train", *step.arguments()]


def run_steps(name: str, steps: Sequence[Step], ranks: int, seed: int = 1) -> int:
    """Run the unfinished steps of a tiny pipeline, with a report after each. Returns the exit status."""
    run_dir = Path("runs") / name
    start_time = time.monotonic()
    prepare_tiny(run_dir, seed)
    _print_seconds("data and base model", start_time)
    for number, step in enumerate(steps, start=1):
        start_time = time.monotonic()
        if not is_finished(step.config()):
            run_stage(step, ranks)
            if not is_finished(step.config()):
                print(f"{step.name} did not finish; run the same command to go on from its last checkpoint")
                return 1
        _print_seconds(step.name, start_time)
        report(run_dir, steps[:number])  # results of later stages may be from other inputs
    print(f"results: {run_dir}/results.json   report: {run_dir}/report.html   model: {run_dir}/hf", flush=True)
    return 0


def run_stage(step: Step, ranks: int) -> None:
    """Run one stage under torchrun, with its output on this terminal."""
    stop_on_signals(step)
    environment = os.environ | local_environment(ranks)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))  # torchrun kills after 30 s otherwise
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(step, ranks)]
    # In its own session, so that Ctrl-C reaches this process only; through a pipe, so that _stop can drop its output.
    torchrun = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    relay = threading.Thread(target=_relay, args=[torchrun.stdout], daemon=True)  # goes on while _stop waits
    relay.start()
    torchrun.wait()
    relay.join(timeout=5)  # a process that a killed rank left behind may keep the pipe open


def _relay(lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _print_outputs(step: Step) -> int:
    """Print where the outputs of a single stage are, after writing its report. Returns the exit status."""
    directory = stage_dir(step.config())
    if not is_finished(step.config()):
        print(f"{step.name} did not finish; run the same command to go on from its last checkpoint", flush=True)
        return 1
    if (directory / METRICS).is_file():
        run_module("prism_megatron.observe.report", str(directory))
    for what, file in {"model": "hf", "metrics": METRICS, "results": "results.json", "report": "report.html"}.items():
        if (directory / file).exists():
            print(f"{what}: {directory / file}", flush=True)
    return 0


def prepare_tiny(run_dir: Path, seed: int) -> None:
    """Make data and base model in their own processes: this one stays as small as possible while the stages run."""
    run_module("recipes.tiny_data", "--out", str(run_dir / "data"))
    if not (run_dir / "base" / "config.json").is_file():
        run_module("recipes.tiny_model", "--out", str(run_dir / "base"), "--seed", str(seed))


def run_module(module: str, *arguments: str) -> None:
    """Run a command of this repository in its own process. Raises UserError if it fails."""
    environment = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode:
        raise UserError(f"python -m {module} failed; its last lines say why")


def report(run_dir: Path, steps: Sequence[Step]) -> None:
    """Write results and report of a pipeline's finished steps."""
    collect_results(run_dir, steps)
    run_module("prism_megatron.observe.report", str(run_dir))


def stop_on_signals(step: Step | None = None) -> None:
    """End the ranks of ``step`` and leave when this process gets INT or TERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_stop, step))


def _stop(step: Step | None, number: int, _frame: object) -> None:
    """End the ranks of ``step``, which have their own sessions, and leave.

    The ranks save after their current iteration; a second signal kills them. Their output is dropped from now on, since
    torchrun ends with tracebacks of its own.
    """
    ranks = psutil.Process().children(recursive=True)

    def leave(status: int, words: str) -> None:
        os.write(terminal, f"{words}\n".encode())
        os._exit(status)

    def kill(number: int, _frame: object) -> None:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        leave(128 + number, f"ended at once; {GO_ON} the last checkpoint")

    terminal, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, kill)
    if ranks:
        os.write(terminal, b"stopping: the iteration is finished and saved; once more to end at once\n")
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=STOP_SECONDS)
    for rank in alive:
        rank.kill()
    leave(128 + number, f"stopped: {_what_is_saved(step)}" if step else f"stopped; {GO_ON} what is there")


def _what_is_saved(step: Step) -> str:
    latest = stage_dir(step.config()) / "checkpoints" / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        return f"{step.name} is saved at iteration {latest.read_text().strip()}; {GO_ON} there"
    return f"nothing of {step.name} is saved; the same command starts it again"


def _print_seconds(what: str, start_time: float) -> None:
    print(f"== {what}: {time.monotonic() - start_time:.0f} s", flush=True)
