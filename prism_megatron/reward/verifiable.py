"""The verifiable reward: accuracy and format (Eq. 5, spec 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.response import Response, parse_response
from prism_megatron.reward.answer import is_correct
from prism_megatron.types import Example, Rollout


def judge(rollout: Rollout, example: Example, processor: ChatProcessor) -> tuple[Response | None, bool]:
    """Return a rollout's blocks, None outside the grammar, and whether its answer is right.

    A rollout truncated at the length limit is outside the grammar. So is one with a token that its text does not
    show, other than the last: the text cannot be judged for it.
    """
    if not rollout.finished or not processor.has_text(rollout.token_ids[:-1]):
        return None, False
    assert example.answer is not None, "the readers refuse prompts without an answer"
    return judge_text(rollout.text, example.answer, example.equivalent_answers)


def judge_text(text: str, truth: str, equivalents: Sequence[str] = ()) -> tuple[Response | None, bool]:
    """Return a response's blocks, None outside the grammar, and whether its answer is right."""
    response = parse_response(text)
    return response, response is not None and is_correct(response.answer, truth, equivalents)


def verifiable_reward(*, correct: bool, valid: bool, accuracy_weight: float, format_weight: float) -> float:
    """Return accuracy_weight * correct + format_weight * valid."""
    return accuracy_weight * correct + format_weight * valid


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int, factor: float) -> float:
    """Return DAPO's soft length penalty (spec 5.2): from 0 down to -factor over the last ``buffer_tokens``."""
    return factor * max(-1.0, min(0.0, (max_tokens - buffer_tokens - num_tokens) / buffer_tokens))
