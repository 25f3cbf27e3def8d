"""Make a tiny random Qwen3-VL with tokenizer and processor, for a CPU.

    python -m recipes.tiny_model --out runs/tiny/base

AutoProcessor, AutoModelForImageTextToText and vLLM load it like a released checkpoint. The geometry (patch 16, merge 2,
interleaved M-RoPE, DeepStack, tied embeddings) is Qwen3-VL's; all head counts are even.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.data.response import SYSTEM_PROMPT
from prism_megatron.data.shapes import sample_texts
from prism_megatron.errors import UserError
from prism_megatron.files import directory_written_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Tokenizer, Qwen3VLProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 400  # before padding to VOCAB_MULTIPLE, special tokens included
VOCAB_MULTIPLE = 16  # divisible by every tensor-parallel degree in the tests
CORPUS_QUESTIONS = 400

PATCH, MERGE, TEMPORAL_PATCH = 16, 2, 2
MIN_PIXELS, MAX_PIXELS = 32 * 32, 256 * 256  # the task's images are not resized

# The task's images are mostly paper: normalized by its brightness, paper is near zero and objects are not.
IMAGE_MEAN, IMAGE_STD = 0.94, 0.25

TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": True,
}
MOE_CONFIG: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": TEMPORAL_PATCH,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}

# The embedding is tied to the output layer, where a std of 1 would make the initial predictions far too confident.
TOKEN_STD, POSITION_STD = 0.3, 0.5

# Qwen3-VL's ChatML: an image or a video is one pad token between its markers, which the processor expands;
# add_generation_prompt opens the assistant's turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def make_tiny_model(
    out: str | Path, seed: int = 0, moe: bool = False, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Write a tiny checkpoint folder and return its path.

    ``overrides`` changes sizes: ``{"text_config": {...}, "vision_config": {...}}`` with Hugging Face's keys.

    Raises:
        UserError: an override that the configuration does not know.
    """
    import torch
    from transformers import (
        GenerationConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
    )
    from transformers.utils.logging import disable_progress_bar

    out = Path(out)
    tokenizer = _tokenizer(sample_texts(CORPUS_QUESTIONS))
    config = _config(tokenizer, moe, overrides or {})
    processor = _processor(tokenizer, config.vision_config)
    torch.manual_seed(seed)
    model_class = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    model: PreTrainedModel = model_class(config).float()
    init_weights(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    disable_progress_bar()
    with directory_written_atomically(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return out


def init_weights(model: PreTrainedModel) -> None:
    """Initialize matrices with standard deviation 1/sqrt(fan in), and embeddings with their own constants.

    Hugging Face's fixed 0.02 suits a width of a thousand. At width 128 it shrinks the image's signal layer by layer,
    and a model trained from scratch learns the form of captions long before it uses the image.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed.weight"):
            std = POSITION_STD
        elif name.endswith("embed_tokens.weight"):
            std = TOKEN_STD
        elif parameter.dim() < 2:
            continue
        elif ".experts." in name:  # stacked [experts, out, in]
            std = 1.0 / math.sqrt(parameter.shape[2])
        else:
            std = 1.0 / math.sqrt(parameter[0].numel())
        parameter.data.normal_(0.0, std)


def _tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen's pre-tokenizer, so that block boundaries tokenize like a released model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    shell = Tokenizer(models.BPE())
    shell.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    shell.decoder = decoders.ByteLevel()
    text = [*corpus, SYSTEM_PROMPT, *["system\nuser\nassistant\n"] * 100]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shell.train_from_iterator(text, trainer)
    trained = json.loads(shell.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _processor(tokenizer: Qwen2Tokenizer, vision: PreTrainedConfig) -> Qwen3VLProcessor:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    geometry = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **geometry),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, **geometry),
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: Qwen2Tokenizer, moe: bool, overrides: Mapping[str, Mapping[str, Any]]) -> PreTrainedConfig:
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    config_class = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        **TEXT_CONFIG,
        **(MOE_CONFIG if moe else {}),
        "vocab_size": math.ceil(len(tokenizer) / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    parts = {"text_config": text, "vision_config": dict(VISION_CONFIG)}
    for part, values in overrides.items():
        if part not in parts:
            raise UserError(f"unknown section {part!r} in the overrides; use {' or '.join(parts)}")
        known = {*config_class.sub_configs[part]().to_dict(), *parts[part]}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"unknown key(s) {unknown} in the overrides' {part}; known: {sorted(known)}")
        parts[part].update(values)
    # The merger's output has the language model's width.
    parts["vision_config"]["out_hidden_size"] = parts["text_config"]["hidden_size"]
    config = config_class(
        **parts,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=parts["text_config"]["tie_word_embeddings"],
    )
    config.dtype = torch.float32
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write (replaced if it exists)")
    parser.add_argument("--config", type=Path, help='JSON of sizes: {"text_config": {...}, "vision_config": {...}}')
    parser.add_argument("--moe", action="store_true", help="mixture-of-experts language model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    overrides = json.loads(args.config.read_text()) if args.config else None
    out = make_tiny_model(args.out, seed=args.seed, moe=args.moe, overrides=overrides)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
