"""Stage 3: reinforcement learning with verifiable rewards (spec 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prism_megatron.advantage import informative_groups
from prism_megatron.config import RLVRConfig
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.loader import count_passes
from prism_megatron.data.samples import Sample
from prism_megatron.method import METHODS
from prism_megatron.observe import metrics as names
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.reward.verifiable import overlong_penalty, verifiable_reward
from prism_megatron.stages.batcher import Batcher, total_tokens
from prism_megatron.stages.dynamic_sampling import LeftoverGroup, RolloutBatch, sample_groups
from prism_megatron.stages.evaluate import export_and_evaluate, response_metrics
from prism_megatron.stages.policy import policy_gradient_step
from prism_megatron.stages.rollouts import Sampler, fit_prompts, gallery_row, start_engine
from prism_megatron.stages.setup import (
    load_policy,
    load_processor,
    load_reference,
    log_line,
    open_stage,
    read_options,
    report_skipped,
)
from prism_megatron.stages.sync_guard import SyncGuard


def run_rlvr(config: RLVRConfig) -> None:
    """Train the policy on verified answers to ``data``; writes checkpoints, ``hf/`` and ``results.json``.

    Raises UserError for invalid settings or data, and Preempted after a preempted stage has saved.
    """
    processor = load_processor(config)
    rows = fit_prompts(read_rlvr(config.data, read_options(config)), processor, config)
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        report_skipped(stage, rows)
        batcher = Batcher.from_config(processor.input_spec, config)
        policy = load_policy(config)
        reference = load_reference(config) if config.kl_coeff else None
        models = {"policy": policy}
        leftover_groups: list[LeftoverGroup] = stage.resume(models) or []

        engine = start_engine(config, policy.source)
        sampler = Sampler(engine, processor, config, METHODS[config.compat].judge)
        guard = SyncGuard(sampler, policy, rows)
        for iteration in range(stage.start, run.train_iters):
            with stage.timers("sync"):
                guard.push(iteration)
            with stage.timers("rollout"):
                batch = sample_groups(sampler, rows, leftover_groups, config, iteration)
                engine.sleep()
            samples, leftover_groups = batch.samples, batch.leftover_groups
            advantages = verified_advantages(samples, config)
            with stage.timers("train"):
                lr = policy.learning_rate(iteration, run.train_iters)
                trained = trained_samples(samples, config)
                batches = batcher.policy(
                    [samples[i] for i in trained], [advantages[i] for i in trained], config, iteration
                )
                metrics = policy_gradient_step(policy, reference, batches, config, lr)
            metrics |= sampling_metrics(batch, config)
            metrics[names.TOKENS] = total_tokens([sample.sequence() for sample in samples])
            stage.log.log(iteration + 1, metrics | passes.metrics(iteration + 1) | stage.timers.pop())
            logged = range(min(run.log_rollouts_per_iteration, len(samples)))
            stage.log.rollouts(
                iteration + 1, [gallery_row(samples[i], "rlvr", iteration + 1, advantages[i]) for i in logged]
            )
            stage.save_if_due(iteration + 1, models, leftover_groups)

        export_and_evaluate(stage, policy, processor, engine)


def sampling_metrics(batch: RolloutBatch, config: RLVRConfig) -> dict[str, float | None]:
    """Return metrics of all generated samples, so that DAPO's filter does not flatter the reward. Collective.

    If leftover groups were enough, nothing was generated and there are no rewards to report.
    """
    samples = batch.generated
    rewards = torch.tensor([reward(sample, config) for sample in samples], dtype=torch.float64)
    useful = informative_groups(rewards, torch.tensor([sample.group for sample in samples]))
    total, informative, count, prompts = sum_over_data_parallel(
        float(rewards.sum()), float(useful.sum()), len(samples), len({sample.group for sample in samples})
    )
    metrics: dict[str, float | None] = {names.GENERATED_PROMPTS: prompts, names.LEFTOVER_GROUPS: batch.reused_groups}
    if count == 0:
        return metrics
    means = {names.REWARD: total / count, names.VALID_GROUPS: informative / count}
    return metrics | means | response_metrics(samples)


def trained_samples(samples: Sequence[Sample], config: RLVRConfig) -> list[int]:
    """Return the indices of the samples in the loss: all, or with ``mask_truncated`` those that were not cut."""
    return [i for i, sample in enumerate(samples) if sample.rollout.finished or not config.mask_truncated]


def verified_advantages(samples: Sequence[Sample], config: RLVRConfig) -> list[float]:
    """Return the samples' rewards, normalized within each prompt group."""
    rewards = torch.tensor([reward(sample, config) for sample in samples], dtype=torch.float64)
    groups = torch.tensor([sample.group for sample in samples])
    advantages: list[float] = METHODS[config.compat].normalize(rewards, groups, config.advantage_eps, 0.0).tolist()
    return advantages


def reward(sample: Sample, config: RLVRConfig) -> float:
    """Return accuracy_weight * accuracy + format_weight * format (Eq. 5); a response cut at the limit has no format.

    DAPO subtracts a penalty for responses that end in the last ``overlong_buffer_tokens`` before the limit.
    """
    score = verifiable_reward(
        correct=sample.correct,
        valid=sample.response is not None,
        accuracy_weight=config.accuracy_weight,
        format_weight=config.format_weight,
    )
    if config.algorithm == "dapo" and config.overlong_buffer_tokens:
        score += overlong_penalty(
            len(sample.rollout.token_ids),
            max_tokens=config.rollout.max_response_tokens,
            buffer_tokens=config.overlong_buffer_tokens,
            factor=config.overlong_penalty,
        )
    return score
