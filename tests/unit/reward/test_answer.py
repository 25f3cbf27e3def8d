"""Answer matching, row by row: what the paper's verifier gets wrong (spec 5.3, 9.2) and what it gets right."""

from __future__ import annotations

import pytest

from prism_megatron.reward.answer import answers_match
from prism_megatron.reward.verifiable import verifiable_reward

RIGHT = [
    ("1234", "1,234"),
    ("1,234", "1234"),
    (r"\frac{3}{4}", "0.75"),
    (r"$2\sqrt{3}$", r"$\sqrt{12}$"),
    ("√2", r"\sqrt{2}"),
    ("5", "5 kg"),
    ("5 kg", "5 KG"),
    ("A. some text", "A"),
    ("A", "A. some text"),
    ("the answer is C", "C"),
    ("b", "B"),
    ("(D)", "D"),
    ("Yes", "yes"),
    ("yes.", "yes"),
    ("blue circle", "Blue Circle"),
    ("1, 2", "1, 2"),
    ("[0, 1)", "[0,1)"),
    (r"x^2+2x+1", r"(x+1)^2"),
]
WRONG = [
    ("5 kg", "5 lb"),
    ("10 cm", "10 m"),
    ("x=3.5", "x=35"),
    ("(x+1)(x-2)", "x+1x-2"),
    ("(1, 2)", "[1, 2]"),
    ("[0,1)", "[0,1]"),
    ("3.1416", "3.14159"),
    ("B, A", "A, B"),
    ("1, 2, 3", "1, 2"),
    ("12", "1,2"),
    ("B", "A"),
    ("", "4"),
    ("4", ""),
    ("no", "yes"),
]


@pytest.mark.parametrize(("prediction", "truth"), RIGHT)
def test_the_same_answer(prediction: str, truth: str) -> None:
    assert answers_match(prediction, truth)


@pytest.mark.parametrize(("prediction", "truth"), WRONG)
def test_another_answer(prediction: str, truth: str) -> None:
    assert not answers_match(prediction, truth)


@pytest.mark.parametrize(
    "strange", ["\\", "$", "((((", "\\frac{1}{0}", "0/0", "∞", "a" * 5000, "9" * 5000, "{}", ",", ";"]
)
def test_whatever_a_model_writes_is_only_wrong(strange: str) -> None:
    assert not answers_match(strange, "7")


def response(answer: str, caption: str = "- a", think: str = "b") -> str:
    return f"<caption>{caption}</caption>\n<think>{think}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "score", "accuracy", "valid"),
    [
        (response("4"), 1.0, 1.0, 1.0),
        (response("5"), 0.2, 0.0, 1.0),
        ("the answer is 4", 0.0, 0.0, 0.0),
        (response("4") + " and more", 0.0, 0.0, 0.0),
        (response("5", think="or <answer>4</answer>"), 0.0, 0.0, 0.0),  # D7: the first of two answers used to count
        (response("4", caption=" "), 0.0, 0.0, 0.0),
        (response("4" + " " * 2000), 1.0, 1.0, 1.0),
    ],
)
def test_reward_by_hand(text: str, score: float, accuracy: float, valid: float) -> None:
    reward = verifiable_reward(text, "4", accuracy_weight=0.8, format_weight=0.2)
    assert (reward.score, reward.accuracy, reward.format) == (pytest.approx(score), accuracy, valid)
