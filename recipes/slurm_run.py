"""Submit recipes and pipelines to SLURM through NeMo-Run, each step as a job that waits for the one before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from prism_megatron.config import stage_dir
from prism_megatron.errors import UserError
from prism_megatron.stages.identity import is_finished
from recipes import shape_of
from recipes.cluster import ClusterConfig, rank_command, read_cluster, slurm_executor
from recipes.local_run import prepare_tiny, report
from recipes.pipeline import Step
from recipes.upstream import nemo_run, newest_scripts


@dataclass(frozen=True)
class Submission:
    """Steps to submit. ``tiny_run_dir`` is the folder of a tiny pipeline, whose data is made first."""

    title: str
    steps: Sequence[Step]
    cluster_file: Path
    dryrun: bool = False
    detach: bool = False
    tiny_run_dir: Path | None = None


def launch_on_slurm(submission: Submission) -> int:
    """Submit the steps and, unless detached, wait for them. Returns the exit status."""
    cluster = read_cluster(submission.cluster_file)
    if submission.dryrun:
        return submit(submission, cluster)
    run_dir = submission.tiny_run_dir
    if run_dir and cluster.ssh.host:
        raise UserError(f"{submission.title} makes its data here; submit it from the cluster, without ssh")
    _enter_workdir(cluster)
    if run_dir:
        prepare_tiny(run_dir, seed=1)
    status = submit(submission, cluster)
    if run_dir and not status and not submission.detach:
        report(run_dir, submission.steps)
    return status


def submit(submission: Submission, cluster: ClusterConfig) -> int:
    """Submit each unfinished step as a job that waits for the one before. Returns the exit status."""
    title, run = submission.title, nemo_run()
    is_remote = bool(cluster.ssh.host)  # the jobs themselves skip what is finished there
    # Steps after an unfinished one are submitted too: their jobs find out whether their inputs have changed.
    everything = submission.dryrun or is_remote
    steps = list(submission.steps if everything else dropwhile(_is_finished, submission.steps))
    if not steps:
        print(f"{title}: all is finished")
        return 0
    home = Path(os.environ["NEMORUN_HOME"])
    home.mkdir(mode=0o750, parents=True, exist_ok=True)  # logs are not for all users of the machine
    with run.Experiment(title, base_dir=str(home)) as experiment:
        _add_jobs(experiment, steps, cluster)
        if submission.dryrun:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=submission.detach)
    if submission.dryrun:
        scripts = newest_scripts(home, title, (step.name for step in steps))
        print(*(script.read_text() for script in scripts), "scripts:", *(f"  {script}" for script in scripts), sep="\n")
        return 0
    if submission.detach:
        print(f"to look at it, or to end it: NEMORUN_HOME={home} nemo experiment status|logs|cancel {title}")
        return 0
    if is_remote:
        statuses = experiment.status(return_dict=True)
        return 0 if all(str(job["status"]) == "SUCCEEDED" for job in statuses.values()) else 1
    unfinished = [step for step in steps if not _is_finished(step)]
    if unfinished:
        _print_failure(unfinished[0])
    return 1 if unfinished else 0


def _add_jobs(experiment: Any, steps: Sequence[Step], cluster: ClusterConfig) -> None:
    import fiddle

    previous: list[str] = []
    for step in steps:
        nodes, ranks = shape_of(step.recipe) or (cluster.nodes, cluster.ranks_per_node)
        config = step.config()
        executor = fiddle.build(slurm_executor(cluster, nodes, ranks, stage_dir(config), config.stage))
        command = rank_command(step.arguments())
        previous = [experiment.add(command, executor=executor, name=step.name, dependencies=previous)]


def _is_finished(step: Step) -> bool:
    return is_finished(step.config())


def _enter_workdir(cluster: ClusterConfig) -> None:
    """Change to the working directory of the jobs, so that relative paths mean the same here and there."""
    if not cluster.workdir or cluster.ssh.host:
        return
    if not Path(cluster.workdir).is_dir():
        raise UserError(f"workdir {cluster.workdir} is not here; submit where it is mounted, or over ssh")
    os.chdir(cluster.workdir)


def _print_failure(step: Step) -> None:
    """Print the report of the step's last start, which ends with the traceback of the first rank to fail."""
    logs = stage_dir(step.config()) / "logs"
    print(f"{step.name} did not finish; why is at the end of {logs}/*/*/report.txt")
    if reports := sorted(logs.glob("*/*/report.txt"), key=lambda path: path.stat().st_mtime):
        print(reports[-1].read_text(), end="", flush=True)
