"""A cluster's own facts, from a small YAML file (examples in ``slurm/clusters/``), and NeMo-Run's executor for it."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from prism_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_SECRET = re.compile(r"\w*(?:token|secret|password|credential|api_?key)\w*", re.IGNORECASE)
_ASSIGNED_SECRET = re.compile(rf"({_SECRET.pattern})=(?!\$)", re.IGNORECASE)


@dataclass
class SSHConfig:
    """A login node to submit from, where this machine is none; ``job_dir`` is a folder there."""

    host: str = ""
    user: str = ""
    job_dir: str = ""
    identity: str = ""


@dataclass
class ClusterConfig:
    """``nodes`` and ``ranks_per_node`` are for recipes whose name does not say them."""

    account: str = MISSING
    partition: str = MISSING
    time: str = "04:00:00"
    nodes: int = 1
    ranks_per_node: int = 8
    gpus_per_node: int = 8  # 0: SLURM counts none
    exclusive: bool = True
    mem: str = "0"  # all of a node's
    grace_seconds: int = 300  # between TERM and the end of the time limit: an iteration and a save
    max_crashes: int = 2
    max_preemptions: int = 100
    workdir: str = ""  # where relative paths start, on a file system that all nodes see; here, if empty
    container_image: str = ""
    container_mounts: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # written into the script: no secrets
    pass_environment: list[str] = field(default_factory=list)  # names only; sbatch passes the values on
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, for example qos: high
    srun: list[str] = field(default_factory=list)
    ssh: SSHConfig = field(default_factory=SSHConfig)


def read_cluster(path: Path) -> ClusterConfig:
    """Raises UserError for a file that is not there, has unknown keys or a secret in it, or leaves something unset."""
    if not path.is_file():
        raise UserError(f"no cluster file {path}; slurm/clusters/ has examples")
    try:
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(cluster, ClusterConfig)
    secrets = [name for name in cluster.environment if _SECRET.fullmatch(name)]
    secrets += [found[1] for line in cluster.setup if (found := _ASSIGNED_SECRET.search(line))]
    if secrets:
        raise UserError(f"{path} would write {secrets[0]} into a script; name it in pass_environment instead")
    if unset := [name for name in cluster.pass_environment if name not in os.environ and not cluster.ssh.host]:
        raise UserError(f"{path}: pass_environment names {unset[0]}, which is not set here; export it first")
    return cluster


def slurm_executor(cluster: ClusterConfig, nodes: int, ranks_per_node: int, stage_dir: Path) -> Any:
    """A NeMo-Run Config of one stage's executor. The script tells crash from preemption itself (slurm/job.sh)."""
    run = nemo_run()
    gpus = cluster.gpus_per_node
    if gpus and ranks_per_node != gpus:
        raise UserError(f"the recipe needs {ranks_per_node} GPUs per node, the cluster file says gpus_per_node {gpus}")
    # Where there is no container, NeMo-Run puts the job's folder in place of this name, wherever the script has it.
    paths = (cluster.ssh.job_dir or os.environ["NEMORUN_HOME"], cluster.workdir or os.getcwd(), str(stage_dir))
    if not cluster.container_image and (clashing := [path for path in paths if "/nemo_run" in path]):
        raise UserError(f"NeMo-Run cannot work in {clashing[0]}: no path may contain /nemo_run; rename that folder")
    folders = ("prism_megatron", "recipes", "slurm", "tools")
    return run.Config(
        run.SlurmExecutor,
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix="prism.",
        time=cluster.time,
        nodes=nodes,
        ntasks_per_node=ranks_per_node,
        gpus_per_node=gpus or None,
        exclusive=cluster.exclusive or None,
        mem=cluster.mem,
        signal=f"TERM@{cluster.grace_seconds}",
        additional_parameters={"kill_on_invalid_dep": "yes", **cluster.sbatch},
        container_image=cluster.container_image or None,
        container_mounts=list(cluster.container_mounts),
        container_env=list(cluster.pass_environment) or None,
        srun_args=list(cluster.srun) or None,
        setup_lines=setup_lines(cluster, stage_dir),
        packager=run.Config(
            run.PatternPackager,
            include_pattern=[str(ROOT / folder) for folder in folders],
            relative_path=[str(ROOT)] * len(folders),
        ),
        tunnel=_tunnel(run, cluster),
        poll_estimated_start_time=False,
    )


def local_executor(ranks: int) -> Any:
    """A NeMo-Run Config of torchrun on this machine."""
    run = nemo_run()
    # torchrun and python by their bare names: those of this environment, activated or not.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=ranks,
        launcher="torchrun",
        env_vars={
            "OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // ranks, 1)),
            "PYTHONPATH": os.getcwd(),
            "PYTHONWARNINGS": "ignore",
            "LOGLEVEL": "WARNING",  # torchrun's own
        },
    )


def rank_command(recipe: str, overrides: Sequence[str]) -> Any:
    """What srun starts on every rank."""
    train = ("python", "-m", "prism_megatron.train", recipe, *overrides)
    return nemo_run().Script(path="slurm/rank.sh", args=[shlex.quote(word) for word in train])


def nemo_run() -> Any:
    """NeMo-Run, imported when it is needed: it takes seconds."""
    os.environ.setdefault("NEMORUN_HOME", str(Path("runs/.nemo_run").resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in what NeMo-Run imports
        import nemo_run as run

    return run


def setup_lines(cluster: ClusterConfig, stage_dir: Path) -> str:
    """What the script does before its srun."""
    exports = {
        **cluster.environment,
        "PRISM_STAGE_DIR": str(stage_dir),
        "PRISM_WORKDIR": cluster.workdir or os.getcwd(),
        "PRISM_MAX_CRASHES": str(cluster.max_crashes),
        "PRISM_MAX_PREEMPTIONS": str(cluster.max_preemptions),
    }
    # The job's folder is known to SLURM only: NeMo-Run names it when it submits.
    output = "$(scontrol show job $SLURM_JOB_ID | sed -n 's/^ *StdOut=//p' | grep .)"
    lines = [
        *cluster.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"until output={output}; do sleep 2; done",
        "job_dir=$(dirname $output)",
        'export PRISM_CONSOLE="$job_dir/log-*_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}.out"',
        "source $job_dir/code/slurm/job.sh || exit 1",
    ]
    return "\n".join(lines)


def _tunnel(run: Any, cluster: ClusterConfig) -> Any:
    ssh = cluster.ssh
    if not ssh.host:
        return run.Config(run.LocalTunnel, job_dir="")
    return run.Config(run.SSHTunnel, host=ssh.host, user=ssh.user, job_dir=ssh.job_dir, identity=ssh.identity or None)
