"""Build a Megatron model on this rank from the sizes of an HF ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_megatron.config import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_megatron.model.discriminator import Discriminator
from prism_megatron.model.fp8 import megatron_settings
from prism_megatron.model.qwen3_vl import PipelinePosition, Qwen3VL, TextSizes
from prism_megatron.model.sizes import HFSizes
from prism_megatron.model.vision import VisionSizes
from prism_megatron.parallel import groups

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_FREEZABLE = {
    "vision": ("vision.patch_embed.", "vision.pos_embed.", "vision.layers."),
    "merger": ("vision.merger.", "vision.deepstack_mergers."),
    "language_model": ("embedding.", "decoder.", "output_layer."),
}


def build_policy(model: ModelConfig, parallel: ParallelConfig, sizes: HFSizes) -> list[Qwen3VL]:
    """Build this rank's chunks of the policy, not yet wrapped for training, with undefined weights."""
    moe = {}
    if sizes.num_experts is not None:
        moe = {
            "num_moe_experts": sizes.num_experts,
            "moe_ffn_hidden_size": sizes.text["moe_intermediate_size"],
            "moe_router_topk": sizes.text["num_experts_per_tok"],
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        }
    device = groups.device()
    text, vision = text_config(model, parallel, sizes, moe, device), vision_config(model, parallel, sizes, device)
    chunks = [
        Qwen3VL(text, vision, _text_sizes(sizes), _vision_sizes(sizes), position)
        for position in _pipeline_positions(parallel)
    ]
    return _on_device(chunks, model.freeze, device)


def build_discriminator(
    model: ModelConfig, parallel: ParallelConfig, discriminator: DiscriminatorConfig, sizes: HFSizes
) -> list[Discriminator]:
    """Build this rank's chunks of the discriminator, not yet wrapped for training, with undefined weights."""
    moe = {
        "num_moe_experts": discriminator.num_experts,
        "moe_ffn_hidden_size": sizes.text["intermediate_size"],
        "moe_router_topk": discriminator.topk,
        "moe_aux_loss_coeff": discriminator.load_balance_coeff,
    }
    device = groups.device()
    text, vision = text_config(model, parallel, sizes, moe, device), vision_config(model, parallel, sizes, device)
    dedicated = discriminator.experts == "dedicated"
    chunks = [
        Discriminator(text, vision, _text_sizes(sizes), _vision_sizes(sizes), position, dedicated)
        for position in _pipeline_positions(parallel)
    ]
    return _on_device(chunks, discriminator.freeze, device)


def _pipeline_positions(parallel: ParallelConfig) -> list[PipelinePosition]:
    """Return the positions of this rank's chunks in the pipeline."""
    rank, last = parallel_state.get_pipeline_model_parallel_rank(), parallel.pipeline_model_parallel_size - 1
    chunks = parallel.virtual_pipeline_model_parallel_size
    return [
        PipelinePosition(rank == chunk == 0, rank == last and chunk == chunks - 1, chunk if chunks > 1 else None)
        for chunk in range(chunks)
    ]


def text_config(
    model: ModelConfig, parallel: ParallelConfig, sizes: HFSizes, moe: dict[str, Any], device: torch.device
) -> TransformerConfig:
    """Build Megatron's configuration of the language model.

    Args:
        model: Precision, FP8 recipe and recomputation.
        parallel: Parallel degrees.
        sizes: Sizes from the HF ``config.json``.
        moe: Megatron's settings for the experts, empty for a dense model.
        device: The device that the model is built on.
    """
    text = sizes.text
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_attention_heads=text["num_attention_heads"],
        num_query_groups=text["num_key_value_heads"],
        kv_channels=text["head_dim"],
        ffn_hidden_size=text["intermediate_size"],
        layernorm_epsilon=text["rms_norm_eps"],
        init_method_std=text.get("initializer_range", 0.02),
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        # Megatron's MoE layer refuses tensor parallelism without sequence parallelism.
        sequence_parallel=tp > 1 and (parallel.sequence_parallel or bool(moe)),
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage or None,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage or None,
        # Micro-batches differ in length, and the stages' tensors in width (DeepStack levels).
        variable_seq_lengths=pp > 1,
        moe_token_dispatcher_type="alltoall",  # Megatron demands it for variable lengths, of dense models too
        # With two stages an interleaved schedule sends and receives between the same ranks; batched, these mix up.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        context_parallel_size=parallel.context_parallel_size,
        # A dense policy trains together with an expert-parallel discriminator, and has no experts to split.
        expert_model_parallel_size=parallel.expert_model_parallel_size if moe else 1,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        **_common(model, parallel, device),
        **megatron_settings(model),
        **moe,
        **({"moe_router_load_balancing_type": "none", "moe_grouped_gemm": device.type == "cuda"} if moe else {}),
    )


def vision_config(
    model: ModelConfig, parallel: ParallelConfig, sizes: HFSizes, device: torch.device
) -> TransformerConfig:
    """Build Megatron's configuration of the vision tower: dense layers with biases, on the first pipeline stage.

    Patches are replicated over the tensor- and context-parallel ranks.
    """
    vision = sizes.vision
    return TransformerConfig(
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        num_attention_heads=vision["num_heads"],
        kv_channels=vision["hidden_size"] // vision["num_heads"],
        ffn_hidden_size=vision["intermediate_size"],
        init_method_std=vision.get("initializer_range", 0.02),
        normalization="LayerNorm",
        sequence_parallel=False,
        **_common(model, parallel, device) | {"expert_model_parallel_size": 1},
    )


def _common(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    dtype = _PRECISIONS[model.precision]
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": device.type == "cpu",
        "perform_initialization": False,  # every weight comes from a checkpoint
        # Losses carry their own global normalisation, so gradients are summed over micro-batches and ranks.
        "calculate_per_token_loss": True,
        # These fused kernels need Apex or CUDA, and do not change the result.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
    }


def _text_sizes(sizes: HFSizes) -> TextSizes:
    return TextSizes(sizes.text["vocab_size"], sizes.rotary, sizes.tie_embeddings)


def _vision_sizes(sizes: HFSizes) -> VisionSizes:
    vision = sizes.vision
    return VisionSizes(
        depth=vision["depth"],
        patch_dim=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        merge_size=vision["spatial_merge_size"],
        out_hidden_size=vision["out_hidden_size"],
        num_position_embeddings=vision["num_position_embeddings"],
        deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
    )


def _on_device[Model: Qwen3VL](chunks: Sequence[Model], freeze: Iterable[str], device: torch.device) -> list[Model]:
    """Freeze the named parts of the model and move it to the GPU, if ``device`` is one."""
    frozen = tuple(prefix for part in freeze for prefix in _FREEZABLE[part])
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
    return [chunk.to(device) for chunk in chunks] if device.type == "cuda" else list(chunks)


def wrap_for_training(chunks: Sequence[Any], use_distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP, which sums gradients in float32 over the data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=use_distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        wrapped.append(DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=number > 0))
        wrapped[-1].broadcast_params()
    return wrapped
