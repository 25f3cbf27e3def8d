"""The policy's side of a stage: sequences to micro-batches, forward, loss, step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import StageConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, split_by_tokens
from prism_megatron.loss.policy import PolicyLossConfig, policy_loss
from prism_megatron.loss.reduce import Aggregation, token_weights
from prism_megatron.loss.sft import sft_loss
from prism_megatron.model.logprobs import TokenScores
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, train_step
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.stages.microbatch import equal_over_ranks, pack_microbatch
from prism_megatron.stages.rollouts import Sample
from prism_megatron.stages.setup import Trained
from prism_megatron.types import PackedBatch


@dataclass(frozen=True)
class PolicyMicrobatch:
    """A packed batch and what the loss needs about each token, all [T]. The last two are for policy gradients only.

    ``token_share`` is its part of the global batch's tokens.
    """

    packed: PackedBatch
    token_share: float
    weights: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor


@dataclass(frozen=True)
class Objective:
    """A clipped policy-gradient loss and how its tokens are averaged."""

    loss: PolicyLossConfig
    aggregation: Aggregation


def sft_step(
    policy: Trained, sequences: Sequence[TrainingSequence], processor: ChatProcessor, config: StageConfig, lr: float
) -> dict[str, float | None]:
    """Cross-entropy on the responses of the global batch, averaged over its response tokens (spec 2)."""
    batches = _microbatches(sequences, None, None, processor, config, "token_mean")

    def loss(batch: PolicyMicrobatch, scores: TokenScores) -> tuple[Tensor, Stats]:
        value = sft_loss(scores.logprobs, batch.weights)
        return value, Stats({"loss": value.detach()})

    measured, grad_norm = train_step(policy.chunks, policy.optimizer, batches, _forward, loss, lr)
    return {names.LOSS: measured["loss"], names.GRAD_NORM: grad_norm, names.LEARNING_RATE: lr}


def policy_gradient_step(
    policy: Trained,
    samples: Sequence[Sample],
    advantages: Sequence[float],
    processor: ChatProcessor,
    objective: Objective,
    config: StageConfig,
    lr: float,
) -> dict[str, float | None]:
    """One on-policy step: the old log-probabilities are the current ones, detached (spec 4.6, 5.1).

    Also measures how far the trainer's log-probabilities are from the engine's on the very tokens that were sampled.
    """
    sequences = [sample.sequence() for sample in samples]
    engine_logprobs = [sample.rollout.logprobs for sample in samples]
    batches = _microbatches(sequences, advantages, engine_logprobs, processor, config, objective.aggregation)

    def loss(batch: PolicyMicrobatch, scores: TokenScores) -> tuple[Tensor, Stats]:
        packed, mask, logprobs = batch.packed, batch.packed.loss_mask, scores.logprobs
        value, stats = policy_loss(
            logprobs, logprobs.detach(), batch.advantages, batch.weights, mask, packed.sequence_ids, objective.loss
        )
        difference = ((logprobs.detach() - batch.rollout_logprobs).abs() * mask).max()
        sums = {
            "loss": value.detach(),
            "clipped": stats.clip_fraction_sum,
            "entropy": (scores.entropy * mask).sum(),
            "tokens": mask.sum(),
        }
        return value, Stats(sums, {"difference": difference})

    measured, grad_norm = train_step(policy.chunks, policy.optimizer, batches, _forward, loss, lr)
    limit = config.rollout.max_logprob_abs_diff
    if limit and measured["difference"] > limit:
        raise RuntimeError(
            f"trainer and engine differ by {measured['difference']:.2g} nats on a sampled token, more than "
            f"rollout.max_logprob_abs_diff ({limit:g}): the engine does not run the policy that is being trained"
        )
    return {
        names.POLICY_LOSS: measured["loss"],
        names.GRAD_NORM: grad_norm,
        names.LEARNING_RATE: lr,
        names.CLIP_FRACTION: measured["clipped"] / measured["tokens"],
        names.ENTROPY: measured["entropy"] / measured["tokens"],
        names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF: measured["difference"],
    }


def _forward(chunk: Any, batch: PolicyMicrobatch) -> Any:
    return chunk(batch.packed, batch.token_share)


def _microbatches(
    sequences: Sequence[TrainingSequence],
    advantages: Sequence[float] | None,
    engine_logprobs: Sequence[Sequence[float]] | None,
    processor: ChatProcessor,
    config: StageConfig,
    aggregation: Aggregation,
) -> list[PolicyMicrobatch]:
    response_tokens = float(sum(len(s.response_ids) for s in sequences))
    trained_tokens, total_sequences, total_tokens = sum_over_data_parallel(
        response_tokens, len(sequences), sum(map(len, sequences))
    )
    batches = []
    for group in equal_over_ranks(split_by_tokens(sequences, config.max_tokens_per_microbatch), config.parallel):
        packed = pack_microbatch([sequences[i] for i in group], processor, config)
        weights = token_weights(
            packed.loss_mask,
            packed.sequence_ids,
            aggregation=aggregation,
            total_tokens=trained_tokens,
            total_sequences=total_sequences,
        )
        token_advantages = torch.zeros_like(packed.loss_mask)
        if advantages is not None:
            # Padding, if any, is one more sequence.
            per_sequence = torch.tensor([*(advantages[i] for i in group), 0.0], device=packed.tokens.device)
            token_advantages = per_sequence[packed.sequence_ids]
        token_logps = torch.zeros_like(packed.loss_mask)
        if engine_logprobs is not None:
            flat = [value for i in group for value in engine_logprobs[i]]
            token_logps[packed.loss_mask.bool()] = torch.tensor(flat, device=token_logps.device)
        share = sum(len(sequences[i]) for i in group) / max(total_tokens, 1.0)
        batches.append(PolicyMicrobatch(packed, share, weights, token_advantages, token_logps))
    return batches
