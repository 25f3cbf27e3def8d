"""The subprocesses of one rollout engine: their start, messages to them, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.parallel.rendezvous import open_rendezvous
from prism_megatron.rollout.interface import EngineConfig, Sampling
from prism_megatron.rollout.transport import Disconnected, Piece, create_transport
from prism_megatron.types import Rollout, RolloutRequest

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = "prism_megatron.rollout.subprocess_worker"
_LAST_LINES = 20
_EXIT_SECONDS = 2.0  # that a process may take to exit after its pipe was closed


class EngineDied(RuntimeError):
    """The engine's processes ended, or did not answer in time."""


class EngineProcesses:
    """The subprocesses of an engine, and the transport of its weights.

    Attributes:
        facts: ``banned_token_ids`` and ``cache_block_tokens`` of the engine; None before the first start.
    """

    def __init__(self, checkpoint: Path, config: EngineConfig, log: Path, first_local_rank: int) -> None:
        self._checkpoint, self._config, self._log, self._first = checkpoint, config, log, first_local_rank
        self._transport = create_transport(config.transport, config.bucket_bytes)
        self.facts: tuple[list[int], int] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def start(self) -> None:
        """Start the processes unless they are running."""
        if self._processes:
            return
        ranks, first = self._config.tensor_parallel_size, self._first
        if torch.cuda.is_available() and first + ranks > torch.cuda.device_count():
            raise UserError(
                f"rollout.tensor_model_parallel_size ({ranks}) with rollout.transport ({self._config.transport}) needs "
                f"GPUs {first} to {first + ranks - 1} of one host, which has {torch.cuda.device_count()}; use a "
                "divisor of the size, or a transport that shares the GPUs of the ranks"
            )
        self._store, meeting = open_rendezvous()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            own_end, other_end = Pipe()
            with other_end, self._log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", _WORKER, str(other_end.fileno())],
                    pass_fds=(other_end.fileno(), *self._transport.descriptors),
                    env=_environment(rank, ranks, first) | meeting,
                    stdout=output,
                    stderr=output,
                )
            self._processes.append(process)
            self._connections.append(own_end)
        # The parent enforces the timeout, so that a hung engine is detected.
        invitations = self._transport.invitations(ranks)
        self._tell(self._checkpoint, replace(self._config, timeout_seconds=None), invitations)
        self.facts = self._answers("done", "starting")[0]
        try:
            self._transport.connect()
        except Disconnected as error:
            raise self._death(f"cannot be reached: {error}") from error

    def call(self, command: Literal["reset_caches", "sleep", "wake"], *arguments: str | int) -> None:
        """Call a method of the engine that returns nothing."""
        self._tell(command, arguments)
        self._answers("done", f"executing {command}")

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, report: Callable[[int], None]
    ) -> list[list[Rollout]]:
        """Responses to each request; ``report`` is called with the number of finished requests."""
        self._tell("generate", (requests, sampling))
        answer: list[list[Rollout]] = self._answers("done", "generating", self._config.timeout_seconds, report)[0]
        return answer

    def send(self, command: str, named: Iterable[tuple[str, Tensor]], *arguments: Any) -> list[Any]:
        """Answers of all processes to a command with tensors."""
        refusal: UserError | None = None

        def announce(pieces: list[Piece]) -> None:
            self._tell("pieces", pieces)
            self._answers("waits", "receiving weights")  # then no rank is missing from a collective call

        self._tell(command, arguments)
        try:
            self._transport.send(named, announce)
        except UserError as error:
            refusal = error
        except Disconnected as error:
            raise self._death(f"was lost while receiving weights: {error}") from error
        self._tell("end", refusal)
        return self._answers("done", "receiving weights")

    def _tell(self, *message: Any) -> None:
        for connection in self._connections:
            try:
                connection.send(message)
            except OSError as error:
                raise self._death("was found dead") from error

    def _answers(
        self,
        expected: str,
        activity: str,
        limit: float | None = None,
        report: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Wait for every process's message of kind ``expected``; returns their values in order.

        Args:
            expected: kind of the message that ends the wait.
            activity: what the processes do meanwhile, for the error message.
            limit: seconds; None for no limit.
            report: called with the number of finished requests.

        Raises:
            EngineDied: a process ended, or the limit was exceeded.
            UserError, NoWeights: what a process raised.
        """
        deadline = None if limit is None else time.monotonic() + limit
        answers: dict[Connection, Any] = {}
        while pending := [connection for connection in self._connections if connection not in answers]:
            ready = wait(pending, None if deadline is None else max(deadline - time.monotonic(), 0))
            if not ready:
                raise self._death(f"was {activity} for longer than rollout.timeout_seconds ({limit:g})", patience=0.0)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._death(f"died {activity}") from error
                if kind == "answered" and report is not None:
                    report(value)
                elif kind in (expected, "refused"):
                    answers[connection] = value
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [answers[connection] for connection in self._connections]

    def _death(self, description: str, patience: float = _EXIT_SECONDS) -> EngineDied:
        """Kill the remaining processes; returns an error with each exit status and the end of the log."""
        ends = [_end(process, patience) for process in self._processes]
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return EngineDied(
            f"the rollout engine of rank {dist.get_rank()} {description} ({', '.join(ends)}); the end of {self._log}:\n"
            + "\n".join(f"    {line}" for line in lines)
        )


def _end(process: subprocess.Popen[bytes], patience: float) -> str:
    """Wait ``patience`` seconds for a process, then kill it; returns how it ended, for the error message."""
    try:
        status = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"process {process.pid} was running"
    end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"process {process.pid} ended with {end}"


def _environment(rank: int, ranks: int, first_local_rank: int) -> dict[str, str]:
    """Environment of a process in a world of the engine's own, without the launcher's variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return inherited | {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(first_local_rank + rank),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    }
