"""Stage 2: adversarial alignment. Policy and discriminator take one step each per iteration (spec 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.advantage import alignment_advantage
from prism_megatron.config import AlignConfig
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_alignment
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.loss.policy import PolicyLossConfig
from prism_megatron.stages.discriminator import Pair, discriminator_step, score
from prism_megatron.stages.evaluate import conclude, judge, response_metrics
from prism_megatron.stages.policy import Objective, policy_gradient_step
from prism_megatron.stages.rollouts import Sample, gallery_row, push_weights, sample_responses, start_engine
from prism_megatron.stages.setup import (
    Trained,
    load_discriminator,
    load_policy,
    load_processor,
    open_stage,
    rows_of_iteration,
)

# The two branches' losses are added, each a mean over its valid pairs (spec 4.4).
_BRANCH_WEIGHTS = (1.0, 1.0)


def run_align(config: AlignConfig) -> None:
    rows = read_alignment(Path(config.data))
    run = config.run
    objective = Objective(PolicyLossConfig("grpo", config.clip_low, config.clip_high, None), "token_mean")
    with open_stage(config, config.discriminator.num_experts) as stage:
        processor = load_processor(config)
        policy = load_policy(config)
        discriminator = load_discriminator(config, config.discriminator_optimizer)
        parts = {"policy": policy, "discriminator": discriminator}
        stage.resume(parts)

        engine = start_engine(config, policy.source)
        for iteration in range(stage.start, run.train_iters):
            mine = rows_of_iteration(rows, config.prompts_per_iteration, iteration, run.seed)
            with stage.timers("sync"):
                push_weights(engine, policy, iteration)
            with stage.timers("rollout"):
                samples = sample_responses(engine, processor, mine, iteration, config)
            with stage.timers("score"):
                branches = score_branches(discriminator, samples, processor, config)
            advantages = branches.advantages(samples, config)
            with stage.timers("discriminator"):
                measured = discriminator_step(
                    discriminator,
                    branches.pairs,
                    processor,
                    config,
                    branch_weights=_BRANCH_WEIGHTS,
                    regularizer=config.score_regularizer,
                    lr=discriminator.learning_rate(iteration, run.train_iters),
                )
            with stage.timers("train"):
                lr = policy.learning_rate(iteration, run.train_iters)
                measured |= policy_gradient_step(policy, samples, advantages, processor, objective, config, lr)
            measured |= response_metrics(samples)
            stage.log.log(iteration + 1, measured | stage.timers.pop())
            stage.log.rollouts(iteration + 1, branches.gallery(samples, advantages, iteration + 1, config))
            stage.save_if_due(iteration + 1, parts)

        discriminator.export(stage.dir / "discriminator_hf")
        conclude(stage, policy, processor, engine)


@dataclass(frozen=True)
class ScoredBranches:
    """The discriminator's view of an iteration's samples, before it is updated.

    ``perception`` and ``reasoning`` [N] hold each sample's scores, undefined (and unused) where the response breaks the
    grammar; ``pairs`` sets every valid sample against its prompt's demonstration, per branch.
    """

    perception: Tensor
    reasoning: Tensor
    pairs: list[Pair]

    def advantages(self, samples: Sequence[Sample], config: AlignConfig) -> list[float]:
        """A = alpha GN(s_caption) + (1 - alpha) GN(s_reasoning) - penalty (spec 4.5, Eq. 3)."""
        advantages: list[float] = alignment_advantage(
            self.perception,
            self.reasoning,
            torch.tensor([s.response is not None for s in samples]),
            torch.tensor([s.group for s in samples]),
            perception_weight=config.perception_weight,
            format_penalty=config.format_penalty,
            combine=config.combine,
            eps=config.advantage_eps,
        ).tolist()
        return advantages

    def gallery(
        self, samples: Sequence[Sample], advantages: Sequence[float], iteration: int, config: AlignConfig
    ) -> list[dict[str, object]]:
        """A few of the iteration's rollouts, for the report."""
        rows = []
        for i in range(min(config.run.log_rollouts_per_iteration, len(samples))):
            valid = samples[i].response is not None
            scores = (float(self.perception[i]), float(self.reasoning[i])) if valid else None
            rows.append(gallery_row(samples[i], "align", iteration, judge(samples[i]), advantages[i], scores))
        return rows


def score_branches(
    discriminator: Trained, samples: Sequence[Sample], processor: ChatProcessor, config: AlignConfig
) -> ScoredBranches:
    """Split every valid response, score both parts, and pair them with the demonstration's."""
    teachers: dict[int, tuple[TrainingSequence, TrainingSequence]] = {}
    students: list[TrainingSequence] = []
    pairs: list[Pair] = []
    valid: list[int] = []
    for index, sample in enumerate(samples):
        if sample.response is None:
            continue
        if sample.group not in teachers:
            row = sample.example
            assert row.teacher_caption is not None
            assert row.teacher_reasoning is not None
            teachers[sample.group] = branch_sequences(
                processor, sample.prompt, row.teacher_caption, row.teacher_reasoning
            )
        student = branch_sequences(
            processor, sample.prompt, sample.response.caption_block, sample.response.reasoning_block
        )
        students += student
        pairs += [Pair(t, s) for t, s in zip(teachers[sample.group], student, strict=True)]
        valid.append(index)
    scores = torch.zeros(len(samples), 2)
    if valid:
        scores[valid] = torch.tensor(score(discriminator, students, processor, config)).view(-1, 2)
    return ScoredBranches(scores[:, 0], scores[:, 1], pairs)
