"""Start and end of Megatron's process groups, and facts about this rank."""

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

_MARK = "PRISM_SINGLE_PROCESS"  # the names that initialize() put in the environment
_SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed (a single process needs no launcher) and build Megatron's process groups.

    Seeds Megatron's random states for each tensor-parallel rank. Call once per process.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        where: dict[str, Any] = {}
        if "RANK" not in os.environ:
            store, address = open_rendezvous()
            where = {"store": store, "rank": 0, "world_size": 1}
            variables = _SINGLE_PROCESS | address  # as a launcher sets them; vLLM reads them
            os.environ.update(variables, **{_MARK: ",".join(variables)})
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), **where)
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Destroy the process groups after all ranks have arrived, so that none loses its peers."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    for name in filter(None, os.environ.pop(_MARK, "").split(",")):  # or child processes would try to join the group
        os.environ.pop(name, None)


def data_parallel_rank() -> int:
    """Return this rank's data-parallel rank."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_parallel_size() -> int:
    """Return the number of data-parallel ranks."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def is_main_rank() -> bool:
    """Return whether this is rank 0, which writes files and prints."""
    return dist.get_rank() == 0


def is_first_of_replica() -> bool:
    """Return whether this rank is the first of the ranks that share one copy of the model and its rows."""
    from megatron.core import parallel_state

    model_parallel_rank = dist.get_rank(parallel_state.get_model_parallel_group())
    return bool(model_parallel_rank == 0 and parallel_state.get_context_parallel_rank() == 0)


def device() -> torch.device:
    """Return this rank's GPU, or the CPU without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def worker_thread() -> ThreadPoolExecutor:
    """Start one thread that uses the caller's device and CUDA stream; a new thread's default is device 0."""
    if torch.cuda.is_available():
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(torch.cuda.current_stream(),))
    return ThreadPoolExecutor(1)
