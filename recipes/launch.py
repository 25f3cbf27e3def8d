"""Run a pipeline through NeMo-Run: ``python -m recipes.launch tiny_pipeline [--name NAME] [stage.key=value ...]``.

tiny_pipeline is SFT, collection, warm-up, alignment and RLVR; tiny_study is that with three seeds, each beside RLVR
straight after SFT. Stages that are finished are skipped, one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil

from recipes.pipeline import Step, baseline_step, collect_results, tiny_steps, write_study

PIPELINES = ("tiny_pipeline", "tiny_study")
STUDY_SEEDS = (1, 2, 3)


def main() -> int:
    """Parse the command line; a user's mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help=f"one of: {', '.join(PIPELINES)}")
    parser.add_argument("overrides", nargs="*", help="stage.key=value, for example rlvr.run.train_iters=40")
    parser.add_argument("--name", help="the run's folder under runs/ (the pipeline's name)")
    parser.add_argument("--ranks", type=int, default=1, help="processes per stage")
    arguments = parser.parse_intermixed_args()  # overrides may follow options
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        return launch(arguments.pipeline, arguments.name or arguments.pipeline, arguments.overrides, arguments.ranks)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch(pipeline: str, name: str, overrides: Sequence[str], ranks: int) -> int:
    """Run every unfinished step of the pipeline in order; returns the exit status."""
    if pipeline not in PIPELINES:
        raise ValueError(f"unknown pipeline {pipeline!r}; there are {', '.join(PIPELINES)}")
    if pipeline == "tiny_pipeline":
        return run_steps(name, tiny_steps(name, overrides), ranks)
    runs = []
    for seed in STUDY_SEEDS:
        run_name = f"{name}/seed{seed}"
        steps = tiny_steps(run_name, overrides, seed)
        if status := run_steps(run_name, [*steps, baseline_step(run_name, steps)], ranks, seed):
            return status
        runs.append(Path("runs") / run_name)
    print(write_study(Path("runs") / name, runs), flush=True)
    return 0


def run_steps(name: str, steps: Sequence[Step], ranks: int, seed: int = 1) -> int:
    """Run the unfinished ones of ``steps`` in order, with a report after each; returns the exit status."""
    for step in steps:
        step.config()  # refuse a bad override before anything runs
    run_dir = Path("runs") / name
    began = time.monotonic()
    _prepare(run_dir, seed)
    _say("data and base model", began)
    for step in steps:
        began = time.monotonic()
        if not _finished(step):
            run_locally(step, ranks)
            if not _finished(step):
                print(f"{step.name} did not finish; run the same command to go on from its last checkpoint")
                return 1
        _say(step.name, began)
        collect_results(run_dir, steps)
        _report(run_dir)
    print(f"results: {run_dir}/results.json   report: {run_dir}/report.html   model: {run_dir}/hf", flush=True)
    return 0


def run_locally(step: Step, ranks: int) -> None:
    """One stage through NeMo-Run's LocalExecutor and torchrun, its output on this terminal."""
    os.environ.setdefault("NEMORUN_HOME", str(Path("runs/.nemo_run").resolve()))
    # torchrun and python by their bare names: those of this environment, activated or not.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in what NeMo-Run imports
        import nemo_run as run

    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    executor = run.LocalExecutor(
        ntasks_per_node=ranks,
        launcher="torchrun",
        env_vars={
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.getcwd(),
            "PYTHONWARNINGS": "ignore",
            "LOGLEVEL": "WARNING",  # torchrun's own
        },
    )
    task = run.Script(path="prism_megatron.train", m=True, entrypoint="python", args=[step.recipe, *step.overrides])
    with run.Experiment(step.name, base_dir=os.environ["NEMORUN_HOME"]) as experiment:
        experiment.add(task, executor=executor, name=step.name, tail_logs=True)
        experiment.run(tail_logs=True)


def _prepare(run_dir: Path, seed: int) -> None:
    from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
    from tools.make_tiny_model import make_tiny_model

    write_shapes_data(run_dir / "data", ShapesConfig())
    if not (run_dir / "base" / "config.json").is_file():
        make_tiny_model(run_dir / "base", seed=seed)


def _finished(step: Step) -> bool:
    from prism_megatron.config import is_finished

    return is_finished(step.config())


def _report(run_dir: Path) -> None:
    subprocess.run([sys.executable, "-m", "tools.report", str(run_dir)], check=True)


def _stop(number: int, _frame: object) -> None:
    """End the running stage, which torchx started in a session of its own, and leave without waiting for NeMo-Run."""
    ranks = psutil.Process().children(recursive=True)
    for rank in ranks:
        rank.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for rank in alive:
        rank.kill()
    print("stopped; the same command goes on from the last checkpoint", flush=True)
    os._exit(128 + number)


def _say(what: str, began: float) -> None:
    print(f"== {what}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
