"""The verifiable reward: accuracy and format (Eq. 5, spec 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.data.response import first_answer, parse_response
from prism_megatron.reward.answer import is_correct
from prism_megatron.reward.reference_answer import is_correct_by_reference

VERIFIERS = {"fixed": is_correct, "reference": is_correct_by_reference}
_MAX_ANSWER_CHARS = 1024  # spec 5.3


@dataclass(frozen=True)
class VerifiableReward:
    """``score`` is what the policy is paid; ``accuracy`` and ``format`` are 0 or 1."""

    score: float
    accuracy: float
    format: float


def verifiable_reward(
    text: str,
    truth: str,
    equivalents: Sequence[str] = (),
    *,
    accuracy_weight: float,
    format_weight: float,
    compat: str = "fixed",
) -> VerifiableReward:
    """accuracy_weight * accuracy + format_weight * format. Outside the grammar everything is 0."""
    response = parse_response(text, compat=compat)
    if response is None:
        return VerifiableReward(0.0, 0.0, 0.0)
    answer = (response.answer if compat == "fixed" else first_answer(text)).strip()
    right = bool(answer) and len(answer) < _MAX_ANSWER_CHARS and VERIFIERS[compat](answer, truth, equivalents)
    return VerifiableReward(accuracy_weight * right + format_weight, float(right), 1.0)


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, factor: float) -> float:
    """DAPO's soft limit on length, in [-factor, 0] (spec 5.2): linear over the last ``buffer_tokens`` of the room."""
    return factor * max(-1.0, min(0.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))
