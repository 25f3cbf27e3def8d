"""Recipes by name. A recipe is a function that returns the typed configuration of one stage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from prism_megatron.config import StageConfig, read_yaml
from prism_megatron.errors import UserError
from recipes import qwen3_vl, tiny

STAGE_RECIPES: dict[str, Callable[[], StageConfig]] = {
    "tiny_sft": tiny.tiny_sft,
    "tiny_collect": tiny.tiny_collect,
    "tiny_warmup": tiny.tiny_warmup,
    "tiny_align": tiny.tiny_align,
    "tiny_rlvr": tiny.tiny_rlvr,
    **qwen3_vl.RECIPES,
}
_SHAPE = re.compile(r"_(\d+)n(\d+)g_")


def is_config_file(name: str) -> bool:
    """Return whether a name is that of a configuration file, and not of a recipe."""
    return name.endswith((".yaml", ".yml"))


def stage_recipe(name: str) -> Callable[[], StageConfig]:
    """Return the function that makes the configuration of a recipe, or of a YAML file.

    Raises UserError for an unknown name, with the most similar ones.
    """
    if is_config_file(name):
        return partial(read_yaml, Path(name))
    if name in STAGE_RECIPES:
        return STAGE_RECIPES[name]
    raise UserError(f"unknown recipe {name!r}; {nearest(name, STAGE_RECIPES)}")


def nearest(name: str, known: Collection[str]) -> str:
    """Name the most similar of the known names, or the first that contain all of its words."""
    words = set(name.lower().split("_"))
    near = difflib.get_close_matches(name.lower(), known, n=3)
    near = near or [candidate for candidate in known if words <= set(candidate.split("_"))][:3]
    return f"there are {', '.join(near)}" if near else "--help lists them all"


def shape_of(name: str) -> tuple[int, int] | None:
    """Return nodes and GPUs per node from a recipe's name; None if the name does not give them."""
    found = _SHAPE.search(name)
    return (int(found[1]), int(found[2])) if found else None
