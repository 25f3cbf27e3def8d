"""Recipes by name. A stage recipe is a function that returns a typed configuration; a pipeline is a list of steps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection

from prism_megatron.config import StageConfig
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


def stage_recipe(name: str) -> Callable[[], StageConfig]:
    """Raises UserError for an unknown name, with the nearest ones that exist."""
    if name in STAGE_RECIPES:
        return STAGE_RECIPES[name]
    raise UserError(f"unknown recipe {name!r}; {nearest(name, STAGE_RECIPES)}")


def nearest(name: str, known: Collection[str]) -> str:
    """The names most like ``name``, else the first that have all of its words."""
    words = set(name.lower().split("_"))
    near = difflib.get_close_matches(name.lower(), known, n=3)
    near = near or [candidate for candidate in known if words <= set(candidate.split("_"))][:3]
    return f"there are {', '.join(near)}" if near else "--help lists them all"


def shape_of(name: str) -> tuple[int, int] | None:
    """Nodes and GPUs per node that a recipe's name asks for; None where any shape will do."""
    found = _SHAPE.search(name)
    return (int(found[1]), int(found[2])) if found else None
