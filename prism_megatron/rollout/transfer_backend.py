"""Weight-transfer backend of vLLM for tensors of the same process, reloading one module after another.

vLLM's protocol has three calls: start, update (once per chunk of weights), and finish with a version. A backend decides
how the bytes arrive. This one takes an iterator over tensors, so an engine inside the training ranks copies no byte
twice, on CPU and GPU. Subprocesses of an engine receive tensors through ``transport.py``: shared memory, a process
group or CUDA IPC. It replaces vLLM's ``ipc`` and ``nccl`` backends, so that reload, checks and restarts do not depend
on the transport.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prism_megatron.upstream.vllm import (
    ParallelLMHead,
    VocabParallelEmbedding,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    current_platform,
    expert_kernel,
    finalize_layerwise_reload,
    forget_expert_kernel,
    initialize_layerwise_reload,
    pack_weight,
    register_transfer_backend,
)


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """No connection is needed: sender and receiver are one process."""


@dataclass
class NamedTensors(WeightTransferUpdateInfo):
    """HF names and full tensors, each read once and not stored."""

    named: Iterator[tuple[str, Tensor]]


class SameProcessTransfer(WeightTransferEngine[NoInitInfo, NamedTensors]):
    """Layerwise reload: a module with all its tensors is sharded and packed as in its first load."""

    init_info_cls = NoInitInfo
    update_info_cls = NamedTensors

    def init_transfer_engine(self, init_info: NoInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk of weights. The base class synchronises an accelerator afterwards, which a CPU lacks."""
        if current_platform.is_cpu():
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: NamedTensors) -> None:
        try:
            self.model.load_weights(update_info.named)
        except BaseException:
            # A module with part of its tensors would add those of the next update to them.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        pack_tied_output(self.model)

    def shutdown(self) -> None: ...


def pack_tied_output(model: Any) -> None:
    """Pack an output layer that is tied to the embedding again.

    It receives no weights, so the reload does not update the packed copy of CPU kernels: all logits would come from the
    weights of the first load.
    """
    embeddings = {id(m.weight) for m in model.modules() if type(m) is VocabParallelEmbedding}
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            pack_weight(module)


def _forget_packed_experts(model: Any) -> None:
    """Drop the CPU kernels of experts, since vLLM packs experts only for a new kernel.

    Otherwise the update would copy unpacked weights into the kernel's packed ones.
    """
    for module in model.modules():
        if expert_kernel(module) is not None:
            forget_expert_kernel(module)


def register() -> str:
    """Register the backend with vLLM; returns its name."""
    register_transfer_backend("same_process", SameProcessTransfer)
    return "same_process"
