"""Stage 2: adversarial alignment of the policy against the discriminator (spec 4)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.advantage import AdvantageConfig, ScoredResponses
from prism_megatron.config import AlignConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_alignment
from prism_megatron.data.loader import count_passes
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair
from prism_megatron.data.samples import Sample
from prism_megatron.loss.discriminator import PairLossConfig
from prism_megatron.method import METHODS, Method
from prism_megatron.observe import metrics as names
from prism_megatron.observe.timers import Timers
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.stages.batcher import Batcher, total_tokens
from prism_megatron.stages.discriminator import DiscriminatorObjective, discriminator_step, score
from prism_megatron.stages.evaluate import export_and_evaluate, response_metrics
from prism_megatron.stages.policy import policy_gradient_step
from prism_megatron.stages.replay import Replay
from prism_megatron.stages.rollouts import Sampler, fit_prompts, gallery_row, start_engine
from prism_megatron.stages.setup import (
    TrainableModel,
    load_discriminator,
    load_policy,
    load_processor,
    load_reference,
    local_batch,
    log_line,
    open_stage,
    read_options,
    report_skipped,
)
from prism_megatron.stages.sync_guard import SyncGuard
from prism_megatron.types import PERCEPTION, REASONING


def run_align(config: AlignConfig) -> None:
    """Align the policy on the prompts of ``data``; writes checkpoints, ``hf/`` (the policy) and ``results.json``.

    Raises UserError for invalid settings or data, and Preempted after a preempted stage has saved.
    """
    processor = load_processor(config)
    rows = fit_prompts(read_alignment(config.data, read_options(config)), processor, config)
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        report_skipped(stage, rows)
        batcher = Batcher.from_config(processor.input_spec, config)
        models = load_align_models(config, processor)
        trained = {"policy": models.policy, "discriminator": models.discriminator}
        replay = Replay(rows, processor, config, stage.resume(trained))

        engine = start_engine(config, models.policy.source)
        sampler = Sampler(engine, processor, config, models.method.judge)
        guard = SyncGuard(sampler, models.policy, rows)
        for iteration in range(stage.start, run.train_iters):
            local_rows = local_batch(rows, config.prompts_per_iteration, iteration, run.seed)
            with stage.timers("sync"):
                guard.push(iteration)
            with stage.timers("rollout"):
                samples = sampler.sample(local_rows, iteration)
                engine.sleep()
            step = align_step(models, batcher, samples, replay, config, iteration, stage.timers)
            step.metrics[names.TOKENS] = total_tokens([sample.sequence() for sample in samples])
            stage.log.log(iteration + 1, step.metrics | passes.metrics(iteration + 1) | stage.timers.pop())
            stage.log.rollouts(iteration + 1, step.gallery(iteration + 1, run.log_rollouts_per_iteration))
            stage.save_if_due(iteration + 1, trained, replay.responses)

        models.discriminator.export(stage.dir / "discriminator_hf")
        export_and_evaluate(stage, models.policy, processor, engine)


@dataclass(frozen=True)
class AlignModels:
    """The policy, its frozen reference if ``kl_coeff`` > 0, the discriminator, their processor, and the method."""

    policy: TrainableModel
    reference: TrainableModel | None
    discriminator: TrainableModel
    processor: ChatProcessor
    method: Method


def load_align_models(config: AlignConfig, processor: ChatProcessor) -> AlignModels:
    return AlignModels(
        load_policy(config),
        load_reference(config) if config.kl_coeff else None,
        load_discriminator(config, config.discriminator_optimizer),
        processor,
        METHODS[config.compat],
    )


@dataclass(frozen=True)
class AlignStepOutput:
    """The scored samples of an alignment step, their ``advantages``, and the ``pairs`` the discriminator trained on."""

    branches: ScoredBranches
    advantages: list[float]
    pairs: list[Pair]
    metrics: dict[str, float | None]

    def gallery(self, iteration: int, count: int) -> list[dict[str, object]]:
        """Return the first ``count`` rollouts for the report."""
        branches, rows = self.branches, []
        for i in range(min(count, len(branches.samples))):
            scores = (float(branches.perception[i]), float(branches.reasoning[i])) if branches.valid[i] else None
            rows.append(gallery_row(branches.samples[i], "align", iteration, self.advantages[i], scores))
        return rows


def align_step(
    models: AlignModels,
    batcher: Batcher,
    samples: Sequence[Sample],
    replay: Replay,
    config: AlignConfig,
    iteration: int,
    timers: Timers,
) -> AlignStepOutput:
    """Train on an iteration's samples: score them, update the discriminator on their pairs, then the policy.

    Args:
        models: The models of the stage.
        batcher: Lays out micro-batches for them.
        samples: This rank's responses, sampled by the current policy.
        replay: Past responses; these ones are added to it.
        config: The stage's configuration.
        iteration: Counts from 0; gives the learning rates and the policy's version.
        timers: Timed are "score", "discriminator" and "train".

    Returns:
        Scores, advantages, pairs and metrics.
    """
    policy, discriminator, train_iters = models.policy, models.discriminator, config.run.train_iters
    with timers("score"):
        branches = score_branches(models, batcher, samples, config)
    advantages = branches.advantages(models.method, config)
    metrics = response_metrics(samples) | branches.length_correlations()
    with timers("discriminator"):
        lr = discriminator.learning_rate(iteration, train_iters)
        objective, count = discriminator_objective(models.method, config), config.discriminator_steps
        pairs = branches.pairs + replay.pairs(iteration)
        batch = batcher.pairs(pairs, objective.branch_weights, repeat_teachers=objective.penalty > 0)
        steps = [
            discriminator_step(discriminator, batch, objective, lr, step)
            for step in range(count * iteration, count * (iteration + 1))
        ]
        metrics |= steps[0]  # later steps measure pairs that were just trained on
        replay.add(samples)
    with timers("train"):
        lr = policy.learning_rate(iteration, train_iters)
        batches = batcher.policy(samples, advantages, config, iteration)
        metrics |= policy_gradient_step(policy, models.reference, batches, config, lr)
    return AlignStepOutput(branches, advantages, pairs, metrics)


def discriminator_objective(method: Method, config: AlignConfig) -> DiscriminatorObjective:
    """Return the objective: the branches' mean losses are added with the weights of the reward (spec 4.4, D10)."""
    alpha = config.perception_weight
    return DiscriminatorObjective(
        (2 * alpha, 2 * (1 - alpha)),
        method.pair_loss,
        PairLossConfig(config.score_regularizer, config.label_smoothing),
        config.gradient_penalty,
        config.gradient_penalty_std,
        config.run.seed,
    )


def within_groups(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Subtract its group's mean from each value."""
    members: dict[int, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    # The mean of equal values must be exact: a constant score has no correlation.
    means = {g: v[0] if max(v) == min(v) else statistics.fmean(v) for g, v in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]


@dataclass(frozen=True)
class ScoredBranches:
    """The scores of an iteration's samples by the discriminator, before it is updated.

    ``perception`` and ``reasoning`` [N] are the scores of each of the N ``samples``; unused where ``valid`` [N] is
    False, for responses outside the grammar. ``students`` are the scored branches of the valid samples, two of each,
    never truncated; ``pairs`` compares them with their prompt's demonstration.
    """

    samples: Sequence[Sample]
    perception: Tensor
    reasoning: Tensor
    valid: Tensor
    students: list[TrainingSequence]
    pairs: list[Pair]

    def advantages(self, method: Method, config: AlignConfig) -> list[float]:
        """Return A = alpha GN(s_caption) + (1 - alpha) GN(s_reasoning) - penalty (spec 4.5, Eq. 3), or a gated form."""
        scored = ScoredResponses(
            self.perception,
            self.reasoning,
            self.valid,
            torch.tensor([s.correct for s in self.samples]),
            torch.tensor([s.group for s in self.samples]),
        )
        settings = AdvantageConfig(
            config.perception_weight,
            config.format_penalty,
            config.combine,
            config.advantage_eps,
            config.score_std_floor,
            config.gating,
        )
        advantages: list[float] = method.advantage(scored, settings).tolist()
        return advantages

    def length_correlations(self) -> dict[str, float | None]:
        """Return the Pearson correlation of scores and lengths of valid responses, by branch, over all ranks.

        A discriminator must not learn lengths. Group means are subtracted, because prompts differ in both.
        """
        groups = [sample.group for sample in self.samples if sample.response is not None]
        metrics = {}
        for branch, scores, name in (
            (PERCEPTION, self.perception, names.PERCEPTION_LENGTH_CORRELATION),
            (REASONING, self.reasoning, names.REASONING_LENGTH_CORRELATION),
        ):
            lengths = [float(len(student.response_ids)) for student in self.students if student.branch == branch]
            x, y = within_groups(scores[self.valid].tolist(), groups), within_groups(lengths, groups)
            products = [sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((x, y), (x, x), (y, y))]
            covariance, of_scores, of_lengths = sum_over_data_parallel(*products)
            varied = of_scores > 0 and of_lengths > 0
            metrics[name] = covariance / math.sqrt(of_scores * of_lengths) if varied else None
        return metrics


def score_branches(
    models: AlignModels, batcher: Batcher, samples: Sequence[Sample], config: AlignConfig
) -> ScoredBranches:
    """Score both branches of every valid response and pair them with the demonstration's."""
    students, pairs = models.method.split(samples, models.processor, config)
    valid = torch.tensor([sample.response is not None for sample in samples])
    sample_ids = [sample.example.id for sample in samples if sample.response is not None for _ in range(2)]
    scores = torch.zeros(len(samples), 2)
    scores[valid] = score(models.discriminator, batcher.scoring(students), sample_ids).view(-1, 2)
    scores = scores.clamp(-models.method.max_score, models.method.max_score)
    return ScoredBranches(samples, scores[:, 0], scores[:, 1], valid, students, pairs)
