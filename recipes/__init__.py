"""Recipes by name. A stage recipe is a function that returns a typed configuration; a pipeline is a list of steps."""

from __future__ import annotations

from collections.abc import Callable

from prism_megatron.config import StageConfig
from recipes import tiny

STAGE_RECIPES: dict[str, Callable[[], StageConfig]] = {
    "tiny_sft": tiny.tiny_sft,
    "tiny_collect": tiny.tiny_collect,
    "tiny_warmup": tiny.tiny_warmup,
    "tiny_align": tiny.tiny_align,
    "tiny_rlvr": tiny.tiny_rlvr,
}
