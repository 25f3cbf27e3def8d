"""The policy's side of a stage: sequences to micro-batches, forward, loss, step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from prism_megatron.config import PolicyGradientConfig, StageConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, split_by_tokens
from prism_megatron.loss.policy import PolicyLossConfig, TokenLogprobs, policy_loss
from prism_megatron.loss.reduce import Aggregation, require_finite, sequence_sums, token_weights
from prism_megatron.loss.sft import sft_loss
from prism_megatron.model.logprobs import TokenScores
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, evaluate_step, train_step
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.stages.microbatch import equal_over_ranks, pack_microbatch
from prism_megatron.stages.rollouts import Sample
from prism_megatron.stages.setup import Trained
from prism_megatron.types import PackedBatch

# Nats by which trainer and engine may differ on average over a response. A largest value over tokens would not do: in
# BF16 one of millions is always far off. Rounding gives about 1e-5, 0.02 and 0.1; another picture or policy gives 1.
LOGPROB_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5, "fp8": 1.0}


@dataclass(frozen=True)
class PolicyMicrobatch:
    """A packed batch and what the loss needs about each token, all [T]. The last ones are for policy gradients only.

    ``token_share`` is its part of the global batch's tokens; ``owners`` names the sample of each sequence. Without
    ``old_logprobs`` the policy is still the one that sampled. ``temperature`` is what it sampled at. ``fresh`` is 1 for
    tokens that this iteration's policy sampled.
    """

    packed: PackedBatch
    token_share: float
    owners: tuple[str, ...]
    weights: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    fresh: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Objective:
    """A clipped policy-gradient loss and how its tokens are averaged."""

    loss: PolicyLossConfig
    aggregation: Aggregation


_MAXIMA = ("difference", "response_difference")


def sft_step(
    policy: Trained,
    sequences: Sequence[TrainingSequence],
    owners: Sequence[str],
    processor: ChatProcessor,
    config: StageConfig,
    lr: float,
) -> dict[str, float | None]:
    """Cross-entropy on the responses of the global batch, averaged over its response tokens (spec 2).

    ``owners`` names the row of each sequence.
    """
    batches = _microbatches(sequences, None, None, None, owners, processor, config, "token_mean")

    def loss(batch: PolicyMicrobatch, scores: TokenScores) -> tuple[Tensor, Stats]:
        require_finite("log-probability", _per_sequence(scores.logprobs.detach(), batch.packed), batch.owners)
        value = sft_loss(scores.logprobs, batch.weights)
        return value, Stats({"loss": value.detach()})

    measured, grad_norm = train_step(policy.chunks, policy.optimizer, batches, _forward, loss, lr)
    return {names.LOSS: measured["loss"], names.GRAD_NORM: grad_norm, names.LEARNING_RATE: lr}


def policy_objective(config: PolicyGradientConfig) -> Objective:
    """The loss that a stage's configuration asks for (spec 5.2)."""
    kind = cast(Literal["grpo", "dapo", "gspo"], config.algorithm)
    aggregation: Aggregation = "sequence_mean" if kind == "gspo" else "token_mean"
    loss = PolicyLossConfig(
        kind,
        config.clip_low,
        config.clip_high,
        config.dual_clip or None,
        config.kl_coeff,
        cast(Literal["k1", "k2", "k3"], config.kl_estimator),
        config.importance_cap or None,
    )
    return Objective(loss, "reference" if config.compat == "reference" and kind != "gspo" else aggregation)


def policy_gradient_step(
    policy: Trained,
    reference: Trained | None,
    samples: Sequence[Sample],
    advantages: Sequence[float],
    processor: ChatProcessor,
    objective: Objective,
    config: PolicyGradientConfig,
    lr: float,
    version: int,
) -> dict[str, float | None]:
    """Every update of an iteration: each mini-batch of its samples, as many times as there are epochs (spec 4.6, 5.1).

    The policy is what samples: the model at ``rollout.temperature``. The log-probabilities that ratios are taken to are
    computed once, before the first update. Also measures how far they are from the engine's, on the very tokens that
    were sampled by the policy of this ``version``.
    """
    prepared = []
    for part in mini_batches(samples, config.mini_batches_per_iteration):
        chosen = [samples[i] for i in part]
        batches = _microbatches(
            [sample.sequence() for sample in chosen],
            [advantages[i] for i in part],
            [sample.rollout.logprobs for sample in chosen],
            [sample.rollout.policy_version == version for sample in chosen],
            [sample.example.id for sample in chosen],
            processor,
            config,
            objective.aggregation,
        )
        batches = [replace(batch, temperature=config.rollout.temperature) for batch in batches]
        if has_several_updates(config):
            old = _logprobs(policy, batches)
            batches = [replace(batch, old_logprobs=values) for batch, values in zip(batches, old, strict=True)]
        if reference is not None:
            held = _logprobs(reference, batches)
            batches = [replace(batch, reference_logprobs=values) for batch, values in zip(batches, held, strict=True)]
        prepared.append(batches)

    loss = partial(policy_gradient_loss, objective)
    totals: dict[str, float] = defaultdict(float)
    grad_norms: list[float] = []
    for batches in prepared * config.epochs_per_iteration:
        measured, grad_norm = train_step(policy.chunks, policy.optimizer, batches, _forward, loss, lr)
        grad_norms.append(grad_norm)
        for key, value in measured.items():
            totals[key] = max(totals[key], value) if key in _MAXIMA else totals[key] + value
    check_difference(totals["response_difference"], config)
    tokens, fresh = max(totals["tokens"], 1.0), totals["fresh"]
    return {
        names.POLICY_LOSS: totals["loss"] / len(grad_norms),
        names.GRAD_NORM: sum(grad_norms) / len(grad_norms),
        names.LEARNING_RATE: lr,
        names.CLIP_FRACTION: totals["clipped"] / tokens,
        names.APPROX_KL: totals["drift"] / tokens,
        names.REFERENCE_KL: totals["divergence"] / tokens if reference is not None else None,
        names.TRUNCATED_FRACTION: totals["truncated"] / tokens if config.importance_cap else None,
        names.ENTROPY: totals["entropy"] / tokens,
        names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF: totals["difference"],
        names.TRAIN_ROLLOUT_RESPONSE_ABS_DIFF: totals["response_difference"],
        names.TRAIN_ROLLOUT_MEAN_ABS_DIFF: totals["difference_sum"] / fresh if fresh else None,
        names.TRAIN_ROLLOUT_KL: totals["mismatch"] / fresh if fresh else None,
    }


def check_difference(measured: float, config: PolicyGradientConfig) -> None:
    """Raise RuntimeError where the largest mean difference of a response is more than the configuration allows."""
    limit = config.rollout.max_logprob_abs_diff or LOGPROB_TOLERANCE[config.model.precision]
    if measured > limit:
        raise RuntimeError(
            f"trainer and engine differ by {measured:.2g} nats a token over a response, more than "
            f"rollout.max_logprob_abs_diff allows ({limit:g}): the engine does not run the policy that is being "
            "trained, or does not see what the trainer sees; a greater limit lets it pass"
        )


def policy_gradient_loss(objective: Objective, batch: PolicyMicrobatch, scores: TokenScores) -> tuple[Tensor, Stats]:
    """A micro-batch's part of the loss, and what is logged of it.

    Raises FloatingPointError naming the sample of which something is not finite, what goes in before what comes out.
    """
    packed, mask = batch.packed, batch.packed.loss_mask
    old = scores.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs

    def require(what: str, values: Tensor | None) -> None:
        if values is not None:
            require_finite(what, _per_sequence(values, packed), batch.owners)

    require("advantage", batch.advantages)
    require("engine's log-probability", batch.rollout_logprobs)
    require("reference policy's log-probability", batch.reference_logprobs)
    require("log-probability before the update", batch.old_logprobs)
    require("log-probability", scores.logprobs.detach())
    tokens = TokenLogprobs(scores.logprobs, old, batch.rollout_logprobs, batch.reference_logprobs)
    losses, stats = policy_loss(tokens, batch.advantages, batch.weights, mask, packed.sequence_ids, objective.loss)
    require("policy loss", losses.detach())
    sums = {
        "loss": losses.detach().sum(),
        "clipped": stats.clip_fraction_sum,
        "truncated": stats.truncated_sum,
        "drift": stats.approx_kl_sum,
        "divergence": stats.reference_kl_sum,
        "entropy": (scores.entropy * mask).sum(),
        "tokens": mask.sum(),
    }
    differences, maxima = engine_differences(old - batch.rollout_logprobs, batch.fresh, packed.sequence_ids)
    return losses.sum(), Stats(sums | differences, maxima)


def engine_differences(
    differences: Tensor, fresh: Tensor, sequence_ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and maxima of ``differences`` [T] = log p - log q of trainer and engine, where ``fresh`` [T] is 1.

    exp(d) - 1 - d, a k3 estimate of KL(q || p), is never negative; its tokens are those of the engine, q.
    """
    d = torch.where(fresh > 0, differences, 0.0)
    of_response = sequence_sums(d.abs(), sequence_ids) / sequence_sums(fresh, sequence_ids).clamp(min=1.0)
    sums = {"fresh": fresh.sum(), "difference_sum": d.abs().sum(), "mismatch": (d.exp() - 1 - d).sum()}
    return sums, {"difference": d.abs().max(), "response_difference": of_response.max()}


def has_several_updates(config: PolicyGradientConfig) -> bool:
    """Whether the policy moves within an iteration, away from the one that its ratios are taken to."""
    return config.mini_batches_per_iteration * config.epochs_per_iteration > 1


def mini_batches(samples: Sequence[Sample], count: int) -> list[list[int]]:
    """Samples dealt out so that each mini-batch has as many of every group, whatever rank the group is on."""
    seen: dict[int, int] = defaultdict(int)
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, sample in enumerate(samples):
        parts[seen[sample.group] % count].append(index)
        seen[sample.group] += 1
    return parts


def _logprobs(model: Trained, batches: Sequence[PolicyMicrobatch]) -> list[Tensor]:
    """log p of every target by the model as it is now, [T] per micro-batch."""

    def forward(chunk: Any, batch: PolicyMicrobatch) -> Any:
        output = _forward(chunk, batch)
        return output.logprobs if isinstance(output, TokenScores) else output

    return [values.to(groups.device()) for values in evaluate_step(model.chunks, batches, forward)]


def _per_sequence(values: Tensor, packed: PackedBatch) -> Tensor:
    """Sum over each real sequence's trained tokens."""
    trained = torch.where(packed.loss_mask > 0, values, 0.0)
    return sequence_sums(trained, packed.sequence_ids)[: len(packed.last_tokens)]


def _forward(chunk: Any, batch: PolicyMicrobatch) -> Any:
    return chunk(batch.packed, batch.token_share, temperature=batch.temperature)


def _microbatches(
    sequences: Sequence[TrainingSequence],
    advantages: Sequence[float] | None,
    engine_logprobs: Sequence[Sequence[float]] | None,
    fresh: Sequence[bool] | None,
    owners: Sequence[str],
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
        token_logps, token_fresh = torch.zeros_like(packed.loss_mask), torch.zeros_like(packed.loss_mask)
        if engine_logprobs is not None:
            flat = [value for i in group for value in engine_logprobs[i]]
            token_logps[packed.loss_mask.bool()] = torch.tensor(flat, device=token_logps.device)
        if fresh is not None:
            of_sequence = torch.tensor([*(float(fresh[i]) for i in group), 0.0], device=packed.tokens.device)
            token_fresh = packed.loss_mask * of_sequence[packed.sequence_ids]
        share = sum(len(sequences[i]) for i in group) / max(total_tokens, 1.0)
        names_of = tuple(owners[i] for i in group)
        batches.append(PolicyMicrobatch(packed, share, names_of, weights, token_advantages, token_logps, token_fresh))
    return batches
