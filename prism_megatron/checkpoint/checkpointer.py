"""Saving and resuming with Megatron's distributed checkpoint.

``checkpoints/iter_0000042/`` appears when it is complete, with a manifest of sizes and checksums that is checked before
anything is loaded; ``latest_checkpointed_iteration.txt`` names the last one for other tools. Whatever happens to a run
or to its files, the next start takes the newest checkpoint that is whole.

What is saved is weights, optimizer state, the iteration, and what a stage carries over (past responses, where it is
told to keep any). Learning rate, data order and sampling seeds are pure functions of (seed, iteration), and nothing
else is random, so there is no other state.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from prism_megatron.checkpoint.optimizer_state import restore, saved_state, wanted_state
from prism_megatron.checkpoint.writer import results_in, take_digests
from prism_megatron.convert.hf_io import replace_directory
from prism_megatron.convert.load_checkpoint import first_common_fault, load_weights_of, sharded_weights
from prism_megatron.convert.manifest import digest_file, write_manifest
from prism_megatron.errors import SharedError, UserError
from prism_megatron.files import fsync, write_atomic
from prism_megatron.parallel import groups

_LATEST = "latest_checkpointed_iteration.txt"
_MEGATRON_FILES = (".metadata", "metadata.json")
_MISFITS = (RuntimeError, KeyError, CheckpointException, dist_checkpointing.core.CheckpointingException)


class Checkpointer:
    """Saves named (model, optimizer) pairs and the iteration; keeps the newest few.

    ``about`` is plain data for each checkpoint's manifest, such as which experiment it is of. Writing goes on in the
    background until :meth:`poll` finds it done on every rank; close the checkpointer when the last save must be whole.
    """

    def __init__(self, directory: Path, keep: int, about: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self.keep = max(keep, 1)
        self._about = about or {}
        self._queue = AsyncCallsQueue(persistent=False)

    def latest(self) -> int:
        """Newest whole iteration, 0 if nothing was ever saved; says which it passed over and why.

        Collective. Raises SharedError if there are checkpoints and none is whole.
        """
        passed: list[str] = []
        for iteration in sorted(self._iterations(), reverse=True):
            fault = first_common_fault(self._folder(iteration))
            if fault is None:
                for reason in passed:
                    self._say(f"passed over {reason}; going on from iteration {iteration}")
                return iteration
            passed.append(f"{self._folder(iteration).name} ({fault})")
        if passed:
            raise SharedError(
                f"no checkpoint in {self.directory} is whole: {'; '.join(passed)}. Remove them to start over"
            )
        return 0

    def save(self, iteration: int, parts: Mapping[str, tuple[Any, Any]], carried: Any = None) -> None:
        """Take a copy of the state and write ``iter_<iteration>`` from it while training goes on.

        ``carried`` is plain data, the same on every rank.

        Collective. Waits for the save before it, if that is still being written. Raises OSError, with the checkpoints
        before untouched, if the disk is full; that may be found later, by :meth:`poll` or :meth:`close`.
        """
        self.close()
        final = self._folder(iteration)
        # A writer that outlives its killed run must not write into the folder of the next one.
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)
        partial = final.with_name(f".{final.name}.{token[0]}.partial")
        if groups.is_main_rank():
            self._remove_unfinished()
            partial.mkdir(parents=True)
        dist.barrier()
        with results_in(partial, dist.get_rank()):
            request = dist_checkpointing.save(
                _state(parts, iteration) | {"carried": carried},
                str(partial),
                async_sharded_save=True,
                async_strategy="mcore",
            )
        request.add_finalize_fn(lambda: self._complete(partial, iteration))
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Make a finished save the latest. Collective; call it once an iteration."""
        self._finalize(blocking=False)

    def close(self) -> None:
        """Wait until everything is written. Collective."""
        self._finalize(blocking=True)

    def load(self, iteration: int, parts: Mapping[str, tuple[Any, Any]]) -> Any:
        """Restore weights and optimizer state, at any parallel layout; returns what was carried. Collective."""
        folder = self._folder(iteration)
        wanted: dict[str, Any] = {}
        own = {}
        for name, (model, optimizer) in parts.items():
            wanted[name] = sharded_weights(model, f"{name}.")
            wanted[f"{name}_optimizer"], own[name] = wanted_state(optimizer, wanted[name])
        try:
            loaded = dist_checkpointing.load(wanted, str(folder))
        except _MISFITS as error:
            raise UserError(
                f"{folder} does not fit this configuration ({_last_line(error)}); it is of another model, "
                "or of another optimizer.use_distributed_optimizer. Give the run another run.name, or remove it"
            ) from error
        for name, (model, optimizer) in parts.items():
            load_weights_of(model, loaded[name])
            restore(optimizer, own[name], loaded[f"{name}_optimizer"])
        return loaded.get("carried")

    def _finalize(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (CheckpointException, OSError) as error:
            # Megatron's writer reports a fault without its cause.
            full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(self.directory).free < 1 << 16
            if groups.is_main_rank():
                self._remove_unfinished()
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from error
            raise

    def _complete(self, partial: Path, iteration: int) -> None:
        """Every rank has written its files: describe them, then let the folder appear."""
        dist.barrier()
        if groups.is_main_rank():
            files = take_digests(partial)
            files |= {name: digest_file(partial / name) for name in _MEGATRON_FILES}
            for name in _MEGATRON_FILES:
                fsync(partial / name)
            write_manifest(partial, files, about={**self._about, "iteration": iteration, "policy_version": iteration})
            replace_directory(partial, self._folder(iteration))
            write_atomic(self.directory / _LATEST, f"{iteration}\n")
            self._prune()
        dist.barrier()

    def _iterations(self) -> list[int]:
        folders = self.directory.glob("iter_*")
        return [int(p.name.removeprefix("iter_")) for p in folders if p.is_dir() and p.name[5:].isdigit()]

    def _folder(self, iteration: int) -> Path:
        return self.directory / f"iter_{iteration:07d}"

    def _prune(self) -> None:
        for iteration in sorted(self._iterations())[: -self.keep]:
            shutil.rmtree(self._folder(iteration))

    def _remove_unfinished(self) -> None:
        for folder in self.directory.glob(".iter_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _say(self, text: str) -> None:
        if not dist.is_initialized() or groups.is_main_rank():
            print(f"checkpoint: {text}", flush=True)


def _state(parts: Mapping[str, tuple[Any, Any]], iteration: int) -> dict[str, Any]:
    state: dict[str, Any] = {"iteration": iteration, "policy_version": iteration}
    for name, (model, optimizer) in parts.items():
        state[name] = sharded_weights(model, f"{name}.")
        state[f"{name}_optimizer"] = saved_state(optimizer, state[name])
    return state


def _last_line(error: BaseException) -> str:
    """What a chain of tracebacks in one message comes down to."""
    return ["", *str(error).strip().splitlines()][-1][:300]
