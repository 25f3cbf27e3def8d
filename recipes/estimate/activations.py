"""Peak activation memory of a forward and backward pass, from the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.config import ParallelConfig, TrainingConfig
from prism_megatron.model.sizes import HFSizes

_VISUAL_FRACTION = 0.5
_LOGITS_CHUNK = 1 << 25  # logits that exist at a time, in float32 (model/logprobs.py)
_LOGITS_COPIES = 4
_PATCH_BYTES = 4  # pixels are float32 until the vision tower converts them


@dataclass(frozen=True)
class Load:
    """Largest micro-batch of a pipeline, before context parallelism splits it, and the micro-batches of a step.

    ``imbalance`` is the most loaded rank's number of expert tokens over the even share.
    """

    tokens: float
    patches: float
    trained_tokens: float
    microbatches: int
    imbalance: float = 1.5


def full_load(config: TrainingConfig, sizes: HFSizes) -> Load:
    """Return the assumed load: full micro-batches, half of the tokens visual, one per pipeline stage."""
    tokens, merge = config.max_tokens_per_microbatch, sizes.vision["spatial_merge_size"]
    visual = tokens * _VISUAL_FRACTION
    return Load(tokens, visual * merge**2, tokens - visual, config.parallel.pipeline_model_parallel_size)


def activation_bytes(
    config: TrainingConfig, sizes: HFSizes, freeze: Sequence[str], stage: int, layers: int, load: Load
) -> float:
    """Return the peak bytes on a rank of a pipeline stage, inputs included.

    The sum of the tensors that are saved for each micro-batch in flight and the larger of two peaks: the logits, or a
    layer's widest gradients and, if it is recomputed, the layer.

    Args:
        config: the stage; its layout, precision and recomputation.
        sizes: the model's.
        freeze: parts of the model without gradients.
        stage: index of the pipeline stage.
        layers: decoder layers of the pipeline stage.
        load: the micro-batches.
    """
    parallel, text = config.parallel, sizes.text
    width = 4 if config.model.precision == "fp32" else 2
    pp, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    in_flight = min(pp - stage, load.microbatches)
    hidden: int = text["hidden_size"]
    tokens = load.tokens / parallel.context_parallel_size
    layer = width * tokens * layer_elements(sizes, parallel, load.imbalance)
    boundary = width * tokens * hidden / _sequence_shards(parallel)
    trained = "language_model" not in freeze
    saved: float = in_flight * layers * (boundary if config.model.recompute else layer)
    working = width * tokens * _backward_elements(sizes, parallel, load.imbalance) + layer * config.model.recompute
    if stage == pp - 1:
        saved += 2 * boundary  # the last norm, and its gathered copy
        logits = min(_LOGITS_CHUNK, load.trained_tokens * text["vocab_size"] / tp)
        weight = text["vocab_size"] / tp * hidden * trained
        working = max(working, 4 * _LOGITS_COPIES * logits + (4 + width) * weight)
    if stage == 0:
        saved += in_flight * width * _vision_elements(sizes, freeze, load, tp)
        levels = 1 + len(sizes.vision["deepstack_visual_indexes"])
        saved += in_flight * 2 * levels * boundary  # embedded tokens and DeepStack features
    pixels = _PATCH_BYTES * load.patches * _patch_dim(sizes) * load.microbatches
    return saved + working + pixels


def layer_elements(sizes: HFSizes, parallel: ParallelConfig, imbalance: float) -> float:
    """Return the elements per token that one decoder layer saves if it is not recomputed."""
    text, tp, shards = sizes.text, parallel.tensor_model_parallel_size, _sequence_shards(parallel)
    hidden, heads, groups = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    queries, keys = heads * text["head_dim"], groups * text["head_dim"]
    # Two residuals and their norms; q, k, v, then normalized, then rotated; the output.
    attention: float = 4 * hidden / shards + (4 * queries + 5 * keys) / tp
    # Gate and up projection; the activation, the up projection plus Megatron's offset of zero, their product.
    mlp: float = 5 * text["intermediate_size"] / tp
    if sizes.num_experts is not None:
        routed = text["num_experts_per_tok"] * imbalance / tp
        # Ranks that share an expert gather each other's tokens and have a shard of the expert; weighted by the router.
        gathered = parallel.expert_tensor_parallel_size
        mlp = routed * (2 * hidden * gathered + 6 * text["moe_intermediate_size"])
    return attention + mlp


def _backward_elements(sizes: HFSizes, parallel: ParallelConfig, imbalance: float) -> float:
    """Return the gradients per token at the widest point of a layer: gate, up projection and their input."""
    text, tp = sizes.text, parallel.tensor_model_parallel_size
    wide = 3 * text["intermediate_size"] / tp
    if sizes.num_experts is not None:
        wide = 3 * text["num_experts_per_tok"] * imbalance / tp * text["moe_intermediate_size"]
    elements: float = 2 * text["hidden_size"] + wide
    return elements


def vision_layer_elements(sizes: HFSizes, tp: int) -> float:
    """Return the elements per patch that a vision layer saves; only tensor parallelism shards it."""
    vision = sizes.vision
    # Two residuals and their norms; q, k, v, then q and k rotated, v, the output; before and after the activation.
    elements: float = 4 * vision["hidden_size"] + (7 * vision["hidden_size"] + 2 * vision["intermediate_size"]) / tp
    return elements


def _vision_elements(sizes: HFSizes, freeze: Sequence[str], load: Load, tp: int) -> float:
    """Return the elements that the vision tower and its mergers save."""
    vision = sizes.vision
    hidden, mergers = vision["hidden_size"], 1 + len(vision["deepstack_visual_indexes"])
    merger = mergers * (hidden + 2 * hidden / tp + vision["out_hidden_size"] / vision["spatial_merge_size"] ** 2)
    # Without gradients a layer's tensors are freed when the next layer has run.
    layers = 0.0 if "vision" in freeze else vision["depth"] * vision_layer_elements(sizes, tp)
    return load.patches * (layers + (0.0 if {"vision", "merger"} <= set(freeze) else merger))


def _patch_dim(sizes: HFSizes) -> int:
    vision = sizes.vision
    patch: int = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return patch


def _sequence_shards(parallel: ParallelConfig) -> int:
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
