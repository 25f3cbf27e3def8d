"""Tiny models that differ from each other as the published ones do, and the suites that run on them.

No two agree on what only one of them would get right. ``test_covered_properties`` compares each suite's with the
published ``config.json`` files. Heads are 32, 64 or 128 wide: vLLM's attention on a CPU takes no others of that size,
and its experts are right only at widths that 32 divides.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_megatron.convert.hf_io import save_hf
from recipes.tiny_model import MOE_CONFIG, TEXT_CONFIG, VISION_CONFIG, VOCAB_SIZE, make_tiny_model

SUITES = (
    "tests/parity/test_layouts.py",
    "tests/parity/test_convert.py",
    "tests/parity/test_bridge.py",
    "tests/integration/test_resume.py",
    "tests/integration/test_algorithms.py",
    "tests/integration/test_hf_text.py",
)


@dataclass(frozen=True)
class Variant:
    """Sizes, in transformers' words, and how config.json is written: ``leave_out`` names keys of its text part."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    experts: bool = False
    transformers_4: bool = False
    leave_out: Sequence[str] = field(default_factory=tuple)


VARIANTS = {
    # An output layer of its own, a vocabulary that nothing divides, an odd depth, YaRN, three DeepStack levels at
    # uneven distances, patches of 14, visual tokens narrower than the language model.
    "untied": Variant(
        text={
            "hidden_size": 168,
            "intermediate_size": 200,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 401,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 20_000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 8.0,
            },
        },
        vision={
            "depth": 5,
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_heads": 2,
            "patch_size": 14,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2, 3],
        },
    ),
    # Experts, an output layer of its own, one DeepStack level; as transformers 4 wrote it, with rotary settings left
    # out that are at their defaults, which are for heads of 128.
    "experts": Variant(
        text={
            "hidden_size": 96,
            "intermediate_size": 112,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 432,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 100,
            "deepstack_visual_indexes": [2],
        },
        experts=True,
        transformers_4=True,
        leave_out=("rope_theta", "rope_scaling"),
    ),
    # The tiny model itself: a tied output layer, heads x head_dim = hidden, two DeepStack levels, an even depth; as
    # transformers 4 wrote it.
    "tied": Variant(text={}, vision={}, transformers_4=True),
}


def make_variant(name: str, out: Path, seed: int = 1) -> Path:
    """Write the checkpoint of a variant; returns its path."""
    variant = VARIANTS[name]
    sizes = {"text_config": variant.text, "vision_config": variant.vision}
    make_tiny_model(out, seed=seed, moe=variant.experts, overrides=sizes)
    path = out / "config.json"
    path.write_text(json.dumps(as_written(variant, json.loads(path.read_text())), indent=2))
    return out


def sizes_of(name: str) -> dict[str, Any]:
    """Sizes in a variant's ``config.json``, without making the model."""
    variant = VARIANTS[name]
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE} | (MOE_CONFIG if variant.experts else {}) | dict(variant.text)
    config = {"tie_word_embeddings": text["tie_word_embeddings"], "text_config": text}
    config["vision_config"] = VISION_CONFIG | {"out_hidden_size": text["hidden_size"]} | dict(variant.vision)
    return as_written(variant, copy.deepcopy(config))


def as_written(variant: Variant, config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 as the variant has it in its file."""
    if variant.transformers_4:
        _as_transformers_4(config)
    for key in variant.leave_out:
        config["text_config"].pop(key)
    return config


def _as_transformers_4(config: dict[str, Any]) -> None:
    """The names that transformers 4 had for the same settings."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    for part in (config, text, config["vision_config"]):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], template: Path, **options: Any) -> None:
    """Write a checkpoint directory of tensors in memory; ``options`` are those of :func:`save_hf`."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    save_hf(directory, shapes, tensors.items(), template, **options)
