"""Megatron's process groups, from one checked set of degrees (``degrees.py``)."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel import cpu
from prism_megatron.parallel.rendezvous import open_rendezvous

_LONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what a launcher would say
_set_here: list[str] = []


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed (a lone process needs no launcher) and build Megatron's groups.

    Megatron's own random state is seeded per tensor-parallel rank. Call once per process.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        where: dict[str, Any] = {}
        if "RANK" not in os.environ:
            store, meeting = open_rendezvous()
            where = {"store": store, "rank": 0, "world_size": 1}
            lone = _LONE | meeting
            os.environ.update(lone)
            _set_here.extend(lone)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), **where)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_or_none(parallel.virtual_pipeline_model_parallel_size),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


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


def data_parallel_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_parallel_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def is_main_rank() -> bool:
    """The one rank that writes files and prints."""
    return dist.get_rank() == 0


def is_first_of_replica() -> bool:
    """Whether this rank is the first of those that hold one copy of the model and see the same rows."""
    from megatron.core import parallel_state

    model_parallel_rank = dist.get_rank(parallel_state.get_model_parallel_group())
    return bool(model_parallel_rank == 0 and parallel_state.get_context_parallel_rank() == 0)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def worker_thread() -> ThreadPoolExecutor:
    """One thread that works on the caller's device, in its stream: CUDA's are per thread and begin with device 0's."""
    if torch.cuda.is_available():
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(torch.cuda.current_stream(),))
    return ThreadPoolExecutor(1)
