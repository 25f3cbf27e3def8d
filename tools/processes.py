"""Child processes of the tools: one Python module, run to its end or to a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_environment() -> dict[str, str]:
    """This process's environment, with the repository's modules to be found from any working directory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


@dataclass(frozen=True)
class Finished:
    """Exit status of a child process (None: killed at its time limit), and what it wrote to stdout and stderr."""

    status: int | None
    output: str


def run_module(
    module: str,
    arguments: Sequence[str],
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run ``python -m MODULE ARGUMENTS`` in a session of its own.

    At the time limit, and when this process is interrupted, the child is killed with all processes that it started.

    Args:
        module: dotted name, found from the repository whatever the working directory is.
        arguments: the module's command line.
        timeout: seconds; None for no limit.
        environment: variables to set in addition to this process's.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=module_environment() | dict(environment or {}),
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Finished(status, output.read().decode(errors="replace"))
