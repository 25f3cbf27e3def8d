"""Pages of documentation name files, modules, recipes and tests that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from recipes import STAGE_RECIPES
from recipes.pipeline import PIPELINES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")] if not page.name.startswith(("SPEC", "CHANGELOG"))
)
_PATH = re.compile(r"(?<![\w/.-])((?:prism_megatron|recipes|slurm|tools|tests)/[\w./*-]*[\w*])(?![\w/*-])")
_CODE = re.compile(r"`([a-z_]+/[a-z_]+\.py)`")
_MODULE = re.compile(r"-m ((?:prism_megatron|recipes|tools)[\w.]*)")
_RECIPE = re.compile(r"-m recipes\.(?:launch|train) ([a-z]\w+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    paths = [path for path in _PATH.findall(text) if not any(ROOT.glob(path))]
    if page.parent.name == "prism_megatron":
        paths += [path for path in _CODE.findall(text) if not any((r / path).exists() for r in (page.parent, ROOT))]
    modules = [name for name in _MODULE.findall(text) if not _found(name)]
    recipes = [name for name in _RECIPE.findall(text) if name not in {*STAGE_RECIPES, *PIPELINES}]
    assert (paths, modules, recipes) == ([], [], [])


def test_pages_name_something() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(_PATH.findall(text)) > 40
    assert len(_MODULE.findall(text)) > 20
    assert len(_RECIPE.findall(text)) > 3


def _found(module: str) -> bool:
    return importlib.util.find_spec(module.rstrip(".")) is not None
