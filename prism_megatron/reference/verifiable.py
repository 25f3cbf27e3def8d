"""Grammar and verdict of the paper's code (spec 1.1, 5.3).

The grammar accepts empty blocks and tags inside blocks, the first ``<answer>`` of the text is judged (D7), and tokens
that the text does not show go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.response import Response
from prism_megatron.reference.answer import is_correct
from prism_megatron.types import Example, Rollout

_RESPONSE = re.compile(
    r"\s*<caption>(?P<caption>.*?)</caption>\s*<think>(?P<think>.*?)</think>(?P<gap>\s*)<answer>(?P<answer>.*?)</answer>\s*",
    re.DOTALL,
)
_FIRST_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MAX_CHARS = 1024  # spec 5.3


def judge(rollout: Rollout, example: Example, processor: ChatProcessor) -> tuple[Response | None, bool]:
    """Return a rollout's blocks, None outside the grammar, and whether its answer is right."""
    if not rollout.finished:
        return None, False
    assert example.answer is not None, "the readers refuse prompts without an answer"
    return judge_text(rollout.text, example.answer, example.equivalent_answers)


def judge_text(text: str, truth: str, equivalents: Sequence[str] = ()) -> tuple[Response | None, bool]:
    """Return a response's blocks, None outside the grammar, and whether the first answer in it is right."""
    response = parse_response(text)
    if response is None:
        return None, False
    match = _FIRST_ANSWER.search(text)
    answer = match[1].strip() if match else ""
    return response, 0 < len(answer) < _MAX_CHARS and is_correct(answer, truth, equivalents)


def parse_response(text: str) -> Response | None:
    """Split a complete response into its blocks; None if it breaks the paper's grammar."""
    match = _RESPONSE.fullmatch(text)
    return Response(**match.groupdict()) if match else None
