"""The rollout engine in processes of its own on this host, one per tensor-parallel rank, behind the same calls.

Ranks with the same rows share one engine: the first of them owns its processes, all get what it generated. An engine
that dies, or does not answer in time, is started again once, with the weights it had; the same seeds then give the same
responses. Each process (``child_process.py``) is in a world of the engine's own, and ends with the rank that owns it.

Run on CPU, tensor parallelism 1 and 2; not verified on a GPU. How weights get there is in ``transport.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.rollout.engine import (
    CACHES,
    NO_WEIGHTS,
    EngineConfig,
    NoWeights,
    RolloutEngine,
    Sampling,
    check_engine,
)
from prism_megatron.rollout.progress import progress_bar
from prism_megatron.rollout.transport import Disconnected, Piece, check_transport, create_transport
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest

_ROOT = Path(__file__).resolve().parents[2]
_PROCESS = "prism_megatron.rollout.child_process"
_LAST_LINES = 20
_PATIENCE = 2.0  # seconds for a process whose pipe has closed to be gone

type Engine = RolloutEngine | ChildEngine


class EngineDied(RuntimeError):
    """The engine's processes ended, or did not answer in time."""


class ChildEngine:
    """A vLLM engine in child processes, whose weights can be replaced. All calls are collective over all ranks."""

    def __init__(self, checkpoint: Path, config: EngineConfig, log: Path) -> None:
        """``log`` is where the processes of this rank's engine write, if it owns one."""
        check_engine(checkpoint, config)
        check_transport(config.transport)
        rows = gather_over_ranks(groups.data_parallel_rank())
        for data_parallel_rank in sorted(set(rows)):
            members = [rank for rank, held in enumerate(rows) if held == data_parallel_rank]
            group = dist.new_group(members, backend="gloo")
            if dist.get_rank() in members:
                self._group, self._owner = group, members[0]
        owners = [rank for rank, held in enumerate(rows) if held not in rows[:rank]]
        self._processes: _Processes | None = None
        if dist.get_rank() == self._owner:
            self._processes = _Processes(checkpoint, config, log, _first_local_rank(owners, config))
        self._pushed: tuple[Iterable[tuple[str, Tensor]], WeightSync] | None = None
        self._was_restarted = self._has_weights = False
        _on_all_ranks(self._start)
        facts = [self._processes.facts if self._processes else None]
        dist.broadcast_object_list(facts, src=self._owner, group=self._group)
        assert facts[0] is not None
        self.banned_token_ids, self.cache_block_tokens = facts[0]

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        report: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """As :meth:`RolloutEngine.generate`. Raises EngineDied where a restart did not help."""

        if self._pushed is not None and not self._has_weights:
            raise NoWeights(NO_WEIGHTS)

        def ask() -> list[list[Rollout]]:
            if self._processes is None or not requests:
                return []
            with progress_bar(len(requests)) as shown:
                return self._processes.generate(requests, sampling, report or shown)

        answers = [self._surviving(ask)]
        dist.broadcast_object_list(answers, src=self._owner, group=self._group)
        return answers[0]

    def update_weights(self, named: Iterable[tuple[str, Tensor]], sync: WeightSync) -> None:
        """As :meth:`RolloutEngine.update_weights`. ``named`` is kept: a restart goes through it again.

        With checksums, what arrived in the processes is compared with what the ranks sent, too.
        """
        assert iter(named) is not named, "the weights must be there again after a restart"
        self._has_weights = False
        self._pushed = named, sync
        received = self._surviving(self._push)
        if sync.with_checksums:
            everybody = gather_over_ranks(received)
            holders = sync.by_holder([sent for sent, *_ in everybody])
            for rank, (_, *arrived) in enumerate(everybody):
                holders |= _in_processes(sync, rank).by_holder(arrived)
            sync.check_agreement(holders)
        self._has_weights = True

    def reset_caches(self, first: int = len(CACHES)) -> None:
        """As :meth:`RolloutEngine.reset_caches`."""
        self._surviving(lambda: self._processes.tell_to("reset_caches", first) if self._processes else None)

    def sleep(self) -> None:
        """As :meth:`RolloutEngine.sleep`."""
        self._surviving(lambda: self._processes.tell_to("sleep") if self._processes else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """As :meth:`RolloutEngine.wake`."""
        torch.cuda.empty_cache()
        self._surviving(lambda: self._processes.tell_to("wake", part) if self._processes else None)

    def differing_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """As :meth:`RolloutEngine.differing_parameters`, one engine after another.

        After a restart, which pushes the weights anew, ``named`` is gone through again.
        """
        assert iter(named) is not named, "the weights must be there again after a restart"
        found = gather_over_ranks(self._surviving(lambda: self._send("differing_parameters", named)))
        return list(dict.fromkeys(name for answers in found for names in answers for name in names))

    def _push(self) -> list[Mapping[str, int]]:
        """Checksums of what this rank sent and of what each of its processes got."""
        assert self._pushed is not None
        named, sync = self._pushed
        sync.checksums.clear()
        return [sync.checksums, *self._send("update", sync.checked(named), _in_processes(sync, dist.get_rank()))]

    def _send(self, command: str, named: Iterable[tuple[str, Tensor]], *arguments: Any) -> list[Any]:
        """What each of this rank's processes answers to ``command`` with ``named``."""
        tensors = iter(named)
        try:
            return [] if self._processes is None else self._processes.send(command, tensors, *arguments)
        finally:
            for _ in tensors:  # gathering them is collective, whatever became of the processes
                pass

    def _surviving[Result](self, attempt: Callable[[], Result]) -> Result:
        try:
            return _on_all_ranks(attempt)
        except EngineDied as death:
            if self._was_restarted:
                raise EngineDied(f"{death}\nIt had been started again once before") from death
            self._was_restarted = True
            if groups.is_main_rank():
                print(f"warning: {death}\nIt is started again with the weights it had", file=sys.stderr, flush=True)
        _on_all_ranks(self._start)
        if self._pushed is not None:
            self._surviving(self._push)
        return self._surviving(attempt)

    def _start(self) -> None:
        if self._processes is not None:
            self._processes.start()


def _in_processes(sync: WeightSync, owner: int) -> WeightSync:
    """The same update, as the processes of the engine that rank ``owner`` owns see it."""
    return replace(sync, checksums={}, holder=f"engine process {{}} of rank {owner}")


def _on_all_ranks[Result](attempt: Callable[[], Result]) -> Result:
    """This rank's result or, on all ranks, the first fault that any of them met."""
    result: list[Result] = []
    fault: Exception | None = None
    try:
        result.append(attempt())
    except (EngineDied, NoWeights, ValueError) as error:
        fault = error
    for found in gather_over_ranks(fault):
        if found is not None:
            raise found
    return result[0]


class _Processes:
    """The processes of one engine, and the way that weights reach them."""

    def __init__(self, checkpoint: Path, config: EngineConfig, log: Path, first_local_rank: int) -> None:
        self._checkpoint, self._config, self._log, self._first = checkpoint, config, log, first_local_rank
        self._transport = create_transport(config.transport, config.bucket_bytes)
        self.facts: tuple[list[int], int] | None = None  # the engine's banned_token_ids and cache_block_tokens
        self._children: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def start(self) -> None:
        """Unless they are running."""
        if self._children:
            return
        ranks, first = self._config.tensor_parallel_size, self._first
        if torch.cuda.is_available() and first + ranks > torch.cuda.device_count():
            raise UserError(
                f"rollout.tensor_model_parallel_size ({ranks}) with rollout.transport ({self._config.transport}) needs "
                f"GPUs {first} to {first + ranks - 1} of one host, which has {torch.cuda.device_count()}; use a "
                "divisor of the size, or a transport that shares the GPUs of the ranks"
            )
        port = groups.free_port()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            ours, theirs = Pipe()
            with theirs, self._log.open("ab") as output:
                child = subprocess.Popen(
                    [sys.executable, "-m", _PROCESS, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(), *self._transport.descriptors),
                    env=_environment(rank, ranks, first, port),
                    stdout=output,
                    stderr=output,
                )
            self._children.append(child)
            self._connections.append(ours)
        # Time is taken on this side, where an engine that hangs is seen, too.
        invitations = self._transport.invitations(ranks)
        self._tell(self._checkpoint, replace(self._config, timeout_seconds=0.0), invitations)
        self.facts = self._answers("done", "starting")[0]
        try:
            self._transport.connect()
        except Disconnected as error:
            raise self._death(f"cannot be reached: {error}") from error

    def tell_to(self, command: Literal["reset_caches", "sleep", "wake"], *arguments: str | int) -> None:
        self._tell(command, arguments)
        self._answers("done", f"told to {command}")

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, report: Callable[[int], None]
    ) -> list[list[Rollout]]:
        self._tell("generate", (requests, sampling))
        answer: list[list[Rollout]] = self._answers("done", "generating", self._config.timeout_seconds, report)[0]
        return answer

    def send(self, command: str, named: Iterable[tuple[str, Tensor]], *arguments: Any) -> list[Any]:
        """What each process answers to ``command`` with tensors."""
        refusal: ValueError | None = None

        def announce(pieces: list[Piece]) -> None:
            self._tell("pieces", pieces)
            self._answers("waits", "taking weights")  # so that a collective call has all its ranks

        self._tell(command, arguments)
        try:
            self._transport.send(named, announce)
        except ValueError as error:
            refusal = error
        except Disconnected as error:
            raise self._death(f"was lost taking weights: {error}") from error
        self._tell("end", refusal)
        return self._answers("done", "taking weights")

    def _tell(self, *message: Any) -> None:
        for connection in self._connections:
            try:
                connection.send(message)
            except OSError as error:
                raise self._death("was found dead") from error

    def _answers(
        self, wanted: str, doing: str, limit: float = 0.0, report: Callable[[int], None] | None = None
    ) -> list[Any]:
        """Of every process, in order. Raises what they refused with, and EngineDied."""
        deadline = time.monotonic() + limit
        answers: dict[Connection, Any] = {}
        while waiting := [connection for connection in self._connections if connection not in answers]:
            ready = wait(waiting, max(deadline - time.monotonic(), 0) if limit else None)
            if not ready:
                raise self._death(f"was {doing} for longer than rollout.timeout_seconds ({limit:g})", patience=0.0)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._death(f"died {doing}") from error
                if kind == "answered" and report is not None:
                    report(value)
                elif kind in (wanted, "refused"):
                    answers[connection] = value
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [answers[connection] for connection in self._connections]

    def _death(self, how: str, patience: float = _PATIENCE) -> EngineDied:
        """End what is left of the processes, and say what is known of their end."""
        ends = [_end(child, patience) for child in self._children]
        for connection in self._connections:
            connection.close()
        self._children, self._connections = [], []
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return EngineDied(
            f"the rollout engine of rank {dist.get_rank()} {how} ({', '.join(ends)}); the end of {self._log}:\n"
            + "\n".join(f"    {line}" for line in lines)
        )


def _end(child: subprocess.Popen[bytes], patience: float) -> str:
    try:
        status = child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"process {child.pid} was running"
    return f"process {child.pid} ended with {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"


def _first_local_rank(owners: Sequence[int], config: EngineConfig) -> int:
    """Of the processes of this rank's engine, one of those that ``owners`` have: which GPUs they run on.

    They share those of this rank and the ones after it. NCCL, though, takes no GPU twice: they have those after the
    ranks of the host, engine by engine.
    """
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    if config.transport != "collective" or not torch.cuda.is_available():
        return local_rank
    before = sum(rank - local_rank <= owner < rank for owner in owners)
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + before * config.tensor_parallel_size


def _environment(rank: int, ranks: int, first_local_rank: int, port: int) -> dict[str, str]:
    """The processes are a world of their own, not the launcher's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return inherited | {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(first_local_rank + rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    }
