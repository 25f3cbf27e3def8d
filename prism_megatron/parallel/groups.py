"""Megatron's process groups, from one checked set of degrees."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from prism_megatron.config import ParallelConfig
from prism_megatron.errors import UserError
from prism_megatron.parallel import cpu

_LONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}  # what a launcher would say
_set_here: list[str] = []


@dataclass(frozen=True)
class ModelDegrees:
    """The sizes of a model that parallel degrees must divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    vision_heads: int
    vocab_size: int
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int = 0


def check_degrees(parallel: ParallelConfig, world_size: int, model: ModelDegrees) -> None:
    """Refuse degrees that cannot work, before anything is built. Raises UserError."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    for name, size in vars(parallel).items():
        if name.endswith("_parallel_size") and size < 1:
            raise UserError(f"parallel.{name} must be at least 1, got {size}")
    if world_size % (tp * pp * cp):
        raise UserError(
            f"world size {world_size} is not a multiple of tensor ({tp}) x pipeline ({pp}) x context ({cp}) parallel "
            f"sizes; start a multiple of {tp * pp * cp} ranks or lower a degree"
        )
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups),
        ("vision num_heads", model.vision_heads),
        ("vocab_size", model.vocab_size),
    ):
        _check_divides(name, count, "tensor_model_parallel_size", tp)
    _check_layer_split(parallel, model.num_layers)
    if model.num_moe_experts is None:
        if ep > 1:
            raise UserError(f"parallel.expert_model_parallel_size ({ep}) needs a mixture-of-experts model; use 1")
        return
    _check_divides("num_moe_experts", model.num_moe_experts, "expert_model_parallel_size", ep)
    etp = parallel.expert_tensor_parallel_size
    _check_divides("moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor_parallel_size", etp)
    if world_size % (etp * ep * pp):
        raise UserError(
            f"world size {world_size} is not a multiple of expert tensor ({etp}) x expert model ({ep}) x pipeline "
            f"({pp}) parallel sizes; lower one of them"
        )


def _check_layer_split(parallel: ParallelConfig, num_layers: int) -> None:
    """Refuse a split of the decoder that leaves a stage without layers or cannot be even."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1 and (vpp > 1 or first or last):
        raise UserError(
            f"virtual_pipeline_model_parallel_size ({vpp}) and num_layers_in_first/last_pipeline_stage ({first}, "
            f"{last}) need pipeline_model_parallel_size above 1; leave them at 1 and 0"
        )
    middle_stages, middle_layers = pp - bool(first) - bool(last), num_layers - first - last
    if middle_layers < middle_stages or (middle_layers and not middle_stages) or min(first, last) < 0:
        raise UserError(
            f"num_layers ({num_layers}) minus num_layers_in_first_pipeline_stage ({first}) and "
            f"num_layers_in_last_pipeline_stage ({last}) leaves {middle_layers} for {middle_stages} other stages; "
            "each needs at least one and every layer a stage"
        )
    if middle_stages and middle_layers % middle_stages:
        if not first and not last:
            _check_divides("num_layers", num_layers, "pipeline_model_parallel_size", pp)
        raise UserError(
            f"{middle_layers} layers do not divide over {middle_stages} middle pipeline stages; "
            f"move {middle_layers % middle_stages} of them to the first or last stage"
        )
    per_stage = {count for count in (first, last, middle_layers // middle_stages if middle_stages else 0) if count}
    for count in sorted(per_stage):
        _check_divides("layers of a pipeline stage", count, "virtual_pipeline_model_parallel_size", vpp)


def _check_divides(name: str, count: int, degree_name: str, degree: int) -> None:
    if count % degree:
        largest = max(d for d in range(1, min(degree, count) + 1) if count % d == 0)
        raise UserError(f"{name} ({count}) must be divisible by {degree_name} ({degree}); use {largest} or less")


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed (a lone process needs no launcher) and build Megatron's groups.

    Megatron's own random state is seeded per tensor-parallel rank. Call once per process.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        if "RANK" not in os.environ:
            lone = _LONE | {"MASTER_PORT": str(free_port())}
            os.environ.update(lone)
            _set_here.extend(lone)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_or_none(parallel.virtual_pipeline_model_parallel_size),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def check_engine_ranks(data_parallel_ranks: Sequence[int], engine_size: int) -> None:
    """Refuse a tensor-parallel engine that cannot lie over the training ranks. Raises UserError.

    The engine is cut over ``engine_size`` neighbouring ranks, which make the same requests: those of one data-parallel
    rank, given here for every rank in order.
    """
    world_size = len(data_parallel_ranks)
    if world_size % engine_size:
        raise UserError(
            f"world size {world_size} is not a multiple of rollout.tensor_model_parallel_size ({engine_size}); use a "
            "divisor"
        )
    for first in range(0, world_size, engine_size):
        found = sorted(set(data_parallel_ranks[first : first + engine_size]))
        if len(found) > 1:
            raise UserError(
                f"rollout.tensor_model_parallel_size ({engine_size}) would cut one engine over ranks {first} to "
                f"{first + engine_size - 1}, which have different rows (data-parallel ranks {found}); use "
                "parallel.tensor_model_parallel_size or a divisor of it"
            )


def _or_none(virtual_size: int) -> int | None:
    """Megatron says None where there are no virtual stages."""
    return virtual_size if virtual_size > 1 else None


def shutdown() -> None:
    """Leave the process groups, so that a rank that ends first does not break the others."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    while _set_here:  # or a process that this one starts would look for the others of its world
        os.environ.pop(_set_here.pop(), None)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_parallel_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_parallel_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def is_main_rank() -> bool:
    """The one rank that writes files and prints."""
    return dist.get_rank() == 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def worker_thread() -> ThreadPoolExecutor:
    """One thread that works on the caller's device, in its stream: CUDA's are per thread and begin with device 0's."""
    if torch.cuda.is_available():
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(torch.cuda.current_stream(),))
    return ThreadPoolExecutor(1)
