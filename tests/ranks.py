"""Real ranks for tests, forked from a server that has imported torch, Megatron, transformers and vLLM.

Importing them takes a rank longer than most cases take to run. A rank is a process of its own all the same: forked for
one launch, with an environment, a working folder and an output of its own. torchrun itself starts ranks in the
quickstart, SLURM does in tests/slurm.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import multiprocessing
import os
import random
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
_LAST_WORDS_SECONDS = 60  # in which the other ranks may say why they fail, too
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.imported"])


def run_ranks(
    number: int,
    arguments: Sequence[str],
    output: Path,
    cwd: Path = ROOT,
    threads: int | None = None,
    limit: float = 900,
) -> int:
    """Run ``python ARGUMENT...`` (a script, or -m and a module) as so many ranks; what they say goes to ``output``.

    Returns the exit status of the first rank to fail, 0 if none does. No rank is left then, nor what it started. One
    that is still there after ``limit`` seconds writes its stack and ends.
    """
    from prism_megatron.parallel.rendezvous import open_rendezvous

    output.touch()
    _store, meeting = open_rendezvous()
    environment = os.environ | {
        **meeting,
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "OMP_NUM_THREADS": str(threads or max(usable_cores() // number, 1)),
    }
    ranks = []
    for rank in range(number):
        identity = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        settings = (list(arguments), str(output), str(cwd), environment | identity, limit)
        ranks.append(_forkserver.Process(target=_run, args=settings))
    try:
        for process in ranks:
            process.start()
        return _first_failure(ranks)
    finally:
        for process in ranks:
            _end(process)


def _first_failure(ranks: Sequence[ForkServerProcess]) -> int:
    """Wait until all ranks have ended or, after one has failed, for a while."""
    alive = {process.sentinel: process for process in ranks}
    status, seconds = 0, None
    while alive and (ended := wait(list(alive), seconds)):
        for sentinel in ended:
            process = alive.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            status = status or process.exitcode
        seconds = _LAST_WORDS_SECONDS if status else None
    return status


def _end(process: ForkServerProcess) -> None:
    """Kill -9 a rank and what it started."""
    if process.pid is None:
        return
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def usable_cores() -> int:
    """Cores for one test: pytest's workers share them, and threads that wait for a core spin."""
    return max(CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)


def _run(arguments: list[str], output: str, cwd: str, environment: Mapping[str, str], limit: float) -> None:
    """The life of a rank."""
    assert "vllm" in sys.modules, "the server did not import what tests.imported names"
    os.setpgrp()
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), write_through=True)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), write_through=True)  # noqa: SIM115
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)
    warnings.simplefilter("ignore")
    random.seed()
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
