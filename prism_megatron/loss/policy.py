"""Clipped policy-gradient losses: GRPO, DAPO and GSPO (spec 4.6, 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prism_megatron.loss.reduce import sequence_sums


@dataclass(frozen=True)
class PolicyLossConfig:
    """``kind`` decides the ratio: per token (grpo, dapo) or per sequence (gspo).

    ``dual_clip`` bounds the loss of negative advantages from above when the ratio is large; None leaves it unbounded.
    """

    kind: Literal["grpo", "dapo", "gspo"]
    clip_low: float
    clip_high: float
    dual_clip: float | None

    def __post_init__(self) -> None:
        if self.kind not in ("grpo", "dapo", "gspo"):
            raise ValueError(f"policy loss must be grpo, dapo or gspo, got {self.kind!r}")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(f"clip_low must be in [0, 1) and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")


@dataclass(frozen=True)
class PolicyStats:
    """Detached sums over trained tokens, for the log: how many were clipped, and k3 estimates of KL(old || new)."""

    clip_fraction_sum: Tensor
    approx_kl_sum: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    config: PolicyLossConfig,
) -> tuple[Tensor, PolicyStats]:
    """-sum w_t min(r_t A_t, clip(r_t) A_t); all inputs [T], ``logprobs`` with gradient.

    ``r_t`` is exp(log p - log p_old) of the token, or for gspo of its sequence's mean, the gradient flowing through
    each token's own log-probability.
    """
    log_ratio = logprobs - old_logprobs
    if config.kind == "gspo":
        lengths = sequence_sums(mask, sequence_ids).clamp(min=1.0)
        mean = (sequence_sums(log_ratio.detach() * mask, sequence_ids) / lengths)[sequence_ids]
        log_ratio = logprobs - logprobs.detach() + mean
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(per_token, -advantages * config.dual_clip)
        per_token = torch.where(advantages < 0, bounded, per_token)
    # Where the mask is 0 a ratio may be anything, infinity included; it must not reach the sum.
    loss = (torch.where(mask > 0, per_token, 0.0) * weights).sum()
    with torch.no_grad():
        active = (-advantages * clipped > -advantages * ratio).float() * mask
        drift = (old_logprobs - logprobs) * mask
        stats = PolicyStats(active.sum(), ((-drift).exp().sub(1) + drift).mul(mask).sum())
    return loss, stats
