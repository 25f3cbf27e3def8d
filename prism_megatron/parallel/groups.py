"""Megatron's process groups, from one checked set of degrees."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel import cpu


@dataclass(frozen=True)
class ModelDegrees:
    """The sizes of a model that parallel degrees must divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    vision_heads: int
    num_moe_experts: int | None = None


def check_degrees(parallel: ParallelConfig, world_size: int, model: ModelDegrees) -> None:
    """Refuse degrees that cannot work, before anything is built. Raises ValueError."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    for name in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
        size = getattr(parallel, f"{name}_parallel_size")
        if size < 1:
            raise ValueError(f"parallel.{name}_parallel_size must be at least 1, got {size}")
    if pp > 1 or cp > 1:
        name = "pipeline_model_parallel_size" if pp > 1 else "context_parallel_size"
        raise ValueError(f"parallel.{name} ({max(pp, cp)}) is not supported yet; use 1 and tensor or data parallelism")
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"world size {world_size} is not a multiple of tensor ({tp}) x pipeline ({pp}) x context ({cp}) parallel "
            f"sizes; start a multiple of {tp * pp * cp} ranks or lower a degree"
        )
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups),
        ("vision num_heads", model.vision_heads),
    ):
        _check_divides(name, count, "tensor_model_parallel_size", tp)
    _check_divides("num_layers", model.num_layers, "pipeline_model_parallel_size", pp)
    if model.num_moe_experts is None:
        if ep > 1:
            raise ValueError(f"parallel.expert_model_parallel_size ({ep}) needs a mixture-of-experts model; use 1")
        return
    _check_divides("num_moe_experts", model.num_moe_experts, "expert_model_parallel_size", ep)
    if world_size % (parallel.expert_tensor_parallel_size * ep * pp):
        raise ValueError(
            f"world size {world_size} is not a multiple of expert tensor ({parallel.expert_tensor_parallel_size}) x "
            f"expert model ({ep}) parallel sizes; lower one of them"
        )


def _check_divides(name: str, count: int, degree_name: str, degree: int) -> None:
    if count % degree:
        largest = max(d for d in range(1, min(degree, count) + 1) if count % d == 0)
        raise ValueError(f"{name} ({count}) must be divisible by {degree_name} ({degree}); use {largest} or less")


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed (a lone process needs no launcher) and build Megatron's groups.

    Megatron's own random state is seeded per tensor-parallel rank. Call once per process.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(free_port())
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups, so that a rank that ends first does not break the others."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


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
