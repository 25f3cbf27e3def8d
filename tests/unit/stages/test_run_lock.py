"""The lock of a run folder: a second run is refused, and a dead run's lock is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prism_megatron.errors import UserError
from prism_megatron.stages import run_lock
from prism_megatron.stages.run_lock import LOCK, Holder, RunLock

ROOT = Path(__file__).resolve().parents[3]
_HOLD = """
import os, sys, time
from pathlib import Path
from prism_megatron.stages.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat=0.01)
if os.fork() == 0:  # like the process that writes a checkpoint
    os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


@contextmanager
def holding(folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run another process that holds the lock; yield it and the pid of a child that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def leave(folder: Path, **changes: object) -> None:
    """Write the lock file of a run that was killed."""
    holder = {"host": socket.gethostname(), "pid": 1, "started": 0.0, "job": "", "restart": ""} | changes
    (folder / LOCK).write_text(json.dumps(holder))


def test_a_second_run_is_refused_and_the_error_names_host_process_and_job(tmp_path: Path) -> None:
    with holding(tmp_path / "run", SLURM_JOB_ID="77") as (process, _):
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path / "run")
        message = str(refused.value)
        assert f"is in use by process {process.pid} on {socket.gethostname()} (SLURM job 77)" in message
        assert str(tmp_path / "run" / LOCK) in message
        assert "\n" not in message
        RunLock(tmp_path / "another").release()


def test_a_killed_run_is_taken_over_at_once_although_its_child_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holding(tmp_path) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        RunLock(tmp_path).release()
        assert f"taken over from process {process.pid} on" in capsys.readouterr().out


def test_a_released_folder_can_be_locked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLock(tmp_path).release()
    with holding(tmp_path), pytest.raises(UserError, match="is in use by"):
        RunLock(tmp_path)
    assert capsys.readouterr().out == "", "nothing was taken over"


def test_an_empty_or_unreadable_lock_file_is_taken_over(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"host": 1}'):
        (tmp_path / LOCK).write_text(content)
        RunLock(tmp_path).release()


def test_an_earlier_start_of_the_same_job_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, host="another", job="77")
    RunLock(tmp_path, silence=1e9).release()


def test_a_run_on_another_host_counts_as_dead_without_a_heartbeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, host="another", job="78")
    RunLock(tmp_path, beat=0.01, silence=0.05).release()
    assert "taken over from process 1 on another (SLURM job 78)" in capsys.readouterr().out


def test_a_run_on_another_host_with_a_heartbeat_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems lock per host only, and grant the lock to both."""
    leave(tmp_path, host="another")
    path, sleep = tmp_path / LOCK, run_lock.time.sleep

    def beat_meanwhile(seconds: float) -> None:
        sleep(seconds)
        os.utime(path)

    monkeypatch.setattr(run_lock.time, "sleep", beat_meanwhile)
    with pytest.raises(UserError, match="in use by process 1 on another"):
        RunLock(tmp_path, beat=0.01, silence=1e9)


def test_without_file_locks_the_process_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    leave(tmp_path, pid=os.getpid(), started=1.0)  # a pid that another process has reused
    RunLock(tmp_path).release()
    assert Holder.this_process().runs_here()


def test_a_run_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/run")):
        with pytest.raises(UserError, match=r"cannot be written to \(.*give another run\.dir or run\.name"):
            RunLock(folder)
