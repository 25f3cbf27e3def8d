"""The grammar and the verdicts of the paper's code on complete responses."""

from __future__ import annotations

import pytest

from prism_megatron.reference.verifiable import judge_text


def response(answer: str, caption: str = "- a", think: str = "b") -> str:
    return f"<caption>{caption}</caption>\n<think>{think}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "truth", "correct", "valid"),
    [
        # Spec 1.1: the first of two answers counts, an empty block is valid; spec 5.3: its verdicts.
        (response("5", think="or <answer>4</answer>"), "4", True, True),
        (response("5 kg", caption=" "), "5 lb", True, True),
        (response(""), "4", False, True),
        (response("4" + "0" * 1024), "4" + "0" * 1024, False, True),
        (response("4") + " and more", "4", False, False),
    ],
)
def test_verdicts_by_hand(text: str, truth: str, correct: bool, valid: bool) -> None:
    found, right = judge_text(text, truth)
    assert (found is not None, right) == (valid, correct)
