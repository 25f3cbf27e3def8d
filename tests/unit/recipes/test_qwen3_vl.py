"""The production recipes as a set: each builds, its name tells the truth, its layout works and fits in 80 GB."""

from __future__ import annotations

import ast
from pathlib import Path
from types import FunctionType

import pytest

from prism_megatron.config import (
    AlignConfig,
    FP8Config,
    ParallelConfig,
    RLVRConfig,
    SFTConfig,
    WarmupConfig,
    apply_overrides,
)
from prism_megatron.model.sizes import HFSizes
from recipes import STAGE_RECIPES, qwen3_vl, shape_of, stage_recipe
from recipes import layouts as layouts_module
from recipes import pipeline as pipeline_module
from recipes.estimate.activations import layer_elements
from recipes.estimate.memory import GPU_BYTES, Memory, check_layout, estimate, published_sizes
from recipes.layouts import SIZES
from recipes.qwen3_vl import ALGORITHMS, RECIPES


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFSizes]:
    return {size: published_sizes(size, tmp_path_factory.mktemp(size)) for size in SIZES}


FP8_SIZES = {"sft": SIZES[2:], "align": SIZES[2:5], "rlvr": SIZES[2:]}  # what fits and gains; 8B and larger


def test_every_stage_algorithm_and_size_has_one_and_in_fp8_where_it_fits() -> None:
    families = ["sft", "collect", "warmup", "align", *(f"rlvr_{algorithm}" for algorithm in ALGORITHMS)]
    expected = {(family, size, "bf16") for family in families for size in SIZES}
    expected |= {(family, size, "fp8") for family in families for size in FP8_SIZES.get(family.split("_")[0], ())}
    assert {facts(name) for name in RECIPES} == expected
    assert len(RECIPES) == len(expected) == 61
    assert RECIPES.keys() <= STAGE_RECIPES.keys()


def test_every_production_recipe_is_found_by_grep() -> None:
    layouts = Path(layouts_module.__file__).read_text()
    assert all(layouts.count(f'"{name}"') == 1 for name in RECIPES)
    pipelines = Path(pipeline_module.__file__).read_text()
    assert all(pipelines.count(f'"{name}"') == 1 for name in pipeline_module.PRODUCTION_PIPELINES)


def facts(name: str) -> tuple[str, str, str]:
    family, _, rest = name.partition("_qwen3_vl_")
    size = next(size for size in SIZES if rest.startswith(f"{size}_"))
    return family, size, name.rpartition("_")[2]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_name_tells_the_truth_and_the_layout_fits(name: str, sizes: dict[str, HFSizes]) -> None:
    family, size, precision = facts(name)
    config = apply_overrides(stage_recipe(name)(), [])
    stage, _, algorithm = family.partition("_")
    assert config.stage == stage
    assert config.run.name == f"{size}/{family}" + ("_fp8" if precision == "fp8" else "")
    assert config.model.precision == precision
    assert config.model.fp8 == FP8Config(*(("tensorwise", 1, 1) if precision == "fp8" else ()))
    if isinstance(config, RLVRConfig):
        assert config.algorithm == algorithm
    if stage == "sft":
        assert config.model.hf_checkpoint == f"checkpoints/{qwen3_vl.released(size)}"
    shape = shape_of(name)
    assert shape is not None
    memory = estimate(config, shape[0] * shape[1], sizes[size], sizes["2b"])  # checks the degrees too
    assert memory.total <= GPU_BYTES, memory.table()


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if name.startswith("sft_")))
def test_an_engine_for_evaluation_fits_next_to_sft(name: str, sizes: dict[str, HFSizes]) -> None:
    _, size, _ = facts(name)
    config = apply_overrides(stage_recipe(name)(), ["eval.data=data/heldout.parquet", "eval.num_questions=512"])
    nodes, ranks = shape_of(name) or (0, 0)
    if size == "235b_a22b":  # an engine of four ranks is too small for it, and SFT needs no more
        with pytest.raises(ValueError, match=r"gives the engine .* raise it, or rollout.tensor_model_parallel_size"):
            estimate(config, nodes * ranks, sizes[size], sizes["2b"])
    else:
        estimate(config, nodes * ranks, sizes[size], sizes["2b"]).check()


def test_hyper_parameters_are_the_papers() -> None:
    sft = qwen3_vl.sft("8b", "bf16")
    assert isinstance(sft, SFTConfig)
    assert (sft.optimizer.lr, sft.optimizer.decay_style, sft.optimizer.warmup_fraction) == (1e-5, "cosine", 0.1)
    assert (sft.run.num_epochs, sft.global_batch_size) == (1, 16)
    align = qwen3_vl.align("8b", "bf16")
    assert isinstance(align, AlignConfig)
    assert (align.prompts_per_iteration, align.rollout.samples_per_prompt, align.run.train_iters) == (4, 16, 500)
    assert (align.optimizer.lr, align.discriminator_optimizer.lr, align.score_regularizer) == (1e-6, 1e-6, 1e-3)
    grpo, dapo, gspo = (build("8b", "bf16") for build in (qwen3_vl.rlvr_grpo, qwen3_vl.rlvr_dapo, qwen3_vl.rlvr_gspo))
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.optimizer.weight_decay) == (0.2, 0.2, 3.0, 0.01)
    assert (dapo.clip_low, dapo.clip_high, dapo.dual_clip, dapo.overlong_buffer_tokens) == (0.2, 0.28, 10.0, 4096)
    assert (gspo.clip_low, gspo.clip_high, gspo.dual_clip) == (3e-4, 4e-4, None)
    warmup = qwen3_vl.warmup("8b", "bf16")
    assert isinstance(warmup, WarmupConfig)
    assert (2 * warmup.global_batch_size, warmup.optimizer.lr, warmup.run.num_epochs) == (128, 1e-5, 1)


def test_parameters_are_counted_to_the_last_one(sizes: dict[str, HFSizes]) -> None:
    """One rank has all weights: 2 bytes of each of the 8,767,123,696 weights, 4 + 12 where they are trained."""
    config = qwen3_vl.rlvr_grpo("8b", "bf16")
    config.parallel = type(config.parallel)()
    config.rollout.tensor_model_parallel_size, config.rollout.gpu_memory_utilization = 1, 0.5
    memory = estimate(config, 1, sizes["8b"], sizes["2b"])
    assert memory.weights == 2 * 8_767_123_696
    assert memory.gradients == 4 * 8_767_123_696
    assert memory.optimizer == 12 * 8_767_123_696
    assert memory.engine == 0.5 * GPU_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.tensor_model_parallel_size=16", r"num_query_groups \(8\) must be divisible"),
        ("parallel.context_parallel_size=3", r"world size 16 is not a multiple"),
        ("prompts_per_iteration=5", r"prompts_per_iteration \(5\) must be divisible by the data-parallel size \(4\)"),
        ("rollout.tensor_model_parallel_size=8", r"must divide tensor times context parallel size \(4\)"),
        ("rollout.gpu_memory_utilization=0.05", r"gives the engine 4 GB, its weights and 4 responses take"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(change: str, message: str, sizes: dict[str, HFSizes]) -> None:
    config = apply_overrides(qwen3_vl.align("8b", "bf16"), [change])
    with pytest.raises(ValueError, match=message):
        estimate(config, 16, sizes["8b"], sizes["2b"])


def test_trainer_and_engine_share_a_gpu_or_are_refused(sizes: dict[str, HFSizes]) -> None:
    """An engine that sleeps leaves its share to the activations, so that more fits; awake it needs all of it."""

    def memory(*overrides: str) -> Memory:
        config = apply_overrides(qwen3_vl.rlvr_grpo("8b", "bf16"), overrides)
        return estimate(config, 8, sizes["8b"], sizes["2b"])

    stays, sleeps = (memory(f"rollout.sleep_level={level}", "max_tokens_per_microbatch=60000") for level in (0, 1))
    assert stays.activations > stays.weight_sync
    assert stays.total - sleeps.total == pytest.approx(
        min(stays.engine - sleeps.engine_asleep, stays.activations - stays.weight_sync)
    )
    greedy = memory("rollout.sleep_level=1", "rollout.gpu_memory_utilization=0.95")
    with pytest.raises(
        ValueError, match=r"needs \d+ GB of 80(?s:.)*rollout engine +76.0 GB(?s:.)*lower rollout.gpu_memory_util"
    ):
        greedy.check()


def test_a_push_holds_all_experts_of_a_layer_twice_and_vllm_its_part_of_them(sizes: dict[str, HFSizes]) -> None:
    """128 experts of three matrices 2048 x 768 in bfloat16, against a bucket of 256 MiB."""
    config = qwen3_vl.rlvr_grpo("30b_a3b", "bf16")
    experts = 2 * 128 * 3 * 2048 * 768
    cut = config.rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size
    push = estimate(config, 32, sizes["30b_a3b"], sizes["2b"]).weight_sync
    assert 0 < push - (2 + 1 / cut) * experts < config.rollout.sync_bucket_mib << 19


def test_a_kl_term_keeps_the_weights_of_the_policy_as_it_was(sizes: dict[str, HFSizes]) -> None:
    without, with_it = (
        estimate(apply_overrides(qwen3_vl.rlvr_grpo("8b", "bf16"), [f"kl_coeff={c}"]), 8, sizes["8b"], sizes["2b"])
        for c in (0.0, 0.01)
    )
    assert with_it.weights == 2 * without.weights
    assert (with_it.gradients, with_it.optimizer) == (without.gradients, without.optimizer)
    assert with_it.activations == without.activations


def test_ranks_that_share_an_expert_have_each_other_s_tokens(sizes: dict[str, HFSizes]) -> None:
    """Eight experts a token, 1.5 times their even share, each keeping twice 2048 elements for a rank more."""
    one, two = (layer_elements(sizes["30b_a3b"], ParallelConfig(expert_tensor_parallel_size=n), 1.5) for n in (1, 2))
    assert two - one == 8 * 1.5 * 2 * 2048


def test_fp8_adds_two_bytes_of_each_linear_weight_of_the_decoder(sizes: dict[str, HFSizes]) -> None:
    """36 layers: queries, keys and values 4096 x 6144, their output 4096 x 4096, three matrices 4096 x 12288; two
    tensor-parallel ranks."""
    bf16, fp8 = (
        estimate(
            apply_overrides(qwen3_vl.sft("8b", "bf16"), [f"model.precision={precision}"]), 8, sizes["8b"], sizes["2b"]
        )
        for precision in ("bf16", "fp8")
    )
    assert fp8.weights - bf16.weights == 2 * 36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288) / 2


def test_more_replicas_need_no_more_than_fewer(sizes: dict[str, HFSizes]) -> None:
    config = qwen3_vl.sft("8b", "bf16")
    few, many = (estimate(config, world, sizes["8b"], sizes["2b"]) for world in (4, 8))
    assert (many.weights, many.gradients) == (few.weights, few.gradients)
    assert many.optimizer == pytest.approx(few.optimizer / 2)
    check_layout(config, 16, sizes["8b"], sizes["2b"])


def test_recipes_stay_small() -> None:
    tree = ast.parse(Path(qwen3_vl.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert all(node.end_lineno is not None and node.end_lineno - node.lineno < 25 for node in functions)
    assert all(node.returns is not None for node in functions)
    assert isinstance(qwen3_vl.sft, FunctionType)
