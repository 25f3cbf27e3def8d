"""Loading of initial weights, from an HF directory or a converted one, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from torch.distributed.checkpoint import CheckpointException

from prism_megatron.convert.hf_io import HFWeights
from prism_megatron.convert.manifest import MANIFEST, first_fault, is_converted
from prism_megatron.convert.rules import Rule
from prism_megatron.convert.transfer import load_weights, unwrap
from prism_megatron.errors import SharedError, UserError
from prism_megatron.upstream.megatron import CheckpointingException


def load_checkpoint(model: Any, table: Sequence[Rule], directory: Path, part: str) -> None:
    """Load a module, or a list of virtual pipeline chunks, from an HF directory or a converted one."""
    if is_converted(directory):
        load_megatron(model, directory, part)
        return
    with HFWeights(directory) as weights:
        load_weights(model, table, weights)


def load_megatron(model: Any, directory: Path, part: str) -> None:
    """Load a module, or a list of virtual pipeline chunks, from a directory that ``tools/convert.py`` wrote.

    ``part`` is policy or discriminator. Raises UserError if a file does not have its checksum or the model differs.
    """
    if fault := first_common_fault(directory):
        raise SharedError(f"{directory}: {fault}; convert it again")
    state = sharded_weights(model, f"{part}.")
    for chunk in state.values():
        # Transformer Engine's extra state, which converted checkpoints do not have.
        for name in [name for name, value in chunk.items() if isinstance(value, ShardedObject)]:
            del chunk[name]
    strict = dist_checkpointing.validation.StrictHandling.RAISE_ALL
    try:
        loaded = dist_checkpointing.load(state, str(directory), strict=strict)
    except (CheckpointingException, CheckpointException) as error:
        raise UserError(
            f"{directory} is of another model than its config.json: {str(error).splitlines()[0][:300]}"
        ) from error
    load_weights_of(model, loaded)


def sharded_weights(model: Any, prefix: str) -> dict[str, Any]:
    """Return Megatron's sharded state dict of each chunk as ``model0``, ``model1``, ...; keys begin with ``prefix``."""
    chunks = model if isinstance(model, list | tuple) else [model]
    state = {}
    for number, chunk in enumerate(chunks):
        inner: Any = unwrap(chunk)
        sharded = inner.sharded_state_dict(prefix=prefix, metadata=content_metadata())
        state[f"model{number}"] = {name.removeprefix(prefix): value for name, value in sharded.items()}
    return state


def load_weights_of(model: Any, loaded: dict[str, Any]) -> None:
    """Copy a loaded state of :func:`sharded_weights` into the model."""
    for number, chunk in enumerate(model if isinstance(model, list | tuple) else [model]):
        inner: Any = unwrap(chunk)
        missing, unexpected = inner.load_state_dict(loaded[f"model{number}"], strict=False)
        left = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        assert not left, left
        inner.clear_padding()  # rows that checkpoints of other degrees lack


def content_metadata() -> dict[str, Any]:
    """Return Megatron's settings of a layout-independent optimizer state."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def check_manifest(directory: Path) -> None:
    """Raise SharedError if a directory with a manifest differs from it. Collective."""
    if (directory / MANIFEST).is_file() and (fault := first_common_fault(directory)):
        raise SharedError(
            f"{directory}: {fault}; make or copy the directory again (or remove its {MANIFEST}, if it was changed on "
            "purpose)"
        )


def first_common_fault(directory: Path) -> str | None:
    """Return :func:`first_fault` on all ranks, each of which verifies a share of the files. Collective."""
    if not dist.is_initialized():
        return first_fault(directory)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, first_fault(directory, dist.get_rank(), dist.get_world_size()))
    return next((fault for fault in faults if fault), None)
