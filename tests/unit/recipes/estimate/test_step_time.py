"""Step times on paper: what each layout must add."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from prism_megatron.config import PARTS, apply_overrides
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import Workload, training_flops
from recipes import qwen3_vl
from recipes.estimate.memory import estimate, published_sizes
from recipes.estimate.step_time import Costs, Rows, StepTime, predict, read_costs
from recipes.layouts import LAYOUTS, SIZES, VISION, recipe_name
from tools.bench.collectives import fit
from tools.plan.check import non_negative
from tools.plan.layouts import ends, layouts, ranked

ROOT = Path(__file__).resolve().parents[4]
COSTS = ROOT / "recipes" / "estimate" / "costs" / "h100.json"


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> HFSizes:
    return published_sizes("8b", tmp_path_factory.mktemp("8b"))


@pytest.fixture(scope="module")
def costs() -> Costs:
    return read_costs(COSTS)


def rows(count: int) -> Rows:
    return Rows(count, Workload([4096] * count, [4096] * count, 1024 * count))


def step(
    sizes: HFSizes, costs: Costs, world: int, *overrides: str, count: int = 64, freeze: Sequence[str] = VISION
) -> StepTime:
    config = apply_overrides(qwen3_vl.sft("8b", "bf16"), ["parallel.tensor_model_parallel_size=1", *overrides])
    config.global_batch_size, config.model.freeze = count, list(freeze)
    memory = estimate(config, world, sizes, sizes)
    return predict(config, sizes, rows(count), world, costs, memory)


def test_one_rank_computes_and_waits_for_nobody(sizes: HFSizes, costs: Costs) -> None:
    alone = step(sizes, costs, 1)
    assert alone.communication == alone.bubble == 0
    flops = training_flops(sizes.text, sizes.vision, rows(64).work, ["vision", "merger"], recompute=True)
    products = flops.hardware / (costs.peak_flops * costs.achieved)
    assert products < alone.compute < 1.3 * products


def test_a_pipeline_idles_as_one_forward_one_backward_does(sizes: HFSizes, costs: Costs) -> None:
    free = dataclasses.replace(costs, layer_seconds=0.0, memory_bytes_per_second=float("inf"))
    stages = "parallel.pipeline_model_parallel_size=4"
    staged = step(sizes, free, 4, stages, freeze=PARTS)  # equal stages but for the tower and the head
    microbatches = 64 // 2  # of two rows each
    assert staged.bubble / staged.compute >= 3 / microbatches
    fewer = step(sizes, free, 4, stages, count=8, freeze=PARTS)
    assert fewer.bubble / fewer.compute > staged.bubble / staged.compute


def test_what_crosses_nodes_goes_at_the_networks_speed(sizes: HFSizes, costs: Costs) -> None:
    inside, across = (step(sizes, costs, world) for world in (8, 16))
    assert across.gradients > 5 * inside.gradients
    cut = step(sizes, costs, 8, "parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true")
    assert cut.tensor > 0
    assert cut.gradients == 0


def test_layouts_are_ranked_and_fit(sizes: HFSizes, costs: Costs) -> None:
    config = qwen3_vl.sft("8b", "bf16")
    plans, reasons = ranked(config, sizes, rows(16), 8, costs)
    seconds = [plan.step.total for plan in plans]
    assert seconds == sorted(seconds)
    assert all(plan.memory.total <= costs.memory_bytes for plan in plans)
    assert any("GB a GPU" in reason for reason in reasons)
    assert 0.1 < plans[0].mfu < costs.achieved


@pytest.mark.parametrize("size", SIZES)
def test_a_recipes_own_layout_is_a_candidate(size: str, tmp_path: Path) -> None:
    config = qwen3_vl.sft(size, "bf16")
    assert LAYOUTS[recipe_name("sft", size, "bf16") or ""].parallel() == config.parallel
    candidates = [(c.parallel, c.model.recompute) for c in layouts(config, published_sizes(size, tmp_path))]
    assert (config.parallel, config.model.recompute) in candidates


def test_stages_that_cannot_be_equal_have_fewer_layers_at_both_ends() -> None:
    assert ends(36, 4) == (0, 0)
    assert ends(94, 4) == (23, 23)
    assert ends(94, 8) == (11, 11)
    assert ends(27, 2) == (13, 14), "the first has the vision tower too"


def test_ranks_that_share_an_expert_exchange_its_tokens(costs: Costs, tmp_path: Path) -> None:
    sizes = published_sizes("30b_a3b", tmp_path)
    config = apply_overrides(qwen3_vl.sft("30b_a3b", "bf16"), ["parallel.tensor_model_parallel_size=2"])
    memory = estimate(config, 16, sizes, sizes)
    whole = predict(config, sizes, rows(64), 16, costs, memory)
    config.parallel.expert_tensor_parallel_size = 2
    assert predict(config, sizes, rows(64), 16, costs, memory).expert > whole.expert
    config.parallel.expert_model_parallel_size = 1
    assert predict(config, sizes, rows(64), 16, costs, memory).expert > 0


@pytest.mark.parametrize(
    ("size", "ep", "published"),
    [
        ("8b", 1, 10_456),  # Qwen3-8B, what `achieved` was chosen by
        ("30b_a3b", 8, 13_011),  # Qwen3-30B-A3B, routing balanced
    ],
)
def test_text_is_as_fast_as_megatron_bridge_publishes(
    size: str, ep: int, published: float, costs: Costs, tmp_path: Path
) -> None:
    """Tokens a second and H100, 4096 tokens a row, BF16, 16 GPUs: another trainer's figures, without images."""
    sizes = published_sizes(size, tmp_path)
    parallel = [f"parallel.{name}_parallel_size={n}" for name, n in (("tensor_model", 1), ("expert_model", ep))]
    alone = [*parallel, "parallel.sequence_parallel=false", "model.recompute=false", "max_tokens_per_microbatch=4096"]
    config = apply_overrides(qwen3_vl.sft(size, "bf16"), [*alone, "global_batch_size=512"])
    text = Rows(512, Workload([4096] * 512, [], 4096 * 512))
    took = predict(config, sizes, text, 16, costs, estimate(config, 16, sizes, sizes))
    assert text.tokens / took.total / 16 == pytest.approx(published, rel=0.1)


def test_a_cost_without_a_source_is_refused(tmp_path: Path) -> None:
    found = json.loads(COSTS.read_text())
    del found["achieved"]["source"]
    (tmp_path / "costs.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="must give value and source of each of peak_flops"):
        read_costs(tmp_path / "costs.json")


def test_a_cost_is_never_negative() -> None:
    assert non_negative([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], [2.0, 4.0, 6.0]) == pytest.approx([2.0, 0.0])
    assert non_negative([[1.0, 1.0], [2.0, 1.0]], [1.0, 3.0])[1] == 0.0


def test_latency_and_bandwidth_of_exchanges() -> None:
    found = fit([(size, 1e-3 + size / 1e9) for size in (4e3, 1e6, 1.6e7)])
    assert found == pytest.approx((1e-3, 1e9))
