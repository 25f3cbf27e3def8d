"""The policy's side of a stage: sequences to micro-batches, forward, loss, step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import StageConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, pack, split_by_tokens
from prism_megatron.loss.policy import PolicyLossConfig, policy_loss
from prism_megatron.loss.reduce import Aggregation, token_weights
from prism_megatron.loss.sft import sft_loss
from prism_megatron.model.logprobs import token_entropy, token_logprobs
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, train_step
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import max_over_data_parallel, sum_over_data_parallel
from prism_megatron.stages.rollouts import Sample
from prism_megatron.stages.setup import Trained
from prism_megatron.types import PackedBatch


@dataclass(frozen=True)
class PolicyMicrobatch:
    """A packed batch and what the loss needs about each token, all [T]. The last two are for policy gradients only."""

    packed: PackedBatch
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

    def loss(batch: PolicyMicrobatch, logits: Tensor) -> tuple[Tensor, Stats]:
        value = sft_loss(token_logprobs(logits, batch.packed.targets), batch.weights)
        return value, {"loss": value.detach()}

    sums, grad_norm = train_step(policy.model, policy.optimizer, batches, _forward, loss, lr)
    (mean_loss,) = sum_over_data_parallel(float(sums["loss"]))
    return {names.LOSS: mean_loss, names.GRAD_NORM: grad_norm, names.LEARNING_RATE: lr}


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
    worst = torch.zeros(())

    def loss(batch: PolicyMicrobatch, logits: Tensor) -> tuple[Tensor, Stats]:
        nonlocal worst
        packed, mask = batch.packed, batch.packed.loss_mask
        logprobs = token_logprobs(logits, packed.targets)
        value, stats = policy_loss(
            logprobs, logprobs.detach(), batch.advantages, batch.weights, mask, packed.sequence_ids, objective.loss
        )
        difference = ((logprobs.detach() - batch.rollout_logprobs).abs() * mask).max()
        worst = torch.maximum(worst, difference.cpu())
        return value, {
            "loss": value.detach(),
            "clipped": stats.clip_fraction_sum,
            "entropy": (token_entropy(logits) * mask).sum(),
            "tokens": mask.sum(),
        }

    sums, grad_norm = train_step(policy.model, policy.optimizer, batches, _forward, loss, lr)
    total_loss, clipped, entropy, tokens = sum_over_data_parallel(
        *(float(sums[key]) for key in ("loss", "clipped", "entropy", "tokens"))
    )
    worst_difference = max_over_data_parallel(float(worst))
    limit = config.rollout.max_logprob_abs_diff
    if limit and worst_difference > limit:
        raise RuntimeError(
            f"trainer and engine differ by {worst_difference:.2g} nats on a sampled token, more than "
            f"rollout.max_logprob_abs_diff ({limit:g}): the engine does not run the policy that is being trained"
        )
    return {
        names.POLICY_LOSS: total_loss,
        names.GRAD_NORM: grad_norm,
        names.LEARNING_RATE: lr,
        names.CLIP_FRACTION: clipped / tokens,
        names.ENTROPY: entropy / tokens,
        names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF: worst_difference,
    }


def _forward(model: Any, batch: PolicyMicrobatch) -> Tensor:
    logits: Tensor = model(batch.packed)
    return logits


def _microbatches(
    sequences: Sequence[TrainingSequence],
    advantages: Sequence[float] | None,
    engine_logprobs: Sequence[Sequence[float]] | None,
    processor: ChatProcessor,
    config: StageConfig,
    aggregation: Aggregation,
) -> list[PolicyMicrobatch]:
    response_tokens = float(sum(len(s.response_ids) for s in sequences))
    total_tokens, total_sequences = sum_over_data_parallel(response_tokens, float(len(sequences)))
    batches = []
    for group in split_by_tokens(sequences, config.max_tokens_per_microbatch):
        packed = pack(
            [sequences[i] for i in group],
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
            pad_to_multiple=config.parallel.tensor_model_parallel_size,
        ).to(groups.device())
        weights = token_weights(
            packed.loss_mask,
            packed.sequence_ids,
            aggregation=aggregation,
            total_tokens=total_tokens,
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
        batches.append(PolicyMicrobatch(packed, weights, token_advantages, token_logps))
    return batches
