"""Answer matching, row by row: what the paper's verifier gets wrong (spec 5.3, 9.2), and how a policy might cheat."""

from __future__ import annotations

import random
import string
from concurrent.futures import ThreadPoolExecutor

import pytest

from prism_megatron.reward.answer import is_correct
from prism_megatron.reward.verifiable import judge_text, overlong_penalty, verifiable_reward

RIGHT = [
    ("1234", "1,234"),
    ("1,234", "1234"),
    ("\\frac{3}{4}", "0.75"),
    ("$2\\sqrt{3}$", "$\\sqrt{12}$"),
    ("√2", "\\sqrt{2}"),
    ("sqrt(2)", "\\sqrt{2}"),
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
    ("x^2+2x+1", "(x+1)^2"),
    ("2, 1", "1, 2"),
    ("B, A", "A, B"),
    ("AC", "A, C"),
    ("A and C", "AC"),
    ("100 cm", "1 m"),
    ("36 km/h", "10 m/s"),
    ("1 ml", "1 cm^3"),
    ("50%", "50%"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("1/2", "50%"),
    ("50\\%", "50 percent"),
    ("$50\\%$", "50%"),
    ("\\boxed{7}", "7"),
    ("$$7$$", "7"),
    ("\\(7\\)", "7"),
    ("**7**", "7"),
    ("x = 7", "7"),
    ("7", "x=7"),
    ("x=7", "x = 7.0"),
    ("x = \\pm 2", "2, -2"),
    ("±2", "-2, 2"),
    ("\\{1, 2\\}", "{2,1}"),
    ("1, 2", "\\{2, 1\\}"),
    ("x=1, y=2", "y=2, x=1"),
    ("x = 1 or x = 2", "x=2, x=1"),
    ("(1) 5 (2) 6", "5; 6"),
    ("60°", "60^\\circ"),
    ("60 degrees", "60°"),
    ("60", "60^{\\circ}"),
    ("$5", "5 dollars"),
    ("\\$5", "5"),
    ("3e8", "3 \\times 10^8"),
    ("3×10^8", "300000000"),
    ("1 1/2", "1.5"),
    ("1\\frac12", "3/2"),
    ("\\dfrac{1}{3}", "0.333333"),
    ("5 m/s²", "5\\ \\text{m/s}^2"),
    ("5\\text{ kg}", "5 kg"),
    ("12 inches", "1 ft"),
    ("5 apples", "5 apple"),
    ("5 apples", "5"),
    ("The answer is 42.", "42"),
    ("(3,\\infty)", "x>3"),
    ("x > 3", "(3, \\infty)"),
    ("(1,2)\\cup(3,4)", "(3,4) \\cup (1,2)"),
    ("y = 2x + 1", "2x - y + 1 = 0"),
    ("1,000,000", "10^6"),
    ("1{,}234", "1234"),
    ("1\\,234", "1234"),
    ("a circle", "circle"),
    ("B. 12", "B"),
    ("12", "B. 12"),
    ("(b)", "B"),
    ("Option C", "C"),
    ("2(x+1)", "2x+2"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("0.5", "1/2"),
    ("-3", "−3"),
    ("３", "3"),
    ("2.50", "2.5"),
    ("007", "7"),
    ("\\text{yes}", "Yes"),
    ("(1, 2)", "(1,2)"),
    ("[1,2]", "[1, 2.0]"),
    ("1:2", "1:2"),
    ("5 square meters", "5 m^2"),
    ("9.8 m/s^2", "9.8 m s^{-2}"),
    ("2π", "2\\pi"),
    ("π/2", "\\frac{\\pi}{2}"),
    ("(x+1)(x-2)", "(x-2)(x+1)"),
    ("-\\frac{1}{2}", "-0.5"),
    ("(1/2, 3)", "(0.5, 3)"),
    ("3 cm", "3"),
    ("3cm", "3 cm"),
    ("3m", "3 m"),
    ("5m/m", "5"),
    ("5", "5kg/kg"),
    ("5Hz/Hz", "5"),
    ("5 km/m", "5000"),
    ("5metre", "5 m"),
    ("5 KPA", "5000 Pa"),
    ("5 MPA", "5 MPa"),
    ("5 MS", "5 ms"),
    ("5 Nm", "5 N m"),
    ("Ms. Smith", "ms. smith"),
    ("room 5 of the house", "Room 5 of the House"),
    ("b. 12", "B. 12"),
    ("b) some text", "B"),
]
WRONG = [
    ("5 kg", "5 lb"),
    ("10 cm", "10 m"),
    ("x=3.5", "x=35"),
    ("(x+1)(x-2)", "x+1x-2"),
    ("(1, 2)", "[1, 2]"),
    ("[0,1)", "[0,1]"),
    ("3.1416", "3.14159"),
    ("1, 2, 3", "1, 2"),
    ("12", "1,2"),
    ("B", "A"),
    ("", "4"),
    ("4", ""),
    ("no", "yes"),
    ("50%", "0.5"),
    ("5", "50%"),
    ("0.5", "50"),
    ("A B C D", "A"),
    ("A or B", "A"),
    ("A, B, C, D", "A"),
    ("A, B", "A"),
    ("A/B", "A"),
    ("A. B. C. D.", "A"),
    ("A) 1 B) 2 C) 3 D) 4", "A"),
    ("(A) (B) (C) (D)", "A"),
    ("the answer is A or B", "A"),
    ("the answer is not A", "A"),
    ("not (A)", "A"),
    ("neither A nor (B)", "B"),
    ("answer", "A"),
    ("abcd", "A"),
    ("ABCD", "A"),
    ("yes and no", "yes"),
    ("yes or no", "yes"),
    ("yes/no", "yes"),
    ("yes no", "no"),
    ("7 or 8", "7"),
    ("7, 8", "7"),
    ("7 8", "7"),
    ("7 = 8", "8"),
    ("5=7", "7"),
    ("x+y=7", "7"),
    ("1=2=7", "7"),
    ("7 \\lor 8", "7"),
    ("\\pm 7", "7"),
    ("\\{7,8\\}", "7"),
    ("[1,10]", "7"),
    ("1 to 10", "7"),
    ("7.", "8"),
    ("1000001", "1000000"),
    ("123456789012345678901", "123456789012345678902"),
    ("1e400", "2e400"),
    ("1e-400", "2e-400"),
    ("1e999999999", "1e999999998"),
    ("10^{-9}", "2\\times10^{-9}"),
    ("3x", "3"),
    ("3", "3x"),
    ("3m", "3"),
    ("dog", "god"),
    ("x=3", "y=3"),
    ("1; 2", "2; 1"),
    ("(1) 6 (2) 5", "(1) 5 (2) 6"),
    ("(2,1)", "(1,2)"),
    ("0=0", "x=3"),
    ("x=x", "x=3"),
    ("x", "7"),
    ("nan", "7"),
    ("inf", "7"),
    ("\\infty", "7"),
    ("5 apples", "5 oranges"),
    ("1/0", "7"),
    ("any", "7"),
    ("all of the above", "A"),
    ("1, 1", "1"),
    ("1,1,2", "1,2,2"),
    ("C", "A, C"),
    ("A, B, C, D", "A, C"),
    ("20°C", "20°F"),
    ("1 rad", "1 degree"),
    ("sin x", "sin y"),
    ("...", "yes"),
    ("$", "5"),
    ("$$", "5"),
    ("\\boxed{}", "5"),
    ("5 kg", "5 m"),
    ("()", "5"),
    ("{}", "5"),
    ("[]", "[1]"),
    ("-5", "5"),
    ("(5)", "-5"),
    ("2^10", "210"),
    ("5 km/m", "5"),
    ("5 MW", "5 mW"),
    ("3 MPa", "3 mPa"),
    ("5 mg", "5 Mg"),
    ("5 Nm", "5 nm"),
    ("5 J/MW", "5 J/mW"),
    ("x = 5 MW", "x = 5 mW"),
    ("5 MW, 3 kg", "5 mW, 3 kg"),
    ("x = 7 = 8", "8"),
    ("x = 7 = 8", "7"),
    ("x = 7 = 8", "x = 8"),
    ("x = y = 8", "8"),
    ("x = 7 \\Rightarrow x = 8", "8"),
    ("7 \\equiv 8", "8"),
    ("a) 1 b) 2 c) 3", "A"),
    ("a. 12", "B. 12"),
    ("the house", "house the"),
]


# 50 % is 0.5 only where the truth says so, and however 0.5 is written: a truth without a unit may be answered with one,
# 0.5 % for 0.5, so that 50 % would be a second right answer, a hundred times the first.
@pytest.mark.parametrize("half", ["0.5", "1/2", "\\frac{1}{2}"])
def test_a_percentage_is_a_fraction_only_where_the_truth_is_a_percentage(half: str) -> None:
    assert is_correct(half, "50%")
    assert not is_correct("50%", half)
    assert is_correct("50%", half, ["50 %"])


@pytest.mark.parametrize(("prediction", "truth"), RIGHT)
def test_the_same_answer(prediction: str, truth: str) -> None:
    assert is_correct(prediction, truth)


@pytest.mark.parametrize(("prediction", "truth"), WRONG)
def test_another_answer(prediction: str, truth: str) -> None:
    assert not is_correct(prediction, truth)


def test_equivalents_are_right_too() -> None:
    assert not is_correct("50%", "0.5")
    assert is_correct("50%", "0.5", ["50%"])
    assert is_correct("New York City", "NYC", ("New York", "New York City"))
    assert not is_correct("", "NYC", ("",))


SYMBOLS = r"\ $ (((( \frac{1}{0} 0/0 ∞ {} , ;"
ODD = [*SYMBOLS.split(), "\0", "7\0", "\ud800", "\u202e7\u202c", "7\u200b"]
LONG = ["a" * 100_000, "9" * 100_000, "1," * 500, "," * 500, "[" * 500 + "]" * 500, "=" * 500, r"\pm" * 100, "$" * 999]
HARD = ["10^{10^{10}}", "10**10**10", "9" * 200 + "!", r"\sum_{i=1}^{10^9} \sin(i)", "x^{99999}-(x+y)^{500}"]
DEEP = ["(" * 120 + "x" + ")" * 120, r"\frac{" * 60 + "1" + "}{2}" * 60, r"\sqrt{" * 80 + "7" + "}" * 80]


@pytest.mark.parametrize("strange", [*ODD, *LONG, *HARD, *DEEP], ids=lambda text: ascii(text[:20]))
def test_whatever_a_model_writes_is_only_wrong(strange: str) -> None:
    assert not is_correct(strange, "7")


def test_ten_thousand_odd_strings() -> None:
    """Nothing raises, and nothing of it is 17. The pieces are the grammar's own, so that every rule is reached."""
    random_ = random.Random(1)
    words = r"\frac \sqrt \boxed \text \pm \{ \} \left( \right) ^{2} \circ √ π { } ( ) [ ] $ $$ , ; = < + - * / ^ % ° ."
    words += " 1 2 9 0.5 1,000 1e9 x y A B kg cm yes no or and not option é 中"
    words += " 5m/m 5kg/kg 2Hz/Hz 9km/m m/m /s per µ"
    pieces = [*words.split(), " ", "\n", "\0"]
    for number in range(10_000):
        if number % 10:
            text = "".join(random_.choices(pieces, k=random_.randint(1, 9)))
        else:
            text = "".join(random_.choices(string.printable + "√π∞½éÀ中\u202e\0", k=random_.randint(1, 40)))
        assert not is_correct(text, "17"), text
        is_correct("17", text)  # a bad truth raises nothing either


def test_worker_threads_may_ask() -> None:
    asked = {r"2\sqrt{3}+1": True, r"9999999!": False, r"1+\sqrt{12}": True}
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(is_correct, [*asked] * 4, [r"\sqrt{12}+1"] * 12, timeout=600))
    assert verdicts == [*asked.values()] * 4


def response(answer: str, caption: str = "- a", think: str = "b") -> str:
    return f"<caption>{caption}</caption>\n<think>{think}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "score", "correct", "valid"),
    [
        (response("4"), 1.0, True, True),
        (response("5"), 0.2, False, True),
        ("the answer is 4", 0.0, False, False),
        (response("4") + " and more", 0.0, False, False),
        (response("5", think="or <answer>4</answer>"), 0.0, False, False),
        (response("4", caption=" "), 0.0, False, False),
        (response("4" + " " * 2000), 1.0, True, True),
        (response("four"), 1.0, True, True),
    ],
)
def test_reward_by_hand(text: str, score: float, correct: bool, valid: bool) -> None:
    found, right = judge_text(text, "4", ("four",))
    assert (found is not None, right) == (valid, correct)
    assert verifiable_reward(correct=correct, valid=valid, accuracy_weight=0.8, format_weight=0.2) == pytest.approx(
        score
    )


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (4096, 0), (6144, -0.5), (8192, -1), (9000, -1)])
def test_overlong_penalty_by_hand(tokens: int, penalty: float) -> None:
    # Spec 5.2: a buffer of 4096 in 8192 tokens, linear.
    assert overlong_penalty(tokens, max_tokens=8192, buffer_tokens=4096, factor=1.0) == penalty
    assert overlong_penalty(tokens, max_tokens=8192, buffer_tokens=4096, factor=0.5) == penalty / 2
