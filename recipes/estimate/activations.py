"""Bytes that a forward and backward pass holds at its fullest, from the tensors that autograd keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.config import ParallelConfig, StageConfig
from prism_megatron.model.sizes import HFSizes

_VISUAL_FRACTION = 0.5
_LOGITS_CHUNK = 1 << 25  # logits that exist at a time, in float32 (model/logprobs.py)
_LOGITS_COPIES = 4
_PATCH_BYTES = 4  # pixels are float32 until the tower takes them


@dataclass(frozen=True)
class Load:
    """A pipeline's fullest micro-batch, before context parallelism cuts it, and how many are laid out for a step.

    ``imbalance`` is how many times their even share of tokens the fullest experts take.
    """

    tokens: float
    patches: float
    trained_tokens: float
    microbatches: int
    imbalance: float = 1.5


def full_load(config: StageConfig, sizes: HFSizes) -> Load:
    """What is assumed where nothing is known: full micro-batches, half of the tokens visual, one for each stage."""
    tokens, merge = config.max_tokens_per_microbatch, sizes.vision["spatial_merge_size"]
    visual = tokens * _VISUAL_FRACTION
    return Load(tokens, visual * merge**2, tokens - visual, config.parallel.pipeline_model_parallel_size)


def activation_bytes(
    config: StageConfig, sizes: HFSizes, freeze: Sequence[str], stage: int, layers: int, load: Load
) -> float:
    """On a rank of a pipeline stage with ``layers`` decoder layers, inputs included.

    Kept of every micro-batch in flight; then, whichever is more, the logits, or a layer's widest gradients and, where
    it is recomputed, the layer.
    """
    parallel, text = config.parallel, sizes.text
    width = 4 if config.model.precision == "fp32" else 2
    pp, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    held = min(pp - stage, load.microbatches)
    hidden: int = text["hidden_size"]
    tokens = load.tokens / parallel.context_parallel_size
    layer = width * tokens * layer_elements(sizes, parallel, load.imbalance)
    boundary = width * tokens * hidden / _sequence_shards(parallel)
    trained = "language_model" not in freeze
    kept: float = held * layers * (boundary if config.model.recompute else layer)
    working = width * tokens * _backward_elements(sizes, parallel, load.imbalance) + layer * config.model.recompute
    if stage == pp - 1:
        kept += 2 * boundary  # the last norm, and what is gathered of it
        logits = min(_LOGITS_CHUNK, load.trained_tokens * text["vocab_size"] / tp)
        weight = text["vocab_size"] / tp * hidden * trained
        working = max(working, 4 * _LOGITS_COPIES * logits + (4 + width) * weight)
    if stage == 0:
        kept += held * width * _vision_elements(sizes, freeze, load, tp)
        levels = 1 + len(sizes.vision["deepstack_visual_indexes"])
        kept += held * 2 * levels * boundary  # embedded tokens and DeepStack features, in their places
    pixels = _PATCH_BYTES * load.patches * _patch_dim(sizes) * load.microbatches
    return kept + working + pixels


def layer_elements(sizes: HFSizes, parallel: ParallelConfig, imbalance: float) -> float:
    """Kept per token by one decoder layer that is not recomputed."""
    text, tp, shards = sizes.text, parallel.tensor_model_parallel_size, _sequence_shards(parallel)
    hidden, heads, groups = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    queries, keys = heads * text["head_dim"], groups * text["head_dim"]
    # Two residuals and their norms; q, k, v, then normed, then turned; the output.
    attention: float = 4 * hidden / shards + (4 * queries + 5 * keys) / tp
    # Both halves before the activation; the activation, the half plus Megatron's offset of zero, their product.
    mlp: float = 5 * text["intermediate_size"] / tp
    if sizes.num_experts is not None:
        routed = text["num_experts_per_tok"] * imbalance / tp
        # Ranks that share an expert get each other's tokens, whole, and a part of the expert; weighted by the router.
        gathered = parallel.expert_tensor_parallel_size
        mlp = routed * (2 * hidden * gathered + 6 * text["moe_intermediate_size"])
    return attention + mlp


def _backward_elements(sizes: HFSizes, parallel: ParallelConfig, imbalance: float) -> float:
    """Gradients per token at the widest place of a layer: of both halves of the MLP, and of what came before them."""
    text, tp = sizes.text, parallel.tensor_model_parallel_size
    wide = 3 * text["intermediate_size"] / tp
    if sizes.num_experts is not None:
        wide = 3 * text["num_experts_per_tok"] * imbalance / tp * text["moe_intermediate_size"]
    elements: float = 2 * text["hidden_size"] + wide
    return elements


def vision_layer_elements(sizes: HFSizes, tp: int) -> float:
    """Kept per patch by one layer of the tower, which is cut by tensor parallelism only."""
    vision = sizes.vision
    # Two residuals and their norms; q, k, v, then q and k turned, v, the output; before and after the activation.
    elements: float = 4 * vision["hidden_size"] + (7 * vision["hidden_size"] + 2 * vision["intermediate_size"]) / tp
    return elements


def _vision_elements(sizes: HFSizes, freeze: Sequence[str], load: Load, tp: int) -> float:
    """Kept by the tower and its mergers."""
    vision = sizes.vision
    hidden, mergers = vision["hidden_size"], 1 + len(vision["deepstack_visual_indexes"])
    merger = mergers * (hidden + 2 * hidden / tp + vision["out_hidden_size"] / vision["spatial_merge_size"] ** 2)
    # Without a gradient a layer's tensors are gone when the next has run.
    layers = 0.0 if "vision" in freeze else vision["depth"] * vision_layer_elements(sizes, tp)
    return load.patches * (layers + (0.0 if {"vision", "merger"} <= set(freeze) else merger))


def _patch_dim(sizes: HFSizes) -> int:
    vision = sizes.vision
    patch: int = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return patch


def _sequence_shards(parallel: ParallelConfig) -> int:
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
