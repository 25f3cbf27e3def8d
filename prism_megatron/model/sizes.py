"""The sizes of a model, read from an HF ``config.json``, never listed. Imports neither torch nor Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config import DiscriminatorConfig
from prism_megatron.errors import UserError
from prism_megatron.parallel.degrees import ModelDegrees


@dataclass(frozen=True)
class HFSizes:
    """The two halves of an HF Qwen3-VL ``config.json``."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tie_embeddings: bool

    @property
    def num_experts(self) -> int | None:
        # transformers 5 writes the second name.
        return self.text.get("num_experts", self.text.get("num_local_experts"))

    def degrees(self, num_moe_experts: int | None = None) -> ModelDegrees:
        return ModelDegrees(
            num_layers=self.text["num_hidden_layers"],
            num_attention_heads=self.text["num_attention_heads"],
            num_query_groups=self.text["num_key_value_heads"],
            vision_heads=self.vision["num_heads"],
            vocab_size=self.text["vocab_size"],
            num_moe_experts=num_moe_experts or self.num_experts,
            # A dense model that is about to be upcycled has experts of its own width.
            moe_ffn_hidden_size=self.text.get("moe_intermediate_size", self.text["intermediate_size"]),
        )


def read_sizes(checkpoint_dir: Path) -> HFSizes:
    """Read ``config.json``. Raises UserError if the directory is not a Qwen3-VL checkpoint."""
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint_dir} has no config.json; give the directory of an HF Qwen3-VL checkpoint")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from error
    kind = config.get("model_type", "")
    if kind not in ("qwen3_vl", "qwen3_vl_moe"):
        raise UserError(f"{path} has model_type {kind!r}; this trainer needs qwen3_vl or qwen3_vl_moe")
    text, vision = config["text_config"], config["vision_config"]
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return HFSizes(text, vision, bool(tie))


def check_discriminator(discriminator: DiscriminatorConfig, sizes: HFSizes) -> None:
    """Raises UserError for an expert layout that cannot be built."""
    experts, topk = discriminator.num_experts, discriminator.topk
    if sizes.num_experts is not None and sizes.num_experts != experts:
        raise UserError(
            f"discriminator.hf_checkpoint has {sizes.num_experts} experts but discriminator.num_experts is {experts}"
        )
    if discriminator.experts not in ("dedicated", "shared"):
        raise UserError(f"discriminator.experts must be dedicated or shared, got {discriminator.experts!r}")
    pool = experts // 2 if discriminator.experts == "dedicated" else experts
    if discriminator.experts == "dedicated" and experts % 2:
        raise UserError(f"discriminator.num_experts ({experts}) must be even for dedicated experts")
    if topk > pool:
        raise UserError(
            f"discriminator.topk ({topk}) is more than the {pool} experts a token may use; "
            "raise discriminator.num_experts"
        )
