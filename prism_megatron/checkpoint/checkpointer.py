"""Saving and resuming with Megatron's distributed checkpoint.

``checkpoints/iter_0000042/`` appears only when complete; ``latest_checkpointed_iteration.txt`` names the last one. A
run that is killed at any moment finds the last complete checkpoint and nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from prism_megatron.parallel import groups

_LATEST = "latest_checkpointed_iteration.txt"


class Checkpointer:
    """Saves named (model, optimizer) pairs and the iteration; keeps the newest few."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = max(keep, 1)

    def latest(self) -> int:
        """Last complete iteration, 0 if there is none. Raises ValueError if the tracker names a missing folder."""
        tracker = self.directory / _LATEST
        if not tracker.is_file():
            return 0
        text = tracker.read_text().strip()
        if not text.isdigit() or not self._folder(int(text)).is_dir():
            raise ValueError(
                f"{tracker} says {text!r} but {self.directory} has no such checkpoint; write the iteration of an "
                "existing iter_ folder into it, or delete it to start over"
            )
        return int(text)

    def save(self, iteration: int, parts: Mapping[str, tuple[Any, Any]]) -> None:
        """Write ``iter_<iteration>``. Raises OSError, with the last checkpoint untouched, if the disk is full."""
        final = self._folder(iteration)
        partial = final.with_name(f".{final.name}.partial")
        if groups.is_main_rank():
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_state(parts, iteration, loading=False), str(partial), ("torch_dist", 1))
        dist.barrier()
        if groups.is_main_rank():
            os.replace(partial, final)
            self._point_to(iteration)
            self._prune(iteration)
        dist.barrier()

    def load(self, iteration: int, parts: Mapping[str, tuple[Any, Any]]) -> None:
        """Restore weights and optimizer state, at any tensor- and data-parallel layout."""
        folder = self._folder(iteration)
        for _, optimizer in parts.values():
            _prefill_state(optimizer)
        try:
            loaded = dist_checkpointing.load(_state(parts, iteration, loading=True), str(folder))
        except (RuntimeError, EOFError, KeyError, dist_checkpointing.core.CheckpointingException) as error:
            raise ValueError(
                f"{folder} cannot be read ({type(error).__name__}: {str(error)[:200]}); it is damaged or of another "
                f"model. Delete it and write an older iteration into {self.directory / _LATEST}"
            ) from error
        for name, (chunks, optimizer) in parts.items():
            for number, chunk in enumerate(chunks):
                chunk.module.load_state_dict(loaded[name][number])
            optimizer.load_state_dict(loaded[f"{name}_optimizer"])

    def _folder(self, iteration: int) -> Path:
        return self.directory / f"iter_{iteration:07d}"

    def _point_to(self, iteration: int) -> None:
        temporary = self.directory / f".{_LATEST}"
        temporary.write_text(f"{iteration}\n")
        os.replace(temporary, self.directory / _LATEST)

    def _prune(self, newest: int) -> None:
        complete = sorted(path for path in self.directory.glob("iter_*") if path.is_dir())
        for path in complete[: -self.keep]:
            if path != self._folder(newest):
                shutil.rmtree(path)


def _state(parts: Mapping[str, tuple[Any, Any]], iteration: int, loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    state: dict[str, Any] = {"iteration": iteration}
    for name, (chunks, optimizer) in parts.items():
        sharded = [chunk.module.sharded_state_dict(prefix=f"{name}.", metadata=metadata) for chunk in chunks]
        # Each chunk names its layers from its own first one here, and from the model's in the file.
        state[name] = [{k.removeprefix(f"{name}."): value for k, value in chunk.items()} for chunk in sharded]
        together = dict(enumerate(sharded))
        state[f"{name}_optimizer"] = optimizer.sharded_state_dict(together, is_loading=loading, metadata=metadata)
    return state


def _prefill_state(optimizer: Any) -> None:
    """Give torch's AdamW the state entries that Megatron expects to find before it loads into them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter].setdefault("step", torch.tensor(0.0))
                inner.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                inner.state[parameter].setdefault("exp_avg_sq", torch.zeros_like(parameter))
