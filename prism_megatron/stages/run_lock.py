"""A lock file that allows one run at a time in a run folder.

The kernel's lock on the file ends with the process, however it ends, and forked processes do not inherit it. The file
names the holder: host, process and SLURM job. If the holder is on another host, or the file system has no locks, its
heartbeat shows whether it is alive: a running process touches the file every few seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from prism_megatron.errors import UserError

LOCK = "run.lock"
_BEAT_SECONDS = 10.0
_SILENCE_SECONDS = 120.0  # a process on another host counts as dead after so long without a heartbeat
_CLOCK_SECONDS = 10.0  # tolerance for a process's start time, which shifts when the clock is set
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """A process that holds or held the lock of a run folder; ``job`` and ``restart`` are SLURM's, or empty."""

    host: str
    pid: int
    started: float  # seconds since the epoch; tells processes apart that reuse a pid
    job: str
    restart: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            socket.gethostname(),
            os.getpid(),
            psutil.Process().create_time(),
            os.environ.get("SLURM_JOB_ID", ""),
            os.environ.get("SLURM_RESTART_COUNT", ""),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")

    def runs_here(self) -> bool:
        """Return whether a process of this host with this pid and start time is alive."""
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) < _CLOCK_SECONDS)
        except psutil.NoSuchProcess:
            return False


class RunLock:
    """A lock held from construction to :meth:`release` or the end of the process; also a context manager.

    Raises UserError with host, process and job if a live run holds it, or if the folder is not writable. If the holder
    is on another host, the constructor waits up to ``silence`` seconds for its heartbeat.
    """

    def __init__(self, folder: Path, beat: float = _BEAT_SECONDS, silence: float = _SILENCE_SECONDS) -> None:
        self._path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(
                f"the run folder {folder} cannot be written to ({error.strerror}: {error.filename}); "
                "give another run.dir or run.name, or change its permissions"
            ) from error
        try:
            self._take(beat, silence)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(beat,), name="run lock", daemon=True)
        self._heart.start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._heart.join()
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)  # releases the kernel's lock

    def _take(self, beat: float, silence: float) -> None:
        has_kernel_lock = True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(self._read()) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            has_kernel_lock = False
        holder, new = self._read(), Holder.this_process()
        if holder is not None:
            if holder.host == new.host:
                lives = not has_kernel_lock and holder.runs_here()
            elif holder.job and holder.job == new.job and holder.restart != new.restart:
                lives = False  # an earlier attempt of this job
            else:
                lives = self._is_touched(holder, beat, silence)
            if lives:
                raise self._refusal(holder)
            print(f"run folder: taken over from {holder}, which died without releasing it", flush=True)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(new)).encode() + b"\n", 0)
        os.fsync(self._descriptor)

    def _is_touched(self, holder: Holder, beat: float, silence: float) -> bool:
        """Return whether the file's time changes, a heartbeat. Its value means nothing: hosts' clocks differ."""
        print(f"run folder: waiting up to {silence:.0f} s for a heartbeat of {holder}", flush=True)
        first = os.fstat(self._descriptor).st_mtime_ns
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            time.sleep(beat / 2)
            if os.fstat(self._descriptor).st_mtime_ns != first:
                return True
        return False

    def _read(self) -> Holder | None:
        """Read the holder; None if the last run released the lock or was killed before it wrote its name.

        The file must not be opened a second time: closing it would release the kernel's lock.
        """
        try:
            return Holder(**json.loads(os.pread(self._descriptor, 1 << 16, 0)))
        except (ValueError, TypeError):
            return None

    def _refusal(self, holder: Holder | None) -> UserError:
        return UserError(
            f"{self._path.parent} is in use by {holder or 'another process'}; wait until that run ends, or give this "
            f"one another run.name ({self._path} names the process)"
        )

    def _beat(self, seconds: float) -> None:
        while not self._released.wait(seconds):
            with contextlib.suppress(OSError):  # a network file system may be unavailable for a moment
                os.utime(self._descriptor)
