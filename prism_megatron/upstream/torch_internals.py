"""Private and undocumented names of torch. Nothing else in this repository uses such a name.

Each entry says what it is for and what breaks without it. ``tests/unit/test_upstream.py`` compares ``CHECKED_ON`` with
the installed version, and each name with the signature that is used.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import api, filesystem, metadata, storage, utils
from torch.multiprocessing import reductions
from torch.utils import _device

CHECKED_ON = "2.13.0"

# A torch_dist checkpoint's `.metadata` is a pickle of these classes: if one moves, checkpoints on disk do not load.
Metadata = metadata.Metadata
MetadataIndex = metadata.MetadataIndex
StorageMeta = metadata.StorageMeta
TensorProperties = metadata.TensorProperties
BytesStorageMetadata = metadata.BytesStorageMetadata
ChunkStorageMetadata = metadata.ChunkStorageMetadata
TensorStorageMetadata = metadata.TensorStorageMetadata
StorageInfo = filesystem._StorageInfo  # file, offset and length of an item; pickled into `.metadata`, too
create_file_view = utils._create_file_view  # one item of a .distcp file; else torch.load reads the file to its end
CheckpointException = api.CheckpointException  # what a save or load on several ranks raises for a rank's failure
WriteResult = storage.WriteResult  # what a background save reports for an item; Megatron finishes the save from it

# The factories that `with torch.device(...)` recognises, cached at the first call: parallel/cpu.py calls it before it
# replaces torch.zeros and others. Without it vLLM on a CPU makes its tensors on the wrong device.
device_constructors = _device._device_constructors

# The CUDA IPC handle of a tensor, for rollout.transport=cuda_ipc. torch documents only queues that call it.
reduce_tensor = reductions.reduce_tensor


def unregistered_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A gloo or NCCL process group that is in none of torch's worlds; ``new_group`` knows only ranks of its own.

    For rollout.transport=collective. The constructors and ``_timeout`` are not documented: without them, weights
    travel through shared memory only.
    """
    if not torch.cuda.is_available():
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The dictionary of a module's own parameters, writable.

    ``register_parameter`` refuses vLLM's kernel tensors; without it rollout/weight_diff.py cannot restore them.
    """
    return module._parameters
