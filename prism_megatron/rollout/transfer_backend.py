"""Our backend of vLLM's weight transfer: tensors of this very process, one module of the engine rebuilt after another.

vLLM's life cycle has three calls: start, update (as often as there are chunks), finish with a version. A backend says
how the bytes arrive. Ours takes an iterator by reference, which is all that an engine inside the training ranks needs,
on CPU and GPU alike: no byte is sent twice. The processes of a child engine read theirs from ``transport.py``, which
brings the bytes through shared memory, a process group or memory of a GPU. That is instead of vLLM's own ``ipc`` and
``nccl`` backends: reload, checks and what follows a death are the same whatever the way.
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
class NothingToAgreeOn(WeightTransferInitInfo):
    """Both sides are one process."""


@dataclass
class NamedTensors(WeightTransferUpdateInfo):
    """HF names and whole tensors, each read once and not kept."""

    named: Iterator[tuple[str, Tensor]]


class SameProcessTransfer(WeightTransferEngine[NothingToAgreeOn, NamedTensors]):
    """Layerwise reload: once it has all its tensors, a module is cut and packed as when it was first loaded."""

    init_info_cls = NothingToAgreeOn
    update_info_cls = NamedTensors

    def init_transfer_engine(self, init_info: NothingToAgreeOn) -> None: ...

    def start_weight_update(self) -> None:
        if current_platform.is_cpu():
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which then waits for an accelerator that a CPU does not have."""
        if current_platform.is_cpu():
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: NamedTensors) -> None:
        try:
            self.model.load_weights(update_info.named)
        except BaseException:
            # Modules that got a part of their tensors would add those of the next update to it.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        pack_tied_output(self.model)

    def shutdown(self) -> None: ...


def pack_tied_output(model: Any) -> None:
    """Repeat the packing of an output layer that is tied to the embedding.

    It gets no weights of its own, so the reload leaves alone the copy that CPU kernels made of it: every logit would
    come from the weights of the first load.
    """
    embeddings = {id(m.weight) for m in model.modules() if type(m) is VocabParallelEmbedding}
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            pack_weight(module)


def _forget_packed_experts(model: Any) -> None:
    """Have experts packed again: vLLM packs for CPU kernels only where there is no kernel yet.

    Else the new weights would be copied unpacked into what the kernel takes for packed ones.
    """
    for module in model.modules():
        if expert_kernel(module) is not None:
            forget_expert_kernel(module)


def register() -> str:
    """Make the backend known to vLLM; its name."""
    register_transfer_backend("same_process", SameProcessTransfer)
    return "same_process"
