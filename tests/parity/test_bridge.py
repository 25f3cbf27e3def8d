"""Pushes from any training layout to any engine layout: after random weight changes vLLM equals HF.

One launch per degree of the engine: its engines, one for each kind of model, live on while the training side
is built anew in one layout after the other. HF runs on the tensors that were exported, which are those put in, bit by
bit. The prompts: text, an image and a prefix (longer than a cache block) that the engine saw with the weights before,
and an image that it did not see.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.convert.hf_io import HFWeights
from tests.models import make_variant, save_tensors

WORKER = Path(__file__).with_name("bridge_worker.py")
# By the engine's tensor-parallel size; experts first, since vLLM makes all its groups only for them.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "experts": ("tp2", "pp2", "pp2-vpp2", "cp2", "ep2", "etp2", "tp2-sp", "tp2-sp-ep2"),
        "untied": ("tp2", "pp2-uneven", "cp2", "tp2-sp"),
        "tied": ("pp2-vpp2",),
    },
    2: {
        "experts": ("tp2", "pp2", "pp2-vpp2", "ep2", "tp2-sp", "tp2-sp-ep2"),
        "untied": ("tp2", "pp2-uneven", "tp2-sp"),
    },
}
FOUR_RANKS: dict[str, tuple[str, ...]] = {"experts": ("tp2-pp2",), "tied": ("tp2-pp2",)}
PROMPTS = ("text", "seen image", "seen long prefix", "unseen image")
CASES = [(kind, tp, name) for tp, kinds in LAYOUTS.items() for kind, layouts in kinds.items() for name in layouts]

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found_at(launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Found]:
    """Findings of the worker by the engine's tensor-parallel size; the worker runs at the first use of a size."""
    root = tmp_path_factory.mktemp("bridge")
    for kind in ("untied", "tied"):
        make_variant(kind, root / kind, seed=1)
    saved = make_variant("experts", root / "saved", seed=1)
    with HFWeights(saved) as weights:  # vLLM reads experts only as they are released
        save_tensors(root / "experts", {name: weights[name] for name in sorted(weights.names)}, saved)

    @functools.cache
    def run(tp: int, ranks: int = 2) -> Found:
        out = root / f"{ranks}-{tp}.json"
        kinds = LAYOUTS[tp] if ranks == 2 else FOUR_RANKS
        models = [f"{kind}={root}/{kind}={','.join(layouts)}" for kind, layouts in kinds.items()]
        launch(ranks, [str(WORKER), str(tp), str(out), *models])
        found: Found = json.loads(out.read_text())
        return found

    return run


@pytest.mark.parametrize(("kind", "tp", "name"), CASES)
def test_layout(kind: str, tp: int, name: str, found_at: Callable[..., Found]) -> None:
    check(found_at(tp)[kind][name])
    assert found_at(tp)[kind][name]["versions"] == [1 + list(found_at(tp)[kind]).index(name)]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", FOUR_RANKS)
def test_four_ranks(kind: str, tp: int, found_at: Callable[..., Found]) -> None:
    check(found_at(tp, 4)[kind]["tp2-pp2"])


def check(found: Found) -> None:
    assert found["changed"], "the new weights answer as the old ones did: nothing is proved"
    for prompt in PROMPTS:
        assert found[prompt]["greedy"], f"{prompt}: another token than HF's greedy one"
        assert found[prompt]["logprobs"] < 1e-4, prompt


def test_an_export_of_small_modules_holds_two_buckets_at_most(found_at: Callable[..., Found]) -> None:
    memory = found_at(1)["untied memory"]
    assert memory["buckets"] < 2 * memory["bucket"] < memory["whole"] / 2
    assert memory["at once"] > memory["whole"], "what gathers the whole model is not seen to"


def test_an_export_of_experts_has_buckets_that_hold_two_layers_of_them(found_at: Callable[..., Found]) -> None:
    memory = found_at(1)["experts memory"]
    assert memory["asked"] < memory["bucket"] < memory["buckets"] < 1.1 * memory["bound"] < 2 * memory["bucket"]
    assert memory["bound"] < memory["whole"] / 2
