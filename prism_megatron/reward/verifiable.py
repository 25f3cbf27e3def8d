"""The verifiable reward: accuracy and format (Eq. 5, spec 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.data.response import parse_response
from prism_megatron.reward.answer import answers_match

_MAX_ANSWER_CHARS = 1024  # spec 5.3


@dataclass(frozen=True)
class VerifiableReward:
    """``score`` is what the policy is paid; ``accuracy`` and ``format`` are 0 or 1."""

    score: float
    accuracy: float
    format: float


def verifiable_reward(
    text: str, ground_truth: str, *, accuracy_weight: float, format_weight: float
) -> VerifiableReward:
    """accuracy_weight * accuracy + format_weight * format. Outside the grammar everything is 0."""
    response = parse_response(text)
    if response is None:
        return VerifiableReward(0.0, 0.0, 0.0)
    answer = response.answer.strip()
    right = len(answer) < _MAX_ANSWER_CHARS and answers_match(answer, ground_truth)
    return VerifiableReward(accuracy_weight * right + format_weight, float(right), 1.0)
