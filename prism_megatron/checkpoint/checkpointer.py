"""Saving and loading with Megatron's distributed checkpoints.

``checkpoints/iter_0000042/`` appears when it is complete, with a manifest of sizes and checksums that is verified
before anything is loaded; ``latest_checkpointed_iteration.txt`` names the last one for other tools. A start loads the
newest checkpoint whose files are intact.

A checkpoint has weights, optimizer state, the iteration and a stage's extra state (such as past responses). Learning
rate, data order and sampling seeds are pure functions of (seed, iteration), and nothing else is random.
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

from prism_megatron.checkpoint.optimizer_state import restore, saved_state, state_to_load
from prism_megatron.checkpoint.writer import results_in, take_digests
from prism_megatron.convert.load_checkpoint import first_common_fault, load_weights_of, sharded_weights
from prism_megatron.convert.manifest import digest_file, write_manifest
from prism_megatron.errors import SharedError, UserError
from prism_megatron.files import fsync, replace_directory, write_atomic
from prism_megatron.parallel import groups
from prism_megatron.upstream.megatron import AsyncCallsQueue, CheckpointingException
from prism_megatron.upstream.torch_internals import CheckpointException

_LATEST = "latest_checkpointed_iteration.txt"
_MEGATRON_FILES = (".metadata", "metadata.json")
_EXTRA_STATE = "carried"  # key in the checkpoint
_LOAD_ERRORS = (RuntimeError, KeyError, CheckpointException, CheckpointingException)  # of another model's checkpoint


class Checkpointer:
    """Saves named (model, optimizer) pairs and the iteration, and keeps the newest ``keep`` checkpoints.

    ``about`` is plain data for each checkpoint's manifest, such as the run's identity. Files are written in the
    background until :meth:`poll` finds that every rank has finished; :meth:`close` waits for the last save.
    """

    def __init__(self, directory: Path, keep: int, about: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self.keep = max(keep, 1)
        self._about = about or {}
        self._queue = AsyncCallsQueue(persistent=False)

    def latest(self) -> int:
        """Return the newest intact checkpoint's iteration, 0 if there are no checkpoints; warn about damaged ones.

        Collective. Raises SharedError if there are checkpoints and none is intact.
        """
        damaged: list[str] = []
        for iteration in sorted(self._iterations(), reverse=True):
            fault = first_common_fault(self._folder(iteration))
            if fault is None:
                for reason in damaged:
                    self._log_line(f"skipped {reason}; resuming from iteration {iteration}")
                return iteration
            damaged.append(f"{self._folder(iteration).name} ({fault})")
        if damaged:
            raise SharedError(
                f"no checkpoint in {self.directory} is intact: {'; '.join(damaged)}. Remove them to start over"
            )
        return 0

    def save(self, iteration: int, parts: Mapping[str, tuple[Any, Any]], extra_state: Any = None) -> None:
        """Copy the state and write ``iter_<iteration>`` in the background. Collective.

        Waits for an earlier save that is still being written. ``extra_state`` is plain data, the same on every rank.
        Raises OSError, here or in :meth:`poll` or :meth:`close`, if the disk is full; earlier checkpoints stay intact.
        """
        self.close()
        final = self._folder(iteration)
        # A writer that outlives its killed run must not write to the next run's folder.
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)
        partial = final.with_name(f".{final.name}.{token[0]}.partial")
        if groups.is_main_rank():
            self._remove_unfinished()
            partial.mkdir(parents=True)
        dist.barrier()
        with results_in(partial, dist.get_rank()):
            request = dist_checkpointing.save(
                _state(parts, iteration) | {_EXTRA_STATE: extra_state},
                str(partial),
                async_sharded_save=True,
                async_strategy="mcore",
            )
        request.add_finalize_fn(lambda: self._complete(partial, iteration))
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish the save if it is finished. Collective; call it once per iteration."""
        self._finalize(blocking=False)

    def close(self) -> None:
        """Wait until everything is written. Collective."""
        self._finalize(blocking=True)

    def load(self, iteration: int, parts: Mapping[str, tuple[Any, Any]]) -> Any:
        """Load weights and optimizer state at any parallel layout, and return the extra state. Collective."""
        folder = self._folder(iteration)
        requested: dict[str, Any] = {}
        own = {}
        for name, (model, optimizer) in parts.items():
            requested[name] = sharded_weights(model, f"{name}.")
            requested[f"{name}_optimizer"], own[name] = state_to_load(optimizer, requested[name])
        try:
            loaded = dist_checkpointing.load(requested, str(folder))
        except _LOAD_ERRORS as error:
            raise UserError(
                f"{folder} does not fit this configuration ({_last_line(error)}): it has another model "
                "or another optimizer.use_distributed_optimizer. Choose another run.name, or remove it"
            ) from error
        for name, (model, optimizer) in parts.items():
            load_weights_of(model, loaded[name])
            restore(optimizer, own[name], loaded[f"{name}_optimizer"])
        return loaded.get(_EXTRA_STATE)

    def _finalize(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (CheckpointException, OSError) as error:
            # Megatron's writer reports an error without its cause.
            full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(self.directory).free < 1 << 16
            if groups.is_main_rank():
                self._remove_unfinished()
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from error
            raise

    def _complete(self, partial: Path, iteration: int) -> None:
        """Write the manifest of the files that all ranks have written, then rename the folder."""
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

    def _log_line(self, text: str) -> None:
        if not dist.is_initialized() or groups.is_main_rank():
            print(f"checkpoint: {text}", flush=True)


def _state(parts: Mapping[str, tuple[Any, Any]], iteration: int) -> dict[str, Any]:
    state: dict[str, Any] = {"iteration": iteration, "policy_version": iteration}
    for name, (model, optimizer) in parts.items():
        state[name] = sharded_weights(model, f"{name}.")
        state[f"{name}_optimizer"] = saved_state(optimizer, state[name])
    return state


def _last_line(error: BaseException) -> str:
    """Return the last line of a message that contains chained tracebacks: the root cause."""
    return ["", *str(error).strip().splitlines()][-1][:300]
