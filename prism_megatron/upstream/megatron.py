"""Private and undocumented names of megatron-core. Nothing else in this repository uses such a name.

Each entry says what it is for and what breaks without it. ``tests/unit/test_upstream.py`` compares ``CHECKED_ON`` with
the installed version, and each name with the signature that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing import core, dict_utils, mapping, utils
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as rng
from megatron.core.transformer.moe import moe_utils, token_dispatcher

CHECKED_ON = "0.19.2"

# `metadata.json` of a converted checkpoint, which load() refuses to be without; save() writes it only with ranks.
CheckpointingConfig = core.CheckpointingConfig
save_config = core.save_config

CheckpointingException = core.CheckpointingException  # what load() raises for another model's checkpoint
AsyncCallsQueue = async_utils.AsyncCallsQueue  # runs background saves; without it a save blocks training

# Operations on sharded state dicts. Without them optimizer_state.py cannot separate saved state from this run's own.
merge = dict_utils.merge
dict_list_map_outplace = dict_utils.dict_list_map_outplace
LocalNonpersistentObject = mapping.LocalNonpersistentObject
extract_sharded_base = utils.extract_sharded_base

# Adds a loss to the backward pass of the routing probabilities. Without it the load-balancing loss has no gradient
# under pipeline parallelism and recomputation.
MoEAuxLossAutoScaler = moe_utils.MoEAuxLossAutoScaler


def set_results_queue(results: Any) -> None:
    """Make the next save's writer report to ``results``; None restores Megatron's queue.

    Megatron's own is a manager process, which a killed run leaves behind.
    """
    filesystem_async._results_queue = results


def wrap_first_dim_collectives(gather: Callable[..., Any], reduce_scatter: Callable[..., Any]) -> None:
    """Replace the tensor-parallel gather and reduce-scatter by what the arguments make of them.

    Gloo has none of unequal sizes, which experts split over tensor-parallel ranks need.
    """
    mappings._gather_along_first_dim = gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = reduce_scatter(mappings._reduce_scatter_along_first_dim)


def wrap_set_optimizer_states(wrap: Callable[..., Any]) -> None:
    """Replace how the distributed optimizer restores a parameter's state, which has no step for torch's AdamW."""
    optimizer = distrib_optimizer.DistributedOptimizer
    optimizer._set_main_param_and_optimizer_states = wrap(optimizer._set_main_param_and_optimizer_states)


def replace_cuda_functions(to_host: Any, get_rng_state: Any, set_rng_state: Any) -> None:
    """Replace functions that copy a tensor to the host and that read and set a GPU's random state.

    Without it the MoE token dispatcher and activation recomputation fail on a CPU.
    """
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host
    rng._get_cuda_rng_state, rng._set_cuda_rng_state = get_rng_state, set_rng_state
