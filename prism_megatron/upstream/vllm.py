"""Private and undocumented names of vLLM. Nothing else in this repository uses such a name; only rollout/ imports this.

Each entry says what it is for and what breaks without it. ``tests/unit/test_upstream.py`` compares ``CHECKED_ON`` with
the installed version, and each name with the signature that is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import platforms
from vllm.distributed.weight_transfer import base, factory
from vllm.model_executor import model_loader
from vllm.model_executor.layers import logits_processor, vocab_parallel_embedding
from vllm.model_executor.model_loader import base_loader, reload
from vllm.model_executor.model_loader.reload import layerwise, meta, sanitize
from vllm.v1.executor import uniproc_executor

CHECKED_ON = "0.32.0"

current_platform = platforms.current_platform  # CPU kernels pack weights, GPU kernels reorder experts

# A weight-transfer backend that takes tensors of this process (rollout/transfer_backend.py). vLLM's own backends send
# every byte once more.
WeightTransferEngine = base.WeightTransferEngine
WeightTransferInitInfo = base.WeightTransferInitInfo
WeightTransferUpdateInfo = base.WeightTransferUpdateInfo

# Reload module by module: without it an update needs memory for a second copy of all weights.
initialize_layerwise_reload = reload.initialize_layerwise_reload
finalize_layerwise_reload = reload.finalize_layerwise_reload

# What a parameter looked like at its first load and which loader fills it (rollout/weight_diff.py). Without them a
# failed comparison of trainer and engine cannot name the parameter.
get_layerwise_info = layerwise.get_layerwise_info
get_original_loader = layerwise._get_original_loader
materialize_meta_tensor = meta.materialize_meta_tensor
to_meta_tensor = meta.to_meta_tensor
restore_layer_refs = sanitize.restore_layer_refs

# Output layers: a tied one must be packed again after an update, or CPU kernels use the first weights for ever.
ParallelLMHead = vocab_parallel_embedding.ParallelLMHead
VocabParallelEmbedding = vocab_parallel_embedding.VocabParallelEmbedding

LogitsProcessor = logits_processor.LogitsProcessor  # its `scale` is the temperature; samplers scale after log-probs

# A load format that reads no weights, for directories converted to Megatron's format.
BaseModelLoader = base_loader.BaseModelLoader
register_model_loader = model_loader.register_model_loader


def register_transfer_backend(name: str, backend: type[Any]) -> None:
    """Register a weight-transfer backend unless it is registered: vLLM raises at the second engine of a process."""
    if name not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(name, backend)


def keep_process_groups_at_exit(llm: Any) -> None:
    """Leave process groups to the trainer: the finalizer of an in-process engine destroys them before it is done."""
    llm.llm_engine.engine_core._finalizer.atexit = False


@contextmanager
def rendezvous_at(init_method: str, rank: int, local_rank: int) -> Iterator[None]:
    """Have engines that start here meet at ``init_method``.

    vLLM's CPU backend takes the name of its shared memory from it: with its constant ``env://`` two runs on one host
    would share memory.
    """
    executor = uniproc_executor.ExecutorWithExternalLauncher
    original = executor._distributed_args
    executor._distributed_args = lambda _: (init_method, rank, local_rank)
    try:
        yield
    finally:
        executor._distributed_args = original


def engine_model(worker: Any) -> Any:
    """The model of a worker of ``collective_rpc``, to set its temperature and to compare its parameters."""
    return worker.model_runner.get_model()


def cache_block_tokens(llm: Any) -> int:
    """Number of tokens in a block of the prefix cache: a comparison of shorter prompts cannot detect a stale cache."""
    return int(llm.llm_engine.vllm_config.cache_config.block_size)


def expert_kernel(module: Any) -> Any:
    """The kernel of a module of experts, None of any other. It holds expert weights in an order of its own."""
    return getattr(getattr(module, "quant_method", None), "moe_kernel", None)


def forget_expert_kernel(module: Any) -> None:
    """Have experts packed again by the next update: vLLM packs only where there is no kernel yet (CPU)."""
    module.quant_method.moe_kernel = None


def pack_experts(module: Any) -> None:
    """Order a module's expert weights as its CPU kernel does, to compare them with the kernel's."""
    expert_kernel(module).fused_experts.process_weights_after_loading(module)


def pack_weight(module: Any) -> None:
    """Repeat what vLLM does to a module's weight after its first load; on a CPU it makes a packed copy."""
    module.quant_method.process_weights_after_loading(module)


def packed_product(module: Any) -> Any:
    """``f(inputs, weight, bias)`` of a CPU linear layer, which multiplies by its packed copy; None without one."""
    return getattr(module, "cpu_linear", None)
