"""The paper's verdicts, every row of the table of spec 5.3 and its order of judgement."""

from __future__ import annotations

import pytest

from prism_megatron.reference import answer as reference
from prism_megatron.reward.answer import is_correct

# prediction, truth, the reference's verdict, the right one
TABLE = [
    ("1234", "1,234", False, True),
    ("5 kg", "5 lb", True, False),
    ("10 cm", "10 m", True, False),
    ("50%", "50", True, True),
    ("50%", "0.5", True, False),
    ("x=3.5", "x=35", True, False),
    ("(x+1)(x-2)", "x+1x-2", True, False),
    ("(1, 2)", "[1, 2]", True, False),
    (r"$2\sqrt{3}$", r"$\sqrt{12}$", False, True),
    ("√2", r"\sqrt{2}", False, True),
    (r"\frac{3}{4}", "0.75", True, True),
    ("3.1416", "3.14159", False, False),
    ("B, A", "A, B", False, True),
    ("A", "A. some text", False, True),
    ("B", "B. 12", True, True),
    ("the answer is C", "C", True, True),
    ("b", "B", True, True),
]
# The order of judgement beyond the table.
MORE = [
    ("(1) 5 (2) 6", "(1) 5 (2) 6.0", True),
    ("(1) 6 (2) 5", "(1) 5 (2) 6", False),
    ("5; 6", "5；6", True),
    ("1, 2", "1, 2, 3", False),
    ("the point (3, 4)", "(3,4)", False),  # 3,4 loses its comma as if it were a thousand
    ("the point (3, 4)", "(3, 4)", True),  # the rest of the text is ignored
    ("C is wrong: answer B", "B", True),
    ("(A) and (B)", "A", True),  # the earliest
    (r"\( \dfrac{1}{2} \)", r"\frac{1}{2}", True),
    ("**Yes!**", "yes", True),
    ("5 people", "5", True),
    ("1e-9", "0", False),  # a truth of 0 is compared exactly
    ("", "4", False),
    ("9" * 200 + "!", "4", False),
]


@pytest.mark.parametrize(("prediction", "truth", "verdict", "right"), TABLE)
def test_the_table(prediction: str, truth: str, verdict: bool, right: bool) -> None:
    assert reference.is_correct(prediction, truth) is verdict
    assert is_correct(prediction, truth) is right


@pytest.mark.parametrize(("prediction", "truth", "verdict"), MORE)
def test_the_order_of_judgement(prediction: str, truth: str, verdict: bool) -> None:
    assert reference.is_correct(prediction, truth) is verdict
