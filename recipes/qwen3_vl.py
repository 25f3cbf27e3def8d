"""Configurations of the production recipes, a function for each stage and RLVR algorithm.

Hyper-parameters are the paper's (its Table 3 and released scripts) where it states them. ``recipes/layouts.py`` lists
the recipes by name with their parallel layouts. Relative paths start in the project folder: ``checkpoints/`` holds HF
directories, ``data/`` the data sets, ``runs/`` the output. Not verified on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prism_megatron.config import (
    AlignConfig,
    CollectConfig,
    DatasetConfig,
    DiscriminatorConfig,
    EngineRollout,
    FP8Config,
    ModelConfig,
    OptimizerConfig,
    RLVRConfig,
    RolloutConfig,
    RolloutLengths,
    RunConfig,
    RunFolderConfig,
    SampledRollout,
    SFTConfig,
    StageConfig,
    WarmupConfig,
)
from recipes.layouts import LAYOUTS, VISION, Layout, parse_name, recipe_name

ALGORITHMS = ("grpo", "dapo", "gspo")
_DATA_WORKERS = 2  # for each GPU
_PROMPT_TOKENS = 2048  # longer prompts are not in the released data
# Under FP8 the engine runs the policy in BF16, so trainer and engine differ.
_IMPORTANCE_CAP = {"bf16": None, "fp8": 2.0}
_HUB_NAMES = {
    "2b": "2B",
    "4b": "4B",
    "8b": "8B",
    "32b": "32B",
    "30b_a3b": "30B-A3B",
    "235b_a22b": "235B-A22B",
}


def sft(size: str, precision: str) -> SFTConfig:
    """One epoch of the demonstrations (1.37 M in the paper) with frozen vision tower and merger (spec 2)."""
    layout = _layout("sft", size, precision)
    return SFTConfig(
        stage="sft",
        run=_run(size, "sft", precision, num_epochs=1, save_interval=1000),
        parallel=layout.parallel(),
        model=_model(f"checkpoints/{released(size)}", precision, VISION),
        optimizer=_adam(1e-5, decay_style="cosine", warmup_fraction=0.1),
        rollout=EngineRollout(**_engine(layout, 6144)),
        max_tokens_per_microbatch=8192,
        data="data/sft.jsonl",
        global_batch_size=16,  # the paper's 2 per GPU, on its 8 GPUs
        dataset=DatasetConfig(workers=_DATA_WORKERS),
    )


def collect(size: str, precision: str) -> CollectConfig:
    """Student responses for the warm-up, and RLVR prompts with a pass rate in the paper's band (spec 1.4)."""
    layout = _layout("collect", size, precision)
    return CollectConfig(
        stage="collect",
        run=RunFolderConfig(_run_name(size, "collect", precision), seed=42),
        parallel=layout.parallel(),
        model=_model(f"runs/{size}/sft/hf", precision),
        rollout=SampledRollout(samples_per_prompt=16, **_engine(layout, 8192)),
        alignment_data="data/alignment.parquet",
        pair_samples_per_prompt=1,
        candidates="data/rlvr_candidates.parquet",
        band_low=0.2,
        band_high=0.8,
    )


def warmup(size: str, precision: str) -> WarmupConfig:
    """Pairwise warm-up of the discriminator, 64 lines at a time (spec 3.3).

    One epoch: the paper's 120 K pairs are all different, and collect writes one per alignment prompt, 5,978 in the
    release. More epochs would memorize the demonstrations that alignment uses.
    """
    layout = _layout("warmup", size, precision)
    return WarmupConfig(
        stage="warmup",
        run=_run(size, "warmup", precision, num_epochs=1, save_interval=50),
        parallel=layout.parallel(),
        model=_model(f"runs/{size}/sft/hf", precision),
        optimizer=_adam(1e-5, weight_decay=0.01, decay_style="cosine", warmup_fraction=0.1),
        rollout=RolloutLengths(max_response_tokens=6144, max_model_len=_PROMPT_TOKENS + 6144),
        max_tokens_per_microbatch=2 * (_PROMPT_TOKENS + 6144),  # both sides of the longest pair, uncut
        data=f"runs/{size}/collect/warmup_pairs.jsonl",
        global_batch_size=64,  # lines of two pairs each
        dataset=DatasetConfig(workers=_DATA_WORKERS),
        discriminator=_discriminator(f"checkpoints/{released('2b')}"),
    )


def align(size: str, precision: str) -> AlignConfig:
    """500 iterations of 4 prompts x 16 responses, one step of policy and discriminator each (spec 4.1)."""
    layout = _layout("align", size, precision)
    return AlignConfig(
        stage="align",
        run=_run(size, "align", precision, train_iters=500, save_interval=50),
        parallel=layout.parallel(),
        model=_model(f"runs/{size}/sft/hf", precision, layout.freeze),
        optimizer=_adam(1e-6, weight_decay=0.01),
        rollout=_rollout(layout, 6144),
        max_tokens_per_microbatch=8192,  # pairs with more than 4096 tokens on a side, prompt included, are cut
        data="data/alignment.parquet",
        prompts_per_iteration=4,
        dual_clip=3.0,
        importance_cap=_IMPORTANCE_CAP[precision],
        discriminator=_discriminator(f"runs/{size}/warmup/hf"),
        discriminator_optimizer=_adam(1e-6, weight_decay=0.01),
        perception_weight=0.5,
        format_penalty=1.5,
        score_regularizer=1e-3,
    )


def rlvr_grpo(size: str, precision: str) -> RLVRConfig:
    """1500 iterations of 32 prompts x 16 responses (spec 5.1); spec 5.2 has the differences of DAPO and GSPO."""
    layout = _layout("rlvr_grpo", size, precision)
    return RLVRConfig(
        stage="rlvr",
        run=_run(size, "rlvr_grpo", precision, train_iters=1500, save_interval=60),
        parallel=layout.parallel(),
        model=_model(f"runs/{size}/align/hf", precision, layout.freeze),
        optimizer=_adam(1e-6, weight_decay=0.01),
        rollout=_rollout(layout, 8192),
        max_tokens_per_microbatch=10240,
        data=f"runs/{size}/collect/rlvr.parquet",
        prompts_per_iteration=32,
        dual_clip=3.0,
        importance_cap=_IMPORTANCE_CAP[precision],
        accuracy_weight=0.8,
        format_weight=0.2,
    )


def rlvr_dapo(size: str, precision: str) -> RLVRConfig:
    config = rlvr_grpo(size, precision)
    config.algorithm, config.run.name = "dapo", _run_name(size, "rlvr_dapo", precision)
    config.clip_high, config.dual_clip = 0.28, 10.0
    config.overlong_buffer_tokens = 4096
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_fraction = 10 / config.run.train_iters
    return config


def rlvr_gspo(size: str, precision: str) -> RLVRConfig:
    config = rlvr_grpo(size, precision)
    config.algorithm, config.run.name = "gspo", _run_name(size, "rlvr_gspo", precision)
    config.clip_low, config.clip_high, config.dual_clip = 3e-4, 4e-4, None
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_fraction = 0.05
    return config


def released(size: str) -> str:
    """Return the checkpoint's name on the hub."""
    return f"Qwen3-VL-{_HUB_NAMES[size]}-Instruct"


def _run(
    size: str, family: str, precision: str, *, train_iters: int = 0, num_epochs: int = 0, save_interval: int
) -> RunConfig:
    name = _run_name(size, family, precision)
    return RunConfig(name, seed=42, train_iters=train_iters, num_epochs=num_epochs, save_interval=save_interval)


def _run_name(size: str, family: str, precision: str) -> str:
    """Return the run folder. Later stages start from BF16 runs; FP8 runs have a ``_fp8`` suffix."""
    return f"{size}/{family}" + ("" if precision == "bf16" else f"_{precision}")


def _model(checkpoint: str, precision: str, freeze: Sequence[str] = ()) -> ModelConfig:
    fp8 = FP8Config(first_layers_bf16=1, last_layers_bf16=1) if precision == "fp8" else FP8Config()
    return ModelConfig(checkpoint, precision, fp8, freeze=list(freeze), recompute=True)


def _adam(
    lr: float, weight_decay: float = 0.0, decay_style: str = "constant", warmup_fraction: float = 0.0
) -> OptimizerConfig:
    return OptimizerConfig(
        lr,
        weight_decay=weight_decay,
        decay_style=decay_style,
        warmup_fraction=warmup_fraction,
        use_distributed_optimizer=True,
    )


def _rollout(layout: Layout, max_response_tokens: int) -> RolloutConfig:
    return RolloutConfig(samples_per_prompt=16, **_engine(layout, max_response_tokens))


def _engine(layout: Layout, max_response_tokens: int) -> dict[str, Any]:
    tensor_parallel, share = layout.engine
    return {
        "max_response_tokens": max_response_tokens,
        "max_model_len": _PROMPT_TOKENS + max_response_tokens,
        "tensor_model_parallel_size": tensor_parallel,
        "gpu_memory_utilization": share,
    }


def _discriminator(checkpoint: str) -> DiscriminatorConfig:
    # The released noise of 0.01 is a quarter to a half of the weights' own standard deviation. The paper's 4 experts at
    # top 2 are two per branch, and a token uses both: there is nothing to balance. 8 experts, four per branch, do not
    # fit together with the 4B and 32B policies or, in FP8, the 8B and 30B-A3B ones (estimate: 81 to 87 GB of 80).
    return DiscriminatorConfig(checkpoint, num_experts=4, topk=2, upcycle_noise=0.25, load_balance_coeff=0)


_FAMILIES: dict[str, Callable[[str, str], StageConfig]] = {
    "sft": sft,
    "collect": collect,
    "warmup": warmup,
    "align": align,
    "rlvr_grpo": rlvr_grpo,
    "rlvr_dapo": rlvr_dapo,
    "rlvr_gspo": rlvr_gspo,
}


def _layout(family: str, size: str, precision: str) -> Layout:
    name = recipe_name(family, size, precision)
    assert name is not None, f"no recipe of {family} for {size} in {precision}"
    return LAYOUTS[name]


def _recipe(name: str) -> Callable[[], StageConfig]:
    family, size, precision = parse_name(name)
    return partial(_FAMILIES[family], size, precision)


RECIPES: dict[str, Callable[[], StageConfig]] = {name: _recipe(name) for name in LAYOUTS}
