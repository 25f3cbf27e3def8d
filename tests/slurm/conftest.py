"""A real SLURM on this host: munge, slurmctld and four slurmd, virtual nodes of eight CPUs and fake GPUs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
NODES = [f"node{number}" for number in range(1, 5)]
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which SLURM's commands and NeMo-Run work; skips with a message if SLURM is not installed."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [program for program in _PROGRAMS if shutil.which(program, path=path) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("virtual nodes need root, for namespaces of their own")
    root = tmp_path_factory.mktemp("slurm")
    _configure(root)
    # NeMo-Run asks sacct how jobs are, which answers with a data base only: a script asks scontrol instead.
    environment = os.environ | {
        "PATH": f"{HERE}:{path}",
        "SLURM_CONF": str(root / "slurm.conf"),
        "NEMORUN_HOME": str(root / "home"),
        "COLUMNS": "500",
    }
    try:
        _start(root, environment)
        yield environment
    finally:
        _stop(root, environment)


def _configure(root: Path) -> None:
    for folder in ("state", "spool", "gpus"):
        (root / folder).mkdir()
    root.chmod(0o755)
    for number in range(8):
        (root / "gpus" / f"gpu{number}").touch()
    ports = _free_ports(1 + len(NODES))
    lines = [
        f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:8"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    text = (HERE / "slurm.conf.in").read_text().replace("@ROOT@", str(root)).replace("@PORT@", str(ports[0]))
    (root / "slurm.conf").write_text(text.replace("@HOST@", socket.gethostname().split(".")[0]) + "\n".join(lines))
    (root / "gres.conf").write_text(f"AutoDetect=off\nNodeName=node[1-4] Name=gpu File={root}/gpus/gpu[0-7]\n")
    hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES)
    (root / "hosts").write_text(hosts)
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _start(root: Path, environment: dict[str, str]) -> None:
    files = {"key": "munge.key", "socket": "munge.socket", "pid": "munged.pid", "log": "munged.log", "seed": "seed"}
    paths = [f"--{name}{'' if name == 'socket' else '-file'}={root / file}" for name, file in files.items()]
    commands = [["munged", "--force", *paths], ["slurmctld", "-f", str(root / "slurm.conf")]]
    for node in NODES:
        (root / "spool" / node).mkdir()
        script = (
            f"hostname {node} && mount --bind {root}/hosts /etc/hosts && exec slurmd -f {root}/slurm.conf -N {node}"
        )
        commands.append(["unshare", "--uts", "--mount", "--propagation", "slave", "sh", "-c", script])
    for command in commands:
        subprocess.run(command, check=True, env=environment, timeout=300)
    if not _becomes(environment, str(len(NODES)), "sinfo", "-h", "-t", "idle", "-o", "%D"):
        pytest.fail(f"nodes never became idle:\n{(root / 'slurmctld.log').read_text()[-4000:]}")


def _becomes(environment: dict[str, str], expected: str, *command: str) -> bool:
    """Return True if the command prints ``expected`` within 300 s."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0 and done.stdout.strip() == expected:
            return True
        time.sleep(0.1)
    return False


def _stop(root: Path, environment: dict[str, str]) -> None:
    """Cancel what still runs, then stop the daemons by their process ids."""
    subprocess.run(["scancel", "--user", "root"], env=environment, timeout=300, check=False)
    _becomes(environment, "", "squeue", "-h")
    daemons = []
    for file in [*root.glob("slurmd.*.pid"), root / "slurmctld.pid", root / "munged.pid"]:
        if file.is_file() and (text := file.read_text().strip()):
            with contextlib.suppress(psutil.NoSuchProcess):
                daemons.append(psutil.Process(int(text)))
                daemons[-1].terminate()
    _, alive = psutil.wait_procs(daemons, timeout=10)
    for daemon in alive:
        daemon.kill()
