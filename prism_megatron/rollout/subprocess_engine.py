"""The rollout engine in subprocesses of a training rank, one per tensor-parallel rank of the engine, on the same host.

Ranks with the same rows share one engine. The first of them, the leader, starts the subprocesses; all ranks receive the
responses. An engine that dies or exceeds its time limit is restarted once, with the weights it had; the same seeds then
give the same responses. The subprocesses (``subprocess_worker.py``) form a world of their own and end with the leader.

Verified on CPU with tensor parallelism 1 and 2, not on a GPU. ``transport.py`` moves the weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.observe.progress import ProgressBar
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks
from prism_megatron.rollout.engine import check_engine
from prism_megatron.rollout.engine_processes import EngineDied, EngineProcesses
from prism_megatron.rollout.interface import CACHES, NO_WEIGHTS, EngineConfig, NoWeights, Sampling
from prism_megatron.rollout.transport import check_transport
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.types import Rollout, RolloutRequest


class SubprocessEngine:
    """The engine in subprocesses (see :class:`~prism_megatron.rollout.interface.Engine`).

    All calls are collective over all ranks.
    """

    def __init__(self, checkpoint: Path, config: EngineConfig, log: Path) -> None:
        """Start the engine; its subprocesses write to ``log``, a file of this rank."""
        check_engine(checkpoint, config)
        check_transport(config.transport)
        data_ranks = gather_over_ranks(groups.data_parallel_rank())
        for data_rank in sorted(set(data_ranks)):
            members = [rank for rank, of_rank in enumerate(data_ranks) if of_rank == data_rank]
            group = dist.new_group(members, backend="gloo")
            if dist.get_rank() in members:
                self._group, self._leader = group, members[0]
        leaders = [rank for rank, of_rank in enumerate(data_ranks) if of_rank not in data_ranks[:rank]]
        self._processes: EngineProcesses | None = None
        if dist.get_rank() == self._leader:
            self._processes = EngineProcesses(checkpoint, config, log, _first_local_rank(leaders, config))
        self._pushed: tuple[Iterable[tuple[str, Tensor]], WeightSync] | None = None
        self._was_restarted = self._has_weights = False
        _on_all_ranks(self._start)
        facts = [self._processes.facts if self._processes else None]
        dist.broadcast_object_list(facts, src=self._leader, group=self._group)
        assert facts[0] is not None
        self.banned_token_ids, self.cache_block_tokens = facts[0]

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        report: Callable[[int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Sample responses to each request (:meth:`Engine.generate`). Raises EngineDied after a second death."""
        if self._pushed is not None and not self._has_weights:
            raise NoWeights(NO_WEIGHTS)

        def ask() -> list[list[Rollout]]:
            if self._processes is None or not requests:
                return []
            show = report is None and groups.is_main_rank()
            with ProgressBar("rollout", len(requests), is_transient=True, is_enabled=show) as bar:
                return self._processes.generate(requests, sampling, report or bar.update)

        answers = [self._with_restart(ask)]
        dist.broadcast_object_list(answers, src=self._leader, group=self._group)
        return answers[0]

    def update_weights(self, named: Iterable[tuple[str, Tensor]], sync: WeightSync) -> None:
        """Replace all weights (:meth:`Engine.update_weights`). A restart iterates over ``named`` again.

        With checksums, what the subprocesses received is compared with what the ranks sent, too.
        """
        assert iter(named) is not named, "a restart pushes the weights again"
        self._has_weights = False
        self._pushed = named, sync
        checksums = self._with_restart(self._push)
        if sync.with_checksums:
            of_all_ranks = gather_over_ranks(checksums)
            receivers = sync.by_receiver([sent for sent, *_ in of_all_ranks])
            for rank, (_, *received) in enumerate(of_all_ranks):
                receivers |= _for_subprocesses(sync, rank).by_receiver(received)
            sync.check_agreement(receivers)
        self._has_weights = True

    def reset_caches(self, first: int = len(CACHES)) -> None:
        """Reset the ``first`` caches of ``CACHES``."""
        self._with_restart(lambda: self._processes.call("reset_caches", first) if self._processes else None)

    def sleep(self) -> None:
        """Release GPU memory until :meth:`wake`."""
        self._with_restart(lambda: self._processes.call("sleep") if self._processes else None)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate the memory of ``part`` again."""
        torch.cuda.empty_cache()
        self._with_restart(lambda: self._processes.call("wake", part) if self._processes else None)

    def differing_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names that an engine has other values for (:meth:`Engine.differing_parameters`), of all engines.

        After a restart, which pushes the weights again, ``named`` is iterated over again.
        """
        assert iter(named) is not named, "a restart sends the weights again"
        of_all_ranks = gather_over_ranks(self._with_restart(lambda: self._send("differing_parameters", named)))
        return list(dict.fromkeys(name for answers in of_all_ranks for names in answers for name in names))

    def _push(self) -> list[Mapping[str, int]]:
        """Send the weights; returns the checksums of what this rank sent and of what each subprocess received."""
        assert self._pushed is not None
        named, sync = self._pushed
        sync.checksums.clear()
        return [sync.checksums, *self._send("update", sync.checked(named), _for_subprocesses(sync, dist.get_rank()))]

    def _send(self, command: str, named: Iterable[tuple[str, Tensor]], *arguments: Any) -> list[Any]:
        """Answers of this rank's subprocesses to ``command`` with ``named``."""
        tensors = iter(named)
        try:
            return [] if self._processes is None else self._processes.send(command, tensors, *arguments)
        finally:
            for _ in tensors:  # gathering them is collective, even if the subprocesses are gone
                pass

    def _with_restart[Result](self, attempt: Callable[[], Result]) -> Result:
        """Result of ``attempt``; after the engine's first death it is restarted and ``attempt`` repeated."""
        try:
            return _on_all_ranks(attempt)
        except EngineDied as death:
            if self._was_restarted:
                raise EngineDied(f"{death}\nIt had been restarted before") from death
            self._was_restarted = True
            if groups.is_main_rank():
                print(f"warning: {death}\nIt is restarted with the weights it had", file=sys.stderr, flush=True)
        _on_all_ranks(self._start)
        if self._pushed is not None:
            self._with_restart(self._push)
        return self._with_restart(attempt)

    def _start(self) -> None:
        if self._processes is not None:
            self._processes.start()


def _for_subprocesses(sync: WeightSync, leader: int) -> WeightSync:
    """The same update as seen by the subprocesses of rank ``leader``."""
    return replace(sync, checksums={}, receiver=f"engine process {{}} of rank {leader}")


def _on_all_ranks[Result](attempt: Callable[[], Result]) -> Result:
    """This rank's result of ``attempt``; if it failed on any rank, every rank raises the first rank's error."""
    result: list[Result] = []
    failure: Exception | None = None
    try:
        result.append(attempt())
    except (EngineDied, NoWeights, UserError) as error:
        failure = error
    for of_rank in gather_over_ranks(failure):
        if of_rank is not None:
            raise of_rank
    return result[0]


def _first_local_rank(leaders: Sequence[int], config: EngineConfig) -> int:
    """LOCAL_RANK of the first subprocess of this rank's engine, which is its GPU.

    Subprocesses share the GPUs of this rank and of those after it. NCCL refuses two processes on one GPU: with
    ``transport=collective`` they use the GPUs after those of the host's ranks, one engine after another.
    """
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    if config.transport != "collective" or not torch.cuda.is_available():
        return local_rank
    engines_before = sum(rank - local_rank <= leader < rank for leader in leaders)
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + engines_before * config.tensor_parallel_size
