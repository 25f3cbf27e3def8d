"""Training steps of the policy: supervised fine-tuning and policy gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from prism_megatron.config import PolicyGradientConfig
from prism_megatron.loss.policy import PolicyLossConfig, TokenLogprobs, policy_loss
from prism_megatron.loss.reduce import require_finite, sequence_sums
from prism_megatron.loss.sft import sft_loss
from prism_megatron.model.logprobs import TokenScores
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, evaluate_step, train_step
from prism_megatron.parallel import groups
from prism_megatron.stages.batcher import PolicyMicrobatch, SequenceMicrobatch
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.types import PackedBatch

# Largest mean difference of log-probabilities over a response between trainer and engine, in nats. A limit on single
# tokens would not work: in BF16 one of millions is always far off. Rounding gives about 1e-5, 0.02 and 0.1; a different
# image or policy gives 1.
LOGPROB_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5, "fp8": 1.0}
_MAXIMA = ("difference", "response_difference")


def sft_step(policy: TrainableModel, batches: Sequence[SequenceMicrobatch], lr: float) -> dict[str, float | None]:
    """Take a step on the cross-entropy of the global batch's response tokens, averaged over them (spec 2)."""

    def forward(chunk: Any, batch: SequenceMicrobatch) -> Any:
        return chunk(batch.packed, batch.token_share)

    def loss(batch: SequenceMicrobatch, scores: TokenScores) -> tuple[Tensor, Stats]:
        require_finite("log-probability", _per_sequence(scores.logprobs.detach(), batch.packed), batch.sample_ids)
        value = sft_loss(scores.logprobs, batch.weights)
        return value, Stats({"loss": value.detach()})

    totals, grad_norm = train_step(policy.chunks, policy.optimizer, batches, forward, loss, lr)
    return {names.LOSS: totals["loss"], names.GRAD_NORM: grad_norm, names.LEARNING_RATE: lr}


def policy_loss_config(config: PolicyGradientConfig) -> PolicyLossConfig:
    """The clipped policy-gradient loss that a stage's configuration asks for (spec 5.2)."""
    return PolicyLossConfig(
        cast(Literal["grpo", "dapo", "gspo"], config.algorithm),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_coeff,
        cast(Literal["k1", "k2", "k3"], config.kl_estimator),
        config.importance_cap,
    )


def policy_gradient_step(
    policy: TrainableModel,
    reference: TrainableModel | None,
    batches: Sequence[list[PolicyMicrobatch]],
    config: PolicyGradientConfig,
    lr: float,
) -> dict[str, float | None]:
    """Take every update of an iteration: one for each mini-batch in each epoch (spec 4.6, 5.1).

    The sampling policy is the model at ``rollout.temperature``. Its log-probabilities, the denominators of the ratios,
    are computed once, before the first update. The metrics include how far they are from the engine's, on the tokens
    that the current policy sampled.

    Args:
        policy: The model to train.
        reference: The frozen policy of the KL term, None without one.
        batches: The micro-batches of each mini-batch, from :meth:`Batcher.policy`.
        config: The loss, the number of epochs and the limit on the difference between trainer and engine.
        lr: The learning rate.

    Returns:
        The iteration's metrics by name.
    """
    mini_batches = [_with_logprobs(policy, reference, part, config) for part in batches]
    loss = partial(policy_gradient_loss, policy_loss_config(config))
    totals: dict[str, float] = defaultdict(float)
    grad_norms: list[float] = []
    for microbatches in mini_batches * config.epochs_per_iteration:
        stats, grad_norm = train_step(policy.chunks, policy.optimizer, microbatches, _forward, loss, lr)
        grad_norms.append(grad_norm)
        for key, value in stats.items():
            totals[key] = max(totals[key], value) if key in _MAXIMA else totals[key] + value
    check_difference(totals["response_difference"], config)
    tokens, on_policy = max(totals["tokens"], 1.0), totals["on_policy"]
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
        names.TRAIN_ROLLOUT_MEAN_ABS_DIFF: totals["difference_sum"] / on_policy if on_policy else None,
        names.TRAIN_ROLLOUT_KL: totals["mismatch"] / on_policy if on_policy else None,
    }


def _with_logprobs(
    policy: TrainableModel,
    reference: TrainableModel | None,
    batches: list[PolicyMicrobatch],
    config: PolicyGradientConfig,
) -> list[PolicyMicrobatch]:
    """Add the log-probabilities that the loss compares with: the policy's before its updates, the reference policy's.

    With a single update the policy's are computed by that update itself.
    """
    if has_several_updates(config):
        old = _logprobs(policy, batches)
        batches = [replace(batch, old_logprobs=values) for batch, values in zip(batches, old, strict=True)]
    if reference is not None:
        frozen = _logprobs(reference, batches)
        batches = [replace(batch, reference_logprobs=values) for batch, values in zip(batches, frozen, strict=True)]
    return batches


def check_difference(difference: float, config: PolicyGradientConfig) -> None:
    """Raise RuntimeError if the largest mean difference over a response exceeds the configured limit."""
    limit = config.rollout.max_logprob_abs_diff or LOGPROB_TOLERANCE[config.model.precision]
    if difference > limit:
        raise RuntimeError(
            f"trainer and engine differ by {difference:.2g} nats a token over a response, more than "
            f"rollout.max_logprob_abs_diff allows ({limit:g}): the engine runs another policy, or sees other images, "
            "than the trainer; to continue all the same, raise the limit"
        )


def policy_gradient_loss(
    config: PolicyLossConfig, batch: PolicyMicrobatch, scores: TokenScores
) -> tuple[Tensor, Stats]:
    """Return a micro-batch's part of the loss and its statistics.

    Raises FloatingPointError naming the first sample with a non-finite value; inputs are checked before outputs.
    """
    packed, mask = batch.packed, batch.packed.loss_mask
    old = scores.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs

    def require(what: str, values: Tensor | None) -> None:
        if values is not None:
            require_finite(what, _per_sequence(values, packed), batch.sample_ids)

    require("advantage", batch.advantages)
    require("engine's log-probability", batch.rollout_logprobs)
    require("reference policy's log-probability", batch.reference_logprobs)
    require("log-probability before the update", batch.old_logprobs)
    require("log-probability", scores.logprobs.detach())
    tokens = TokenLogprobs(scores.logprobs, old, batch.rollout_logprobs, batch.reference_logprobs)
    losses, stats = policy_loss(tokens, batch.advantages, batch.weights, mask, packed.sequence_ids, config)
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
    differences, maxima = engine_differences(old - batch.rollout_logprobs, batch.is_on_policy, packed.sequence_ids)
    return losses.sum(), Stats(sums | differences, maxima)


def engine_differences(
    differences: Tensor, is_on_policy: Tensor, sequence_ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return sums and maxima of ``differences`` [T] = log p - log q (trainer, engine), where ``is_on_policy`` [T] is 1.

    exp(d) - 1 - d is a k3 estimate of KL(q || p), because the engine sampled the tokens; it is never negative.
    """
    d = torch.where(is_on_policy > 0, differences, 0.0)
    of_response = sequence_sums(d.abs(), sequence_ids) / sequence_sums(is_on_policy, sequence_ids).clamp(min=1.0)
    sums = {"on_policy": is_on_policy.sum(), "difference_sum": d.abs().sum(), "mismatch": (d.exp() - 1 - d).sum()}
    return sums, {"difference": d.abs().max(), "response_difference": of_response.max()}


def has_several_updates(config: PolicyGradientConfig) -> bool:
    """Return whether an iteration has several updates, so that the policy moves away from the one that sampled."""
    return config.mini_batches_per_iteration * config.epochs_per_iteration > 1


def _logprobs(model: TrainableModel, batches: Sequence[PolicyMicrobatch]) -> list[Tensor]:
    """Return the current model's log p of every target, [T] per micro-batch."""

    def forward(chunk: Any, batch: PolicyMicrobatch) -> Any:
        output = _forward(chunk, batch)
        return output.logprobs if isinstance(output, TokenScores) else output

    return [values.to(groups.device()) for values in evaluate_step(model.chunks, batches, forward)]


def _per_sequence(values: Tensor, packed: PackedBatch) -> Tensor:
    """Sum ``values`` [T] over the trained tokens of each sequence but padding, [N]."""
    trained = torch.where(packed.loss_mask > 0, values, 0.0)
    return sequence_sums(trained, packed.sequence_ids)[: len(packed.last_tokens)]


def _forward(chunk: Any, batch: PolicyMicrobatch) -> Any:
    return chunk(batch.packed, batch.token_share, temperature=batch.temperature)
