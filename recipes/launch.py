"""Run a recipe or a pipeline, here with torchrun or on SLURM through NeMo-Run.

    python -m recipes.launch NAME [--dryrun] [--ranks N] [K=V ...]
    python -m recipes.launch NAME --executor slurm --cluster FILE [--dryrun] [--detach] [K=V ...]
    python -m recipes.launch NAME --estimate [K=V ...]

A recipe takes key=value, a pipeline stage.key=value (rlvr.run.train_iters=40). A pipeline is SFT, collection, warm-up,
alignment and RLVR, each from the checkpoint of the one before; tiny_study is the tiny one with three seeds, each beside
RLVR straight after SFT, here only. Stages that are finished are skipped, one that was interrupted goes on from its last
checkpoint, and one whose settings or inputs are others than they were is moved aside and begun anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import IO

import psutil

from prism_megatron.config import stage_dir
from prism_megatron.errors import UserError
from prism_megatron.observe.logger import METRICS
from recipes import STAGE_RECIPES, nearest, shape_of
from recipes.cluster import (
    ROOT,
    ClusterConfig,
    local_environment,
    rank_command,
    read_cluster,
    slurm_executor,
)
from recipes.pipeline import (
    PRODUCTION_PIPELINES,
    Step,
    baseline_step,
    collect_results,
    production_steps,
    tiny_steps,
    write_study,
)
from recipes.upstream import nemo_run, newest_scripts

PIPELINES = ("tiny_pipeline", "tiny_study", *PRODUCTION_PIPELINES)
STUDY_SEEDS = (1, 2, 3)
GO_ON = "the same command goes on from"
STOP_SECONDS = 300  # that an iteration and its save may take when told to stop


def main() -> int:
    """Parse the command line; a user's mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join(["names:", *PIPELINES, *STAGE_RECIPES]),
    )
    parser.add_argument("name", metavar="NAME", help="a pipeline or a recipe")
    parser.add_argument("overrides", nargs="*", help="key=value, or stage.key=value for a pipeline")
    parser.add_argument("--name", dest="run_name", help="folder under runs/ (the pipeline's or the recipe's own)")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes per stage, here (as the recipe's name says; tiny: 2, or 1 on one core or a GPU)",
    )
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--cluster", type=Path, help="cluster file for slurm; examples in slurm/clusters/")
    parser.add_argument("--dryrun", action="store_true", help="print commands or scripts, run and submit nothing")
    parser.add_argument("--detach", action="store_true", help="submit to slurm and leave")
    parser.add_argument("--estimate", action="store_true", help="print the need of GPU memory, run nothing")
    arguments = parser.parse_intermixed_args()  # overrides may follow options
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_stop, None) if arguments.executor == "local" else signal.SIG_DFL)
    name, run_name = arguments.name, arguments.run_name or arguments.name
    if arguments.run_name and name in STAGE_RECIPES:
        arguments.overrides.insert(0, f"run.name={run_name}")
    try:
        if arguments.estimate:
            if arguments.ranks is not None:
                raise UserError("--ranks is for a run here; --estimate takes the GPUs that the recipe's name says")
            return print_estimate(steps_of(name, run_name, arguments.overrides))
        if arguments.executor == "slurm":
            if arguments.cluster is None:
                raise UserError("--executor slurm needs --cluster FILE; slurm/clusters/ has examples")
            if arguments.ranks is not None:
                raise UserError("--ranks is for a run here; on SLURM the recipe's name says it, or the cluster file")
            steps = steps_of(name, run_name, arguments.overrides)
            run_dir = Path("runs") / run_name if name == "tiny_pipeline" else None
            return launch_on_slurm(name, steps, arguments.cluster, arguments.dryrun, arguments.detach, run_dir)
        for option in ("cluster", "detach"):
            if getattr(arguments, option):
                raise UserError(f"--{option} is for SLURM; add --executor slurm, or leave it out to run here")
        return launch(name, run_name, arguments.overrides, arguments.ranks, arguments.dryrun)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def steps_of(name: str, run_name: str, overrides: Sequence[str]) -> list[Step]:
    """The steps of a pipeline or of a lone recipe. Raises UserError for an unknown name or a bad override."""
    if name == "tiny_study":
        raise UserError("tiny_study runs here only; submit tiny_pipeline with stage.run.seed=N for each seed")
    if name == "tiny_pipeline":
        steps = tiny_steps(run_name, overrides)
    elif name in PRODUCTION_PIPELINES:
        steps = production_steps(name, run_name, overrides)
    elif name in STAGE_RECIPES:
        steps = [Step(name, name, tuple(overrides))]
    else:
        raise UserError(f"unknown recipe or pipeline {name!r}; {nearest(name, [*PIPELINES, *STAGE_RECIPES])}")
    for step in steps:
        step.config()  # refuse a bad override before anything runs
    return steps


def launch_on_slurm(
    title: str, steps: Sequence[Step], cluster_file: Path, dryrun: bool, detach: bool, run_dir: Path | None
) -> int:
    """Submit the steps; data and results of a pipeline that brings its own are in ``run_dir``. Returns the status."""
    cluster = read_cluster(cluster_file)
    if dryrun:
        return submit(title, steps, cluster, dryrun, detach)
    if run_dir and cluster.ssh.host:
        raise UserError(f"{title} makes its data here; submit it from the cluster, without ssh")
    _enter_workdir(cluster)
    if run_dir:
        _prepare(run_dir, seed=1)
    status = submit(title, steps, cluster, dryrun, detach)
    if run_dir and not status and not detach:
        _gather(run_dir, steps)
    return status


def submit(title: str, steps: Sequence[Step], cluster: ClusterConfig, dryrun: bool, detach: bool) -> int:
    """Each unfinished step as a SLURM job that waits for the one before; returns the exit status."""
    import fiddle

    run = nemo_run()
    before: list[str] = []
    is_remote = bool(cluster.ssh.host)  # what is finished is seen there only, and skipped there
    # What comes after an unfinished step is made anew if its inputs change, which its job finds out.
    unfinished = list(steps if dryrun or is_remote else dropwhile(_finished, steps))
    if not unfinished:
        print(f"{title}: all is finished")
        return 0
    home = Path(os.environ["NEMORUN_HOME"])
    home.mkdir(mode=0o750, parents=True, exist_ok=True)  # logs are not for all users of the machine
    with run.Experiment(title, base_dir=str(home)) as experiment:
        for step in unfinished:
            nodes, ranks = shape_of(step.recipe) or (cluster.nodes, cluster.ranks_per_node)
            config = step.config()
            executor = fiddle.build(slurm_executor(cluster, nodes, ranks, stage_dir(config), config.stage))
            command = rank_command(step.recipe, step.overrides)
            before = [experiment.add(command, executor=executor, name=step.name, dependencies=before)]
        if dryrun:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=detach)
    if dryrun:
        scripts = newest_scripts(home, title, (step.name for step in unfinished))
        print(*(script.read_text() for script in scripts), "scripts:", *(f"  {script}" for script in scripts), sep="\n")
        return 0
    if detach:
        print(f"to look at it, or to end it: NEMORUN_HOME={home} nemo experiment status|logs|cancel {title}")
        return 0
    if is_remote:
        statuses = experiment.status(return_dict=True)
        return 0 if all(str(job["status"]) == "SUCCEEDED" for job in statuses.values()) else 1
    left = [step for step in unfinished if not _finished(step)]
    if left:
        _tell_why(left[0])
    return 1 if left else 0


def _enter_workdir(cluster: ClusterConfig) -> None:
    """Go where the jobs will run, so that relative paths are the same here and there."""
    if not cluster.workdir or cluster.ssh.host:
        return
    if not Path(cluster.workdir).is_dir():
        raise UserError(f"workdir {cluster.workdir} is not here; submit where it is mounted, or over ssh")
    os.chdir(cluster.workdir)


def _tell_why(step: Step) -> None:
    """The report of the step's last start, which ends with the traceback of the first rank to fail."""
    logs = stage_dir(step.config()) / "logs"
    print(f"{step.name} did not finish; why is at the end of {logs}/*/*/report.txt")
    if reports := sorted(logs.glob("*/*/report.txt"), key=lambda path: path.stat().st_mtime):
        print(reports[-1].read_text(), end="", flush=True)


def print_estimate(steps: Sequence[Step]) -> int:
    """Memory on the fullest GPU of each step. Raises UserError at the first where that is more than there is."""
    from recipes.estimate.memory import estimate, published_sizes
    from recipes.qwen3_vl import size_of

    for step in steps:
        shape = shape_of(step.recipe)
        if shape is None:
            raise UserError(f"--estimate is for recipes of published sizes, not {step.recipe!r}; --help lists them")
        with tempfile.TemporaryDirectory() as folder:
            policy, discriminator = (published_sizes(size, Path(folder)) for size in (size_of(step.recipe), "2b"))
        memory = estimate(step.config(), shape[0] * shape[1], policy, discriminator)
        print(step.recipe)
        memory.check()
        print(memory.table())
    print("by arithmetic, from what recipes/estimate/memory.py assumes; not measured on a GPU")
    return 0


def launch(name: str, run_name: str, overrides: Sequence[str], ranks: int | None, dryrun: bool = False) -> int:
    """Run every unfinished step in order, here, or print the commands of all; returns the exit status."""
    if name in PRODUCTION_PIPELINES:
        raise UserError(f"{name} is for SLURM: its stages take different numbers of GPUs; give --executor slurm")
    runs = runs_of(name, run_name, overrides)
    ranks = ranks_here(name, ranks)
    if dryrun:
        for _, _, steps in runs:
            for step in steps:
                print(shlex.join(["torchrun", *torchrun_arguments(step, ranks)]))
        return 0
    if name in STAGE_RECIPES:
        ((_, _, (step,)),) = runs
        run_locally(step, ranks)
        return _say_where(step)
    for one, seed, steps in runs:
        if status := run_steps(one, steps, ranks, seed):
            return status
    if name == "tiny_study":
        print(write_study(Path("runs") / run_name, [Path("runs") / one for one, _, _ in runs]), flush=True)
    return 0


def runs_of(name: str, run_name: str, overrides: Sequence[str]) -> list[tuple[str, int, list[Step]]]:
    """Folder under runs/, seed and steps of what is to run here: one such, or a study's one per seed."""
    if name != "tiny_study":
        return [(run_name, 1, steps_of(name, run_name, overrides))]
    runs = []
    for seed in STUDY_SEEDS:
        seed_name = f"{run_name}/seed{seed}"
        steps = tiny_steps(seed_name, overrides, seed)
        for step in steps:
            step.config()  # refuse a bad override before anything runs
        runs.append((seed_name, seed, [*steps, baseline_step(seed_name, steps)]))
    return runs


def ranks_here(name: str, asked: int | None) -> int:
    """Processes on this machine: as many as asked for, else as the recipe's name says.

    Tiny recipes say nothing. On a CPU two data-parallel ranks of half the cores each are faster than one of all; each
    takes up to 3 GB. Raises UserError for a recipe of several nodes, unless a number is asked for.
    """
    if asked is not None:
        if asked < 1:
            raise UserError(f"--ranks is {asked}; it must be at least 1")
        return asked
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    nodes, ranks = shape_of(name) or (1, 1 if has_gpu else min(len(os.sched_getaffinity(0)), 2))
    if nodes > 1:
        raise UserError(
            f"{name} needs {nodes} nodes of {ranks} GPUs; "
            "give --executor slurm --cluster FILE, or --ranks N to run it here"
        )
    return ranks


def torchrun_arguments(step: Step, ranks: int) -> list[str]:
    """What torchrun is given to start a stage's ranks on this machine, on a free port."""
    shape = ["--standalone", "--nproc-per-node", str(ranks)]
    return [*shape, "-m", "prism_megatron.train", step.recipe, *step.overrides]


def run_steps(name: str, steps: Sequence[Step], ranks: int, seed: int = 1) -> int:
    """Run the unfinished ones of ``steps`` in order, with a report after each; returns the exit status."""
    run_dir = Path("runs") / name
    began = time.monotonic()
    _prepare(run_dir, seed)
    _say("data and base model", began)
    for number, step in enumerate(steps, start=1):
        began = time.monotonic()
        if not _finished(step):
            run_locally(step, ranks)
            if not _finished(step):
                print(f"{step.name} did not finish; run the same command to go on from its last checkpoint")
                return 1
        _say(step.name, began)
        _gather(run_dir, steps[:number])  # what was left of later ones may be of other inputs
    print(f"results: {run_dir}/results.json   report: {run_dir}/report.html   model: {run_dir}/hf", flush=True)
    return 0


def run_locally(step: Step, ranks: int) -> None:
    """One stage under torchrun, its output on this terminal. NeMo-Run would take 0.6 GB here while it waits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_stop, step))
    environment = os.environ | local_environment(ranks)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))  # torchrun kills after 30 s otherwise
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(step, ranks)]
    # In a session of its own: Ctrl-C in a terminal reaches this process only. Through a pipe: _stop drops what follows.
    torchrun = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    relay = threading.Thread(target=_relay, args=[torchrun.stdout], daemon=True)  # goes on while _stop waits
    relay.start()
    torchrun.wait()
    relay.join(timeout=5)  # a process that a killed rank left behind has the pipe, too


def _relay(lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _say_where(step: Step) -> int:
    """Where a lone recipe's results are, and a report on them; returns the exit status."""
    directory = stage_dir(step.config())
    if not _finished(step):
        print(f"{step.name} did not finish; run the same command to go on from its last checkpoint", flush=True)
        return 1
    if (directory / METRICS).is_file():
        _run_module("prism_megatron.observe.report", str(directory))
    for what, file in {"model": "hf", "metrics": METRICS, "results": "results.json", "report": "report.html"}.items():
        if (directory / file).exists():
            print(f"{what}: {directory / file}", flush=True)
    return 0


def _prepare(run_dir: Path, seed: int) -> None:
    """Make the data and the base model, in processes of their own: this one lives as long as the pipeline."""
    _run_module("recipes.tiny_data", "--out", str(run_dir / "data"))
    if not (run_dir / "base" / "config.json").is_file():
        _run_module("recipes.tiny_model", "--out", str(run_dir / "base"), "--seed", str(seed))


def _run_module(module: str, *arguments: str) -> None:
    """Run a command of this repository in a process of its own. Raises UserError where it fails."""
    environment = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode:
        raise UserError(f"python -m {module} failed; its last lines say why")


def _finished(step: Step) -> bool:
    from prism_megatron.stages.identity import is_finished

    return is_finished(step.config())


def _gather(run_dir: Path, steps: Sequence[Step]) -> None:
    collect_results(run_dir, steps)
    _run_module("prism_megatron.observe.report", str(run_dir))


def _stop(step: Step | None, number: int, _frame: object) -> None:
    """End the ranks of ``step``, which have sessions of their own, and leave.

    The ranks save after the iteration they are in; a second signal kills them. What they and torchrun print from now
    on is dropped: torchrun ends with tracebacks of its own.
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


def _say(what: str, began: float) -> None:
    print(f"== {what}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
