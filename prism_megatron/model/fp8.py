"""FP8 training: what it needs of the GPU and of the sizes, and Megatron's settings for it.

Only the decoder's linear layers (attention, MLP, experts) multiply in FP8. What stays in BF16, and why:

    vision tower     its large form has an MLP 4304 wide, which no longer divides by 16 over two tensor-parallel ranks,
                     and an image's patches come in fours
    embedding        a look-up; there is no product to speed up
    output layer     its errors are log-probability errors, which ratios and KL are made of, and it is never padded
    router           a rounded logit sends a token to another expert
    score heads      one column each; scores are compared, and float32 keeps ties apart
    attention        rounding queries and keys costs more accuracy than the product saves time
"""

from __future__ import annotations

import importlib.util
from typing import Any

from prism_megatron.config import ModelConfig, ParallelConfig
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes

_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def check_hardware(model: ModelConfig) -> None:
    """Refuse FP8 where it cannot run, and a GPU without its blocks, before anything is read. Raises UserError."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu and importlib.util.find_spec("transformer_engine") is None:
        raise UserError("on a GPU layers are made of Transformer Engine, which is not installed; run make setup-gpu")
    if model.precision != "fp8":
        return
    if not on_gpu:
        raise UserError("model.precision fp8 needs Transformer Engine on a GPU; use bf16 or fp32")
    needed, found = _CAPABILITY[model.fp8.recipe], torch.cuda.get_device_capability()
    if found < needed:
        raise UserError(
            f"model.fp8.recipe {model.fp8.recipe} needs compute capability {needed[0]}.{needed[1]}, this GPU has "
            f"{found[0]}.{found[1]}; use model.fp8.recipe=tensorwise (8.9) or model.precision=bf16"
        )


def check_sizes(model: ModelConfig, parallel: ParallelConfig, sizes: HFSizes, upcycled: bool = False) -> None:
    """Refuse a decoder whose FP8 layers do not divide on each rank. Raises UserError naming layer, size and remedy.

    ``upcycled`` is for a dense model that becomes the discriminator: its experts are as wide as its MLP.
    """
    if model.precision != "fp8":
        return
    text, multiple = sizes.text, token_alignment(model)
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    heads, grouped = (text[key] * text["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layers = [
        ("hidden_size of every layer", text["hidden_size"], 1),
        ("linear_qkv's output", heads + 2 * grouped, tp),
        ("linear_proj's input", heads, tp),
    ]
    if sizes.num_experts is not None:
        layers.append(("the experts' linear_fc2 input", text["moe_intermediate_size"], etp))
    elif upcycled:
        layers.append(("the experts' linear_fc2 input", text["intermediate_size"], etp))
    else:
        layers.append(("linear_fc2's input", text["intermediate_size"], tp))
    for name, size, degree in layers:
        if size % (degree * multiple):
            raise UserError(
                f"{name} ({size}, over {degree} tensor-parallel ranks) must be a multiple of {multiple} on each for "
                f"FP8 ({model.fp8.recipe}); lower the degree or use model.precision=bf16"
            )
    kept, per_stage = model.fp8, text["num_hidden_layers"] // parallel.pipeline_model_parallel_size
    for name, count in (("first", kept.first_layers_bf16), ("last", kept.last_layers_bf16)):
        if count > per_stage:
            raise UserError(
                f"model.fp8.{name}_layers_bf16 ({count}) must be at most the {per_stage} layers of a pipeline stage"
            )


def token_alignment(model: ModelConfig) -> int:
    """Of what the tokens of each rank must be a multiple: FP8 products take whole blocks of them."""
    if model.precision != "fp8":
        return 1
    return 32 if model.fp8.recipe == "mxfp8" else 16


def megatron_settings(model: ModelConfig) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that switch the decoder to FP8."""
    if model.precision != "fp8":
        return {}
    kept = model.fp8
    # Blocks have a scale each, which is range enough for gradients too; one scale for a tensor is not.
    per_block = kept.recipe in ("blockwise", "mxfp8")
    return {
        "fp8": "e4m3" if per_block else "hybrid",
        "fp8_recipe": kept.recipe,
        "first_last_layers_bf16": bool(kept.first_layers_bf16 or kept.last_layers_bf16),
        "num_layers_at_start_in_bf16": kept.first_layers_bf16,
        "num_layers_at_end_in_bf16": kept.last_layers_bf16,
    }
