"""Recipes of the tiny model on the built-in visual task, each stage on two CPU cores.

Hyper-parameters were chosen by experiment (README has the results). A single stage reads and writes under
``runs/tiny``; a pipeline overrides the paths.
"""

from __future__ import annotations

from typing import Any

from prism_megatron.config import (
    AlignConfig,
    CollectConfig,
    DiscriminatorConfig,
    EngineRollout,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RLVRConfig,
    RolloutConfig,
    RolloutLengths,
    RunConfig,
    RunFolderConfig,
    SampledRollout,
    SFTConfig,
    WarmupConfig,
)

ROOT = "runs/tiny"
_MAX_TOKENS = 6144
_LENGTHS: dict[str, Any] = {"max_response_tokens": 160, "max_model_len": 256}
_MAX_HIDDEN_SIZE = 512  # the smallest published model has 2048


def _model(checkpoint: str) -> ModelConfig:
    return ModelConfig(checkpoint, max_hidden_size=_MAX_HIDDEN_SIZE)


def _discriminator(checkpoint: str) -> DiscriminatorConfig:
    # Four experts per branch; a token uses two.
    return DiscriminatorConfig(checkpoint, num_experts=8, topk=2, upcycle_noise=0.1, load_balance_coeff=0.01)


def tiny_sft() -> SFTConfig:
    return SFTConfig(
        stage="sft",
        run=RunConfig(name="tiny/sft", train_iters=800, save_interval=200),
        model=_model(f"{ROOT}/base"),
        optimizer=OptimizerConfig(
            lr=2e-3,
            min_lr=1e-4,
            weight_decay=0.01,
            adam_beta2=0.95,
            decay_style="cosine",
            warmup_fraction=0.07,
        ),
        rollout=EngineRollout(**_LENGTHS),
        eval=EvalConfig(data=f"{ROOT}/data/heldout.parquet", num_questions=512),
        max_tokens_per_microbatch=_MAX_TOKENS,
        data=f"{ROOT}/data/sft.jsonl",
        global_batch_size=32,
    )


def tiny_collect() -> CollectConfig:
    return CollectConfig(
        stage="collect",
        run=RunFolderConfig(name="tiny/collect"),
        model=_model(f"{ROOT}/sft/hf"),
        rollout=SampledRollout(samples_per_prompt=4, **_LENGTHS),
        alignment_data=f"{ROOT}/data/alignment.parquet",
        pair_samples_per_prompt=1,
        candidates=f"{ROOT}/data/rlvr_candidates.parquet",
        num_candidates=384,
        band_low=0.2,
        band_high=0.8,
    )


def tiny_warmup() -> WarmupConfig:
    return WarmupConfig(
        stage="warmup",
        run=RunConfig(name="tiny/warmup", train_iters=40, save_interval=20),
        model=_model(f"{ROOT}/sft/hf"),
        optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.01, decay_style="cosine", warmup_fraction=0.1),
        rollout=RolloutLengths(**_LENGTHS),
        max_tokens_per_microbatch=_MAX_TOKENS,
        data=f"{ROOT}/collect/warmup_pairs.jsonl",
        global_batch_size=16,
        discriminator=_discriminator(f"{ROOT}/sft/hf"),
    )


def tiny_align() -> AlignConfig:
    return AlignConfig(
        stage="align",
        run=RunConfig(name="tiny/align", train_iters=20, save_interval=5),
        model=_model(f"{ROOT}/sft/hf"),
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.01),
        rollout=RolloutConfig(samples_per_prompt=8, **_LENGTHS),
        eval=EvalConfig(data=f"{ROOT}/data/heldout.parquet", num_questions=512),
        max_tokens_per_microbatch=_MAX_TOKENS,
        data=f"{ROOT}/data/alignment.parquet",
        prompts_per_iteration=8,
        discriminator=_discriminator(f"{ROOT}/warmup/hf"),
        discriminator_optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.01),
        perception_weight=0.5,
        format_penalty=1.5,
        score_regularizer=1e-3,
    )


def tiny_rlvr() -> RLVRConfig:
    return RLVRConfig(
        stage="rlvr",
        run=RunConfig(name="tiny/rlvr", train_iters=30, save_interval=10),
        model=_model(f"{ROOT}/align/hf"),
        optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.01),
        rollout=RolloutConfig(samples_per_prompt=8, **_LENGTHS),
        eval=EvalConfig(data=f"{ROOT}/data/heldout.parquet", num_questions=512),
        max_tokens_per_microbatch=_MAX_TOKENS,
        data=f"{ROOT}/collect/rlvr.parquet",
        prompts_per_iteration=16,
        accuracy_weight=0.8,
        format_weight=0.2,
    )
