"""Cutting both sides of a pair, by hand. What else is known of branches is in tests/unit/test_reference_defects.py."""

from __future__ import annotations

import pytest

from prism_megatron.data.branches import cut_alike
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import PERCEPTION, EncodedPrompt

END = 99


@pytest.mark.parametrize(
    ("teacher", "student", "limit", "length"),
    [
        (6, 6, 4, 3),
        (6, 4, 4, 2),  # the student's own end would be left
        (3, 9, 4, 1),
        (5, 5, 4, 3),
    ],
)
def test_both_sides_end_at_the_same_token_and_neither_at_its_own(
    teacher: int, student: int, limit: int, length: int
) -> None:
    """Lengths with the terminator; ``length`` without it."""
    prompt = EncodedPrompt((1, 2))
    ids = [(*range(10, 9 + count), END) for count in (teacher, student)]
    sides = [TrainingSequence(prompt, response, PERCEPTION) for response in ids]
    for side, whole in zip(cut_alike(sides[0], sides[1], limit), ids, strict=True):
        assert side.response_ids == (*whole[:length], END)
        assert len(side.response_ids) <= limit
        assert (side.prompt, side.branch) == (prompt, PERCEPTION)
