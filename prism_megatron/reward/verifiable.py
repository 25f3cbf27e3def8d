"""The verifiable reward: accuracy and format (Eq. 5, spec 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.data.response import Response, first_answer, parse_response
from prism_megatron.reward.answer import is_correct
from prism_megatron.reward.reference_answer import is_correct_by_reference

_REFERENCE_MAX_CHARS = 1024  # spec 5.3; is_correct has a limit of its own


def judge(
    text: str, truth: str, equivalents: Sequence[str] = (), *, compat: str = "fixed"
) -> tuple[Response | None, bool]:
    """What a response says, None outside the grammar, and whether it is inside and its answer right."""
    response = parse_response(text, compat=compat)
    if response is None:
        return None, False
    if compat == "fixed":
        return response, is_correct(response.answer, truth, equivalents)
    answer = first_answer(text).strip()
    short = 0 < len(answer) < _REFERENCE_MAX_CHARS
    return response, short and is_correct_by_reference(answer, truth, equivalents)


def verifiable_reward(*, correct: bool, valid: bool, accuracy_weight: float, format_weight: float) -> float:
    """accuracy_weight * correct + format_weight * valid."""
    return accuracy_weight * correct + format_weight * valid


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, factor: float) -> float:
    """DAPO's soft limit on length, in [-factor, 0] (spec 5.2): linear over the last ``buffer_tokens`` of the room."""
    return factor * max(-1.0, min(0.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))
