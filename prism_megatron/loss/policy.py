"""Clipped policy-gradient losses: GRPO, DAPO and GSPO (spec 4.6, 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.loss.reduce import sequence_sums


@dataclass(frozen=True)
class PolicyLossConfig:
    """``kind`` decides the ratio: per token (grpo, dapo) or per sequence (gspo).

    dual_clip       bounds the loss of negative advantages from above when the ratio is large; None leaves it unbounded
    kl_coeff        weight of the KL divergence from a reference policy, estimated by ``kl_estimator``; 0 for none
    importance_cap  truncates the correction for the trainer and the engine not being the same policy; None for none
    """

    kind: Literal["grpo", "dapo", "gspo"]
    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    kl_coeff: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("grpo", "dapo", "gspo"):
            raise UserError(f"policy loss must be grpo, dapo or gspo, got {self.kind!r}")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise UserError(f"clip_low must be in [0, 1) and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip must be above 1, got {self.dual_clip}")
        if self.kl_coeff < 0:
            raise UserError(f"kl_coeff must not be negative, got {self.kl_coeff}")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise UserError(f"kl_estimator must be k1, k2 or k3, got {self.kl_estimator!r}")
        if self.importance_cap is not None and self.importance_cap < 1:
            raise UserError(f"importance_cap must be at least 1, got {self.importance_cap}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the same sampled tokens, each [T] in nats, only ``current`` with gradient.

    ``old`` is the policy before this iteration's first update, which ratios are taken to; ``engine`` what sampled the
    tokens; ``reference`` the policy that a KL term holds on to.
    """

    current: Tensor
    old: Tensor
    engine: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyStats:
    """Detached sums over trained tokens, for the log.

    How many were clipped, how many had their importance weight truncated, k3 estimates of KL(old || new), and estimates
    of KL(new || reference), weighted as in the loss.
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
    """w_t (-u_t min(r_t A_t, clip(r_t) A_t) + kl_coeff v_t KL_t), summed up the loss; all inputs [T], and the result.

    ``r_t`` is exp(log p - log p_old) of the token, or for gspo of its sequence's mean, the gradient flowing through
    each token's own log-probability. ``u_t`` = min(exp(log p_old - log p_engine), importance_cap), of the token or for
    gspo of its sequence's mean, as the ratio is: it makes the expectation, taken over what the engine sampled, one over
    what the trainer's policy would have. ``v_t`` = u_t p / p_old, without gradient, does the same for the KL
    divergence, which is that of the policy as it is now: 1 while the policy has not moved and there is no cap.
    """
    # Where the mask is 0 a log-probability may be anything, infinity included; it must not reach a sum or a gradient.
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
    """The mean of each token's sequence over its trained tokens, [T]; ``values`` [T] are 0 where nothing is trained."""
    lengths = sequence_sums(mask, sequence_ids).clamp(min=1.0)
    return (sequence_sums(values, sequence_ids) / lengths)[sequence_ids]


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens the policy sampled, [T].

    With d = log p - log p_ref: k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d. The gradient of k1 as it stands has
    expectation zero whatever the policies are, so k1 is given the gradient of k2, d times that of log p, which is the
    gradient of the KL divergence.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    k2 = difference.square() / 2
    return k2 if estimator == "k2" else k2 + (difference - k2).detach()
