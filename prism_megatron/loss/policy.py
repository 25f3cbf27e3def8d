"""Clipped policy-gradient losses: GRPO, DAPO and GSPO (spec 4.6, 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prism_megatron.loss.reduce import sequence_sums


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of :func:`policy_loss`; the stage's configuration checks their ranges.

    kind            decides the ratio: per token (grpo, dapo) or per sequence (gspo)
    dual_clip       upper bound of the loss of negative advantages, in units of |A|; None for none
    kl_coeff        weight of the KL divergence from a reference policy, estimated by ``kl_estimator``; 0 for none
    importance_cap  truncation of the importance weights between trainer and engine; None for no such weights
    """

    kind: Literal["grpo", "dapo", "gspo"]
    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    kl_coeff: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_cap: float | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the same sampled tokens, each [T] in nats; only ``current`` has a gradient.

    ``old`` is the policy before this iteration's first update, the denominator of ratios; ``engine`` the policy that
    sampled; ``reference`` the policy of the KL term.
    """

    current: Tensor
    old: Tensor
    engine: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyStats:
    """Detached sums over trained tokens, for the log.

    clip_fraction_sum  number of clipped tokens
    truncated_sum      number of tokens whose importance weight was truncated
    approx_kl_sum      k3 estimates of KL(old || new)
    reference_kl_sum   estimates of KL(new || reference), weighted as in the loss
    """

    clip_fraction_sum: Tensor
    truncated_sum: Tensor
    approx_kl_sum: Tensor
    reference_kl_sum: Tensor


def policy_loss(
    logprobs: TokenLogprobs,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    config: PolicyLossConfig,
) -> tuple[Tensor, PolicyStats]:
    """Return the loss of every token, [T], to be summed:

        w_t (u_t max(-r_t A_t, -clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coeff v_t KL_t)

    with r_t = exp(log p - log p_old) of the token or, for gspo, of its sequence's mean, the gradient then flowing
    through each token's own log-probability. For A_t < 0 the maximum is bounded by -``dual_clip`` A_t.
    u_t = min(exp(log p_old - log p_engine), importance_cap), of the token or for gspo of its sequence's mean, turns the
    expectation over the engine's samples into one over the trainer's policy. v_t = u_t p / p_old, without gradient,
    does the same for the KL divergence of the current policy; it is 1 before the first update without a cap.

    Args:
        logprobs: Log-probabilities of the sampled tokens; values where ``mask`` is 0 are ignored.
        advantages: A_t, [T].
        weights: w_t from :mod:`loss.reduce`, [T].
        mask: 1 for trained tokens, [T].
        sequence_ids: The sequence of each token, [T] int64.
        config: Clipping, KL term and importance weights.
    """
    # Where the mask is 0 a log-probability may be infinite; it must not reach a sum or a gradient.
    trained = mask > 0
    current, old = torch.where(trained, logprobs.current, 0.0), torch.where(trained, logprobs.old, 0.0)
    log_ratio = current - old
    if config.kind == "gspo":
        log_ratio = current - current.detach() + _sequence_means(log_ratio.detach(), mask, sequence_ids)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(per_token, -advantages * config.dual_clip)
        per_token = torch.where(advantages < 0, bounded, per_token)
    importance, weight = torch.ones_like(old), torch.ones_like(old)
    if config.importance_cap is not None:
        assert logprobs.engine is not None
        mismatch = torch.where(trained, old - logprobs.engine, 0.0)
        if config.kind == "gspo":
            mismatch = _sequence_means(mismatch, mask, sequence_ids)
        importance = mismatch.exp()
        weight = importance.clamp(max=config.importance_cap)
        per_token = per_token * weight
    divergence = torch.zeros_like(old)
    if config.kl_coeff:
        assert logprobs.reference is not None
        moved = (current.detach() - old).exp()
        estimate = kl_estimate(current, torch.where(trained, logprobs.reference, 0.0), config.kl_estimator)
        divergence = weight * moved * estimate
        per_token = per_token + config.kl_coeff * divergence
    losses = torch.where(trained, per_token, 0.0) * weights
    with torch.no_grad():
        drift = old - current
        stats = PolicyStats(
            clip_fraction_sum=((-advantages * clipped > -advantages * ratio) & trained).float().sum(),
            truncated_sum=((importance > (config.importance_cap or float("inf"))) & trained).float().sum(),
            approx_kl_sum=((-drift).exp().sub(1) + drift).sum(),
            reference_kl_sum=divergence.sum(),
        )
    return losses, stats


def _sequence_means(values: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return the mean over the trained tokens of each token's sequence, [T]; ``values`` [T] are 0 elsewhere."""
    lengths = sequence_sums(mask, sequence_ids).clamp(min=1.0)
    return (sequence_sums(values, sequence_ids) / lengths)[sequence_ids]


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens that the policy sampled, [T].

    With d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. The plain gradient of k1 has expectation
    zero for any policies, so k1 gets the gradient of k2, d times that of log p: the gradient of the KL divergence.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    k2 = difference.square() / 2
    return k2 if estimator == "k2" else k2 + (difference - k2).detach()
