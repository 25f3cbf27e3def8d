"""Cluster settings from a YAML file (examples in ``slurm/clusters/``), and NeMo-Run's executor for them."""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from prism_megatron.errors import UserError
from recipes.secrets import assigned_secrets, is_secret_name, line_of_secret_value
from recipes.upstream import CODE_FOLDER, CONSOLE_FILES, REPLACED_PATH, nemo_run

ROOT = Path(__file__).resolve().parents[1]
# Seconds from TERM to the time limit, in which a stage ends its iteration and saves. Stages that sample have the
# longest iterations: 512 responses of 8192 tokens and the updates on them.
GRACE_SECONDS = {"sft": 300, "collect": 300, "warmup": 300, "align": 900, "rlvr": 1800}
_MAX_GRACE = 65535  # SLURM's own limit
_OPTION = re.compile(r"[A-Za-z][A-Za-z_-]*")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TIME = re.compile(r"\d+(?::\d+){0,2}|\d+-\d+(?::\d+){0,2}|UNLIMITED", re.ASCII)  # formats of sbatch --time
_LEAST = {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "max_crashes": 0, "max_preemptions": 0}


@dataclass
class SSHConfig:
    """Login node to submit from, if this machine is not one; ``job_dir`` is a folder there."""

    host: str = ""
    user: str = ""
    job_dir: str = ""
    identity: str = ""


@dataclass
class ClusterConfig:
    """Settings of a cluster. ``nodes`` and ``ranks_per_node`` apply to recipes whose name does not give them."""

    account: str = MISSING
    partition: str = MISSING
    time: str = "04:00:00"
    nodes: int = 1
    ranks_per_node: int = 8
    gpus_per_node: int = 8  # 0: SLURM counts no GPUs
    exclusive: bool = True
    mem: str = "0"  # all memory of a node
    grace_seconds: int = 0  # from TERM to the time limit, for an iteration and a save; 0: by stage
    max_crashes: int = 2
    max_preemptions: int = 100
    workdir: str = ""  # start of relative paths, on a shared file system; empty: the current directory
    container_image: str = ""
    container_mounts: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # written to the script, so no secrets
    pass_environment: list[str] = field(default_factory=list)  # names only; sbatch passes the values
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, for example qos: high
    srun: list[str] = field(default_factory=list)
    ssh: SSHConfig = field(default_factory=SSHConfig)


def read_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file. Raises UserError if it is missing, has unknown keys or secrets, or leaves a key unset."""
    if not path.is_file():
        raise UserError(f"no cluster file {path}; slurm/clusters/ has examples")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), _parsed(text)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); write it again as UTF-8") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(cluster, ClusterConfig)
    _check_secrets(path, text, cluster)
    _check_values(path, cluster)
    if unset := [name for name in cluster.pass_environment if name not in os.environ and not cluster.ssh.host]:
        raise UserError(f"{path}: pass_environment names {unset[0]}, which is not set here; export it first")
    return cluster


def _parsed(text: str) -> Any:
    """Parse the file. YAML reads 04:00:00 as a number in base 60, so ``time`` is taken from the text."""
    tree = OmegaConf.load(io.StringIO(text))
    if isinstance(tree, DictConfig) and (time := re.search(r"(?:^|[{,]\s*)time:\s*([\d:-]+)", text, re.MULTILINE)):
        tree.time = time[1]
    return tree


def _check_secrets(path: Path, text: str, cluster: ClusterConfig) -> None:
    """Refuse values that would write a secret into a script. The error has the line number, not the secret."""
    options = [f"--{name}={value}" for name, value in cluster.sbatch.items()]
    names = [name for name in cluster.environment if is_secret_name(name)]
    names += [name for line in (*cluster.setup, *cluster.srun, *options) for name in assigned_secrets(line)]
    # An option and its value may be two items of the list.
    names += list(assigned_secrets(" ".join(cluster.srun)))
    if names:
        raise UserError(f"{path} would write {names[0]} into a script; name it in pass_environment instead")
    if line := line_of_secret_value(text):
        raise UserError(
            f"{path}, line {line}: a value that looks like a token or a key, which would be written into a script; "
            "name its variable in pass_environment instead"
        )


def _check_values(path: Path, cluster: ClusterConfig) -> None:
    """Refuse values that SLURM or the shell would refuse or misread."""
    for key in ("environment", "pass_environment"):
        for name in getattr(cluster, key):
            if not _NAME.fullmatch(name):
                raise UserError(f"{path}: {key} has {name!r}, which is no name of a variable (letters, digits and _)")
    for key, least in _LEAST.items():
        if getattr(cluster, key) < least:
            raise UserError(f"{path}: {key} must be at least {least}, got {getattr(cluster, key)}")
    if not 0 <= cluster.grace_seconds <= _MAX_GRACE:
        raise UserError(
            f"{path}: grace_seconds must be from 1 to {_MAX_GRACE}, or 0 (by the stage), got {cluster.grace_seconds}"
        )
    if not _TIME.fullmatch(cluster.time):
        raise UserError(f"{path}: time must be minutes, hours:minutes:seconds or days-hours, got {cluster.time!r}")
    if cluster.grace_seconds >= _seconds(cluster.time):
        raise UserError(f"{path}: grace_seconds ({cluster.grace_seconds}) must be less than the time, {cluster.time}")
    for name in cluster.sbatch:
        if not _OPTION.fullmatch(name):
            raise UserError(f"{path}: sbatch has {name!r}, which is no name of an option")
    if lines := [word for word in (*cluster.srun, *cluster.container_mounts) if "\n" in word]:
        raise UserError(f"{path}: an item of srun or container_mounts must be one line, got {lines[0]!r}")
    words = {"account": cluster.account, "partition": cluster.partition, "mem": cluster.mem} | cluster.sbatch
    for key, value in words.items():
        if re.search(r"\s", value) or not value:
            raise UserError(f"{path}: {key} must be one word for an #SBATCH line, got {value!r}")


def slurm_executor(cluster: ClusterConfig, nodes: int, ranks_per_node: int, stage_dir: Path, stage: str = "sft") -> Any:
    """Return NeMo-Run's Config of a stage's executor. slurm/job.sh distinguishes crash and preemption."""
    run = nemo_run()
    gpus = cluster.gpus_per_node
    if gpus and ranks_per_node != gpus:
        raise UserError(f"the recipe needs {ranks_per_node} GPUs per node, the cluster file says gpus_per_node {gpus}")
    # Without a container, NeMo-Run replaces this path in the script by the job's folder.
    paths = (cluster.ssh.job_dir or os.environ["NEMORUN_HOME"], cluster.workdir or os.getcwd(), str(stage_dir))
    if not cluster.container_image and (clashing := [path for path in paths if REPLACED_PATH in path]):
        raise UserError(
            f"NeMo-Run cannot work in {clashing[0]}: no path may contain {REPLACED_PATH}; rename that folder"
        )
    if spaced := [path for path in paths[:1] if re.search(r"\s", path)]:  # setup_lines quotes the others
        raise UserError(
            f"NeMo-Run cannot work in {spaced[0]!r}: it does not quote this folder's name, which must be without "
            f"spaces; set {'ssh.job_dir' if cluster.ssh.job_dir else 'NEMORUN_HOME'} to another"
        )
    folders = ("prism_megatron", "recipes", "slurm")
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
        signal=stop_signal(cluster, stage),
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


def stop_signal(cluster: ClusterConfig, stage: str) -> str:
    """Return the signal that makes the stage save, and its time before the limit, by default at most a quarter."""
    limit = _seconds(cluster.time)
    seconds = cluster.grace_seconds or min(GRACE_SECONDS[stage], int(limit / 4) if limit < math.inf else _MAX_GRACE)
    return f"TERM@{seconds}"


def _seconds(time: str) -> float:
    """Parse a time limit like sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
    if time == "UNLIMITED":
        return math.inf
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def local_executor(ranks: int) -> Any:
    """Return NeMo-Run's Config of torchrun on this machine."""
    run = nemo_run()
    # NeMo-Run calls torchrun and python by name: find those of this environment, activated or not.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=ranks,
        launcher="torchrun",
        env_vars=local_environment(ranks),
    )


def local_environment(ranks: int) -> dict[str, str]:
    """Return environment variables of ``ranks`` processes that share this machine's cores."""
    return {
        "OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // ranks, 1)),
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", os.getcwd()))),
        "PYTHONWARNINGS": "ignore",
        "LOGLEVEL": "WARNING",  # of torchrun
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # no notes about memory binding
    }


def rank_command(arguments: Sequence[str]) -> Any:
    """Return the script that srun starts on every rank, with the arguments of ``recipes.train``."""
    train = ("python", "-m", "recipes.train", *arguments)
    return nemo_run().Script(path="slurm/rank.sh", args=[shlex.quote(word) for word in train])


def setup_lines(cluster: ClusterConfig, stage_dir: Path) -> str:
    """Return the shell lines of the script before its srun."""
    exports = {
        **cluster.environment,
        "PRISM_STAGE_DIR": str(stage_dir),
        "PRISM_WORKDIR": cluster.workdir or os.getcwd(),
        "PRISM_MAX_CRASHES": str(cluster.max_crashes),
        "PRISM_MAX_PREEMPTIONS": str(cluster.max_preemptions),
    }
    # Only SLURM knows the job's folder: NeMo-Run names it when it submits.
    output = "$(scontrol show job $SLURM_JOB_ID | sed -n 's/^ *StdOut=//p' | grep .)"
    lines = [
        "set +vx",  # NeMo-Run's script sets -evx, which would print these lines and values in the log
        *cluster.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"until output={output}; do sleep 2; done",
        'job_dir=$(dirname "$output")',
        f'export PRISM_CONSOLE="$job_dir/{CONSOLE_FILES}"',
        f'source "$job_dir/{CODE_FOLDER}/slurm/job.sh" || exit 1',
    ]
    return "\n".join(lines)


def _tunnel(run: Any, cluster: ClusterConfig) -> Any:
    ssh = cluster.ssh
    if not ssh.host:
        return run.Config(run.LocalTunnel, job_dir="")
    return run.Config(run.SSHTunnel, host=ssh.host, user=ssh.user, job_dir=ssh.job_dir, identity=ssh.identity or None)
