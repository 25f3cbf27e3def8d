"""Model sizes, read from an HF ``config.json``. Imports neither torch nor Megatron."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config import DiscriminatorConfig
from prism_megatron.errors import UserError
from prism_megatron.parallel.degrees import ModelDegrees

_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_EXPERT_KEYS = ("num_experts_per_tok", "moe_intermediate_size")
_VISION_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
)
# Defaults of transformers for keys that config.json leaves out.
_NORM_EPS = 1e-6
_DENSE_HEAD_DIM = 128
_ROPE_THETA, _MROPE_SECTION = 500_000.0, (24, 20, 20)
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
# Settings that the model's code has fixed, as all Qwen3-VL have them.
_FIXED: dict[str, dict[str, Any]] = {
    "text_config": {"hidden_act": "silu", "attention_bias": False},
    "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
}


@dataclass(frozen=True)
class Yarn:
    """YaRN settings, for texts longer than those of pre-training (arXiv 2309.00071).

    Frequencies with more than ``beta_fast`` turns within ``original_positions`` do not change, those with less than
    ``beta_slow`` turns are divided by ``factor``. Cosine and sine are multiplied by ``attention_factor``.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True)
class Rotary:
    """Rotary position settings of the language model; ``mrope_section`` is (time, height, width) in frequencies."""

    theta: float
    mrope_section: tuple[int, int, int]
    yarn: Yarn | None = None

    def rope_parameters(self) -> dict[str, Any]:
        """Return all settings under transformers' names, so that no reader needs its defaults."""
        written: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self.theta,
            "mrope_section": list(self.mrope_section),
            "mrope_interleaved": True,
        }
        if self.yarn is not None:
            written |= {
                "rope_type": "yarn",
                "factor": self.yarn.factor,
                "original_max_position_embeddings": self.yarn.original_positions,
                "attention_factor": self.yarn.attention_factor,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
                "truncate": self.yarn.truncate,
            }
        return written


@dataclass(frozen=True)
class HFSizes:
    """``text_config`` and ``vision_config`` of an HF Qwen3-VL ``config.json``."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tie_embeddings: bool

    @property
    def num_experts(self) -> int | None:
        """Number of experts per layer, None for a dense model."""
        return _num_experts(self.text)

    @property
    def rotary(self) -> Rotary:
        """Rotary settings of the language model."""
        return _rotary(self.text)

    def degrees(self, num_moe_experts: int | None = None) -> ModelDegrees:
        """Return the sizes that parallel degrees must divide; ``num_moe_experts`` is that of an upcycled model."""
        return ModelDegrees(
            num_layers=self.text["num_hidden_layers"],
            num_attention_heads=self.text["num_attention_heads"],
            num_query_groups=self.text["num_key_value_heads"],
            vision_heads=self.vision["num_heads"],
            num_moe_experts=num_moe_experts or self.num_experts,
            # The experts of an upcycled dense model are as wide as its MLP.
            moe_ffn_hidden_size=self.text.get("moe_intermediate_size", self.text["intermediate_size"]),
        )


def read_sizes(checkpoint_dir: Path) -> HFSizes:
    """Read ``config.json`` as transformers 4 or 5 writes it.

    Raises UserError if the directory is not a Qwen3-VL checkpoint, naming the key that is missing or cannot work.
    """
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint_dir} has no config.json; give the directory of an HF Qwen3-VL checkpoint")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; copy the checkpoint again")
    kind = config.get("model_type", "")
    if kind not in ("qwen3_vl", "qwen3_vl_moe"):
        raise UserError(f"{path} has model_type {kind!r}; this trainer needs qwen3_vl or qwen3_vl_moe")
    try:
        return _sizes(config, has_experts=kind == "qwen3_vl_moe")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sizes(config: Mapping[str, Any], has_experts: bool) -> HFSizes:
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name), dict):
            raise UserError(f"{name} is missing; copy the checkpoint's own config.json")
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    _check_integers("text_config", text, _TEXT_KEYS)
    _check_integers("vision_config", vision, _VISION_KEYS)
    if has_experts:
        _check_integers("text_config", text | {"num_experts": _num_experts(text)}, ("num_experts", *_EXPERT_KEYS))
    elif _num_experts(text) is not None:
        raise UserError("model_type is qwen3_vl but text_config has experts; a model with experts is a qwen3_vl_moe")
    if text.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"] if has_experts else _DENSE_HEAD_DIM
    text.setdefault("rms_norm_eps", _NORM_EPS)
    for name, part in (("text_config", text), ("vision_config", vision)):
        for key, value in _FIXED[name].items():
            if part.get(key, value) != value:
                raise UserError(f"{name}.{key} is {part[key]!r}; this trainer has only Qwen3-VL's {value!r}")
    _check_relations(text, vision)
    _rotary(text)
    return HFSizes(text, vision, _ties(config, text))


def _check_integers(name: str, part: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if (value := part.get(key)) is None:
            raise UserError(f"{name} has no {key}; copy the checkpoint's own config.json")
        if type(value) is not int or value < 1:
            raise UserError(f"{name}.{key} must be a positive whole number, got {value!r}")


def _check_relations(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Refuse sizes that do not fit together."""
    levels = vision.get("deepstack_visual_indexes")
    if not isinstance(levels, list) or not levels:
        raise UserError("vision_config has no deepstack_visual_indexes; Qwen3-VL has at least one level")
    if len(set(levels)) < len(levels) or not all(type(i) is int and 0 <= i < vision["depth"] for i in levels):
        raise UserError(
            f"vision_config.deepstack_visual_indexes {levels} must be different layers of the {vision['depth']} that "
            "the vision tower has, counted from 0"
        )
    if len(levels) > text["num_hidden_layers"]:
        raise UserError(f"{len(levels)} DeepStack levels need as many layers, not {text['num_hidden_layers']}")
    heads = ("text_config.num_attention_heads", text["num_attention_heads"])
    for (name, count), (by, divisor) in (
        (heads, ("num_key_value_heads", text["num_key_value_heads"])),
        (("vision_config.hidden_size", vision["hidden_size"]), ("4 * num_heads", 4 * vision["num_heads"])),
        (("text_config.head_dim", text["head_dim"]), ("2", 2)),
    ):
        if count % divisor:
            raise UserError(f"{name} ({count}) must be a multiple of {by} ({divisor})")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise UserError(
            f"vision_config.out_hidden_size ({vision['out_hidden_size']}) must be text_config.hidden_size "
            f"({text['hidden_size']})"
        )
    if math.isqrt(vision["num_position_embeddings"]) ** 2 != vision["num_position_embeddings"]:
        raise UserError(
            f"vision_config.num_position_embeddings ({vision['num_position_embeddings']}) must be a square number"
        )


def _num_experts(text: Mapping[str, Any]) -> Any:
    return text.get("num_experts", text.get("num_local_experts"))  # transformers 5 writes the second name


def _ties(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Return whether the output layer is tied to the embedding; transformers 5 writes it at the top level only."""
    ties = config.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings", False) if ties is None else ties)


def _rotary(text: Mapping[str, Any]) -> Rotary:
    """Read rotary settings of transformers 5 (rope_parameters) or 4 (rope_scaling and rope_theta)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(
            f"rope scaling of type {kind!r} is not supported: vLLM has no multimodal rotary embedding of it; "
            "use 'default' or 'yarn'"
        )
    if rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1)) not in (1, None):
        raise UserError("partial_rotary_factor must be 1; Qwen3-VL rotates all dimensions of a head")
    theta = _number("rope_theta", rope.get("rope_theta", text.get("rope_theta", _ROPE_THETA)))
    section = tuple(rope.get("mrope_section", _MROPE_SECTION))
    if len(section) != 3 or not all(type(n) is int and n > 0 for n in section):
        raise UserError(f"mrope_section must be three positive whole numbers, got {list(section)}")
    time, height, width = section
    yarn = _yarn(rope, text["max_position_embeddings"]) if kind == "yarn" else None
    return Rotary(theta, (time, height, width), yarn)


def _yarn(rope: Mapping[str, Any], max_positions: int) -> Yarn:
    factor = _number("factor of yarn rope scaling", rope.get("factor"))
    if factor < 1:
        raise UserError(f"factor of yarn rope scaling must be at least 1, got {factor}")
    original = rope.get("original_max_position_embeddings") or max_positions
    attention = rope.get("attention_factor")
    if attention is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        if not above or not below:
            above, below = 1.0, 0.0
        attention = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return Yarn(
        factor,
        int(_number("original_max_position_embeddings", original)),
        _number("attention_factor", attention),
        _number("beta_fast", rope.get("beta_fast") or _BETA_FAST),
        _number("beta_slow", rope.get("beta_slow") or _BETA_SLOW),
        bool(rope.get("truncate", True)),
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def check_num_experts(discriminator: DiscriminatorConfig, sizes: HFSizes) -> None:
    """Raise UserError if the discriminator's checkpoint has experts and the configuration has another number."""
    if sizes.num_experts not in (None, discriminator.num_experts):
        raise UserError(
            f"discriminator.hf_checkpoint has {sizes.num_experts} experts but discriminator.num_experts is "
            f"{discriminator.num_experts}; set discriminator.num_experts={sizes.num_experts}"
        )
