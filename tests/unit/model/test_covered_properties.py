"""Properties in which published models differ are covered by the tiny models that every suite runs on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import SUITES, VARIANTS, sizes_of

ROOT = Path(__file__).parents[3]
PUBLISHED = sorted((ROOT / "recipes" / "published").glob("*.json"))
# Properties of checkpoints that users make, and of no published size.
ALSO = {
    ("vocabulary is even", False),
    ("depth is even", False),
    ("DeepStack levels", 1),
    ("DeepStack levels", 2),
    ("DeepStack evenly spaced", False),
    ("patch", 14),
    ("rotary settings", "yarn"),
    ("config written by transformers", 5),
    ("rotary settings", "left out"),
}


def properties(config: dict[str, Any]) -> set[tuple[str, Any]]:
    """Return the properties of a config that matter to code that reads, shards or runs it, as (name, value)."""
    text, vision = config["text_config"], config["vision_config"]
    levels = vision["deepstack_visual_indexes"]
    steps = {after - before for before, after in itertools.pairwise(levels)}
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    section = (rope or {}).get("mrope_section", [24, 20, 20])
    heads, head_dim, hidden = text["num_attention_heads"], text["head_dim"], text["hidden_size"]
    experts = text.get("num_experts", text.get("num_local_experts"))
    merged = vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    vision_head = vision["hidden_size"] // vision["num_heads"]
    return {
        ("output layer is tied", config["tie_word_embeddings"]),
        ("has experts", experts is not None),
        ("experts as wide as the dense MLP", text.get("moe_intermediate_size") == text["intermediate_size"]),
        ("heads x head_dim against hidden", (heads * head_dim > hidden) - (heads * head_dim < hidden)),
        ("heads share keys", heads > text["num_key_value_heads"]),
        ("head_dim is of 128", head_dim == 128),
        ("vocabulary is even", text["vocab_size"] % 2 == 0),
        ("depth is even", text["num_hidden_layers"] % 2 == 0),
        ("DeepStack levels", len(levels)),
        ("DeepStack evenly spaced", len(steps) <= 1),
        ("DeepStack from the first layer", levels[0] == 0),
        ("DeepStack from the last layer", levels[-1] == vision["depth"] - 1),
        ("patch", vision["patch_size"]),
        ("merge", vision["spatial_merge_size"]),
        ("vision MLP a multiple of its width", vision["intermediate_size"] % vision["hidden_size"] == 0),
        ("vision heads a power of two wide", vision_head & (vision_head - 1) == 0),
        ("merged patches against hidden", (merged > hidden) - (merged < hidden)),
        ("vision as deep as the decoder", vision["depth"] == text["num_hidden_layers"]),
        ("rotary settings", "left out" if rope is None else rope.get("rope_type", "default")),
        ("rotary sections are equal", len(set(section)) == 1),
        ("rotary sections fill the head", 2 * sum(section) == head_dim),
        ("config written by transformers", 5 if "rope_parameters" in text else 4),
    }


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.stem)
def test_properties_of_a_published_size_are_covered(published: Path) -> None:
    covered = set().union(*(properties(sizes_of(name)) for name in VARIANTS))
    assert properties(json.loads(published.read_text())) - covered == set()


def test_properties_of_other_checkpoints_are_covered() -> None:
    covered = set().union(*(properties(sizes_of(name)) for name in VARIANTS))
    assert covered >= ALSO


def test_every_tiny_model_covers_a_property_alone() -> None:
    for name in VARIANTS:
        others = set().union(*(properties(sizes_of(other)) for other in VARIANTS if other != name))
        assert properties(sizes_of(name)) - others, name


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_on_all_tiny_models(suite: str) -> None:
    source = (ROOT / suite).read_text()
    for name in VARIANTS:
        # The session's tiny checkpoint, and what is trained from it, is the tied one.
        fixtures = ("tiny_checkpoint", "speaking_checkpoint") if name == "tied" else ()
        assert f'"{name}"' in source or any(fixture in source for fixture in fixtures), name
