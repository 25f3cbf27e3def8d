"""Cross-entropy on demonstrations (spec 2)."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Return -sum_t w_t log p_t, a scalar in nats, from ``logprobs`` and ``weights`` [T] (see :mod:`loss.reduce`)."""
    return -(logprobs * weights).sum()
