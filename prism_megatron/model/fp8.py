"""FP8 training: requirements on the GPU and on model sizes, and Megatron's settings.

Only the decoder's linear layers (attention, MLP, experts) multiply in FP8. These stay in BF16:

    vision tower     the largest has an MLP of width 4304, which two tensor-parallel ranks do not divide into multiples
                     of 16, and the number of patches of an image is a multiple of 4 only
    embedding        a look-up, without a product to speed up
    output layer     its rounding errors are errors of log-probabilities, ratios and KL; its tokens are not padded
    router           a rounded logit may send a token to another expert
    score heads      one column each; they are in float32, since scores are compared
    attention        rounding queries and keys loses more accuracy than the product saves time
"""

from __future__ import annotations

import importlib.util
from typing import Any

from prism_megatron.config import ModelConfig, ParallelConfig
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes

_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def check_hardware(model: ModelConfig) -> None:
    """Raise UserError if FP8 cannot run on this machine, or if a GPU has no Transformer Engine."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu and importlib.util.find_spec("transformer_engine") is None:
        raise UserError("layers on a GPU need Transformer Engine, which is not installed; run make setup-gpu")
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
    """Raise UserError, naming layer, size and remedy, if a rank's FP8 layers are not multiples of the block size.

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
    fp8, per_stage = model.fp8, text["num_hidden_layers"] // parallel.pipeline_model_parallel_size
    for name, count in (("first", fp8.first_layers_bf16), ("last", fp8.last_layers_bf16)):
        if count > per_stage:
            raise UserError(
                f"model.fp8.{name}_layers_bf16 ({count}) must be at most the {per_stage} layers of a pipeline stage"
            )


def token_alignment(model: ModelConfig) -> int:
    """Return what each rank's number of tokens must be a multiple of: FP8 products take whole blocks."""
    if model.precision != "fp8":
        return 1
    return 32 if model.fp8.recipe == "mxfp8" else 16


def megatron_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that switch the decoder to FP8."""
    if model.precision != "fp8":
        return {}
    fp8 = model.fp8
    # With a scale per block E4M3 has range enough for gradients, too; with one scale per tensor it has not.
    per_block = fp8.recipe in ("blockwise", "mxfp8")
    return {
        "fp8": "e4m3" if per_block else "hybrid",
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": bool(fp8.first_layers_bf16 or fp8.last_layers_bf16),
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }
