"""Answer verification: equality of a predicted and a true answer (spec 5.3; 9.2 lists the paper's mistakes).

Multiple choice, plain text, numbers with units, lists, tuples and sets are compared here, cheaply; any other expression
goes to math-verify. A prediction must give one answer: alternatives ("A or B", all options, 7 = 8) are wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from prism_megatron.reward.quantity import parse_quantity, same_quantity
from prism_megatron.reward.symbolic import Budget, TooHard, same_symbolically
from prism_megatron.reward.units import is_chinese, same_units_named

_MAX_CHARS = 1024  # spec 5.3
_MAX_SYMBOLIC_CHARS = 256  # a longer "answer" is prose
_MAX_PARTS = 16
_MAX_DEPTH = 8  # lists within lists
_MAX_NESTING = 16  # brackets in algebra

_VULGAR_FRACTIONS = {
    chr(code): r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("⁄"))
    for code in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F))
}
_CHARACTERS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | dict.fromkeys("−–—‐‑", "-")
    | dict.fromkeys("º˚∘", "°")
    | {"、": ",", "。": ".", "“": '"', "”": '"', "’": "'", "‘": "'", "\u2009": " ", "￥": "¥", "￡": "£", "￠": "¢"}
    | {"×": r"\times ", "÷": r"\div ", "⋅": r"\cdot ", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le "}
    | {"≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "}
    | {"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "\u2126": "Ω", "℃": "°C", "℉": "°F"}
    | _VULGAR_FRACTIONS
)
_SUPERSCRIPTS = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_SUBSCRIPTS = re.compile("[₀-₉]+")
_LATEX = (
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle|!)(?![a-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\(?:[,;: ]|quad|qquad)|~"), " "),
    (re.compile(r"\^\s*\{?\\circ\s*\}?|\\degree"), "°"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"百分之\s*([-+]?[\d.]+)"), r"\1%"),
    (re.compile(r"(?:√|\bsqrt)\s*(\d+|\{[^{}]*\}|\([^()]*\)|[a-z]\b)"), lambda m: rf"\sqrt{{{m[1].strip('{}()')}}}"),
    (re.compile(r"\*\*(?=\d)"), "^"),
)
_PREFIX = re.compile(
    r"(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is)?\s*[:=]?\s+(?=\S)"
    r"|(?:option|choice)\s+(?=\(?[A-J]\b)"
    r"|[【\[]?(?:最终|正确)?(?:答案|结果)[】\]]?(?:是|为)?\s*:?\s*(?=\S)"
    r"|故?应?选(?:项|择)?\s*:?\s*(?=\(?[A-J](?![A-Za-z]))",
    re.IGNORECASE,
)
_DELIMITERS = (
    *((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'")),
    ("<answer>", "</answer>"),  # in some data sets' truths
)
_CURRENCY = re.compile(r"([-+]?)\s*(?:US)?\\?([$¥€£₹])\s*(?=[\d.])(.*)")
_CURRENCY_NAMES = {"$": "dollars"}

# Options are A to J: MMMU-Pro has ten.
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[.:)]\s*(.*))?", re.DOTALL)
_SMALL_CHOICE = re.compile(r"\(?[a-j][.:)](?:\s|$)")
_CHOICES = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|&|和|与|及|\band\b)\s*(?:and\s+)?\(?[A-J]\)?)+")
_ENUMERATED_CHOICE = re.compile(r"^\s*([(（]?[A-JＡ-Ｊ][)）]?)\s*、\s*(?!.?[A-JＡ-Ｊ]\b)")  # A、5, but not A、C
_LOOSE_CHOICE = re.compile(
    r"(?:(?i:answer|option|choice)(?:\s+is)?|(?:答案|选项?|选择)(?:是|为)?)\s*:?\s*\(?([A-Ja-j])(?![A-Za-z])\)?|\(([A-J])\)"
)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z])([B-HJ])(?![A-Za-z'])|(?<![A-Za-z])([AI])(?![A-Za-z'])(?!\s+[a-z])")
_NEGATION = re.compile(r"\b(?:not|neither|nor|none|isn't|except)\b|[不非除]", re.IGNORECASE)

_LABEL = re.compile(r"((?:[A-Za-z\u3400-\u9fff]|\\[a-z]+|∠|△)[\w\\ {}()'^°]*?)\s*(?<![<>!])=(?!=)\s*(.+)")
_EQUALS = re.compile(r"=|\\equiv(?![a-z])")
_JOINED = re.compile(r",?\s+(?:and|or)\s+|,?\s*(?:或者?|以?及|和|与)\s*")
_NUMBERED = re.compile(r"\((\d)\)\s*")
_THOUSANDS = re.compile(r",\d{3}(?!\d)")
_FUNCTION = "sin|cos|tan|cot|sec|csc|log|exp|lim|max|min|mod|gcd|lcm"
_PROSE = re.compile(rf"(?<![A-Za-z\\])(?!(?:{_FUNCTION})\b)(?:[A-Za-z]{{3,}}|or|no|is|of|if|to)\b")
_ARTICLE = re.compile(r"^(?:the|an?) ", re.IGNORECASE)
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _Enclosed(NamedTuple):
    brackets: str
    inside: str


def is_correct(prediction: str, truth: str, equivalents: Sequence[str] = ()) -> bool:
    """Return whether ``prediction`` equals ``truth`` or one of its ``equivalents``.

    Any strings are allowed. A prediction that cannot be compared, or not within the time budget of the verdict, is
    wrong. Empty strings never match. Values separated by commas or "and" form a set, values separated by semicolons or
    numbered (1) ... (2) ... a sequence.

    Raises:
        RuntimeError: math-verify is needed and cannot be started.
    """
    predicted, budget = _clean(prediction), Budget()
    try:
        return any(_answers(predicted, _clean(answer), budget) for answer in (truth, *equivalents))
    except TooHard:
        return False


def _answers(predicted: str, truth: str, budget: Budget) -> bool:
    if not predicted or not truth or max(len(predicted), len(truth)) >= _MAX_CHARS:
        return False
    if letters := _several_choices(truth):
        return _several_choices(predicted) == letters or _same_text(predicted, truth)
    if choice := _CHOICE.fullmatch(truth):
        if letter := _choice(predicted):
            return letter == choice[1]  # even if the text of another option is a letter
        return bool(choice[2] and _same(predicted, choice[2].strip(), budget))
    return _same(predicted, truth, budget)


def _same(predicted: str, truth: str, budget: Budget, depth: int = 0) -> bool:
    """Return whether two cleaned answers are equal: cheap comparisons first, algebra last."""
    if depth > _MAX_DEPTH or not predicted or not truth:
        return False
    if _same_text(predicted, truth):
        return True
    quantity, true_quantity = parse_quantity(predicted), parse_quantity(truth)
    if quantity is not None and true_quantity is not None:
        return same_quantity(quantity, true_quantity)
    steps, true_steps = _sequence(predicted), _sequence(truth)
    if max(len(steps), len(true_steps)) > 1:
        return _same_parts(steps, true_steps, budget, depth, ordered=True)
    parts, true_parts = _commas(predicted), _commas(truth)
    enclosed, true_enclosed = _enclosed(predicted), _enclosed(truth)
    # Lists and sets are compared alike, as math-verify does.
    is_set = [side is not None and side.brackets == "{}" for side in (enclosed, true_enclosed)]
    if max(len(parts), len(true_parts)) > 1 or any(is_set):
        members = _commas(enclosed.inside) if enclosed and is_set[0] else parts
        true_members = _commas(true_enclosed.inside) if true_enclosed and is_set[1] else true_parts
        return _same_parts(members, true_members, budget, depth, ordered=False)
    if enclosed and true_enclosed:
        members, true_members = _commas(enclosed.inside), _commas(true_enclosed.inside)
        return enclosed.brackets == true_enclosed.brackets and _same_parts(
            members, true_members, budget, depth, ordered=True
        )
    values = _without_labels(predicted, truth)
    if values != (predicted, truth):
        return _same(*values, budget, depth + 1)
    if len(_EQUALS.findall(predicted)) > len(_EQUALS.findall(truth)):
        return False
    return _is_algebra(predicted) and _is_algebra(truth) and same_symbolically(predicted, truth, budget)


def _same_parts(predicted: list[str], truth: list[str], budget: Budget, depth: int, *, ordered: bool) -> bool:
    if len(predicted) != len(truth) or len(truth) > _MAX_PARTS:
        return False
    if ordered:
        return all(_same(p, t, budget, depth + 1) for p, t in zip(predicted, truth, strict=True))
    left = list(predicted)
    for part in truth:
        match = next((p for p in left if _same(p, part, budget, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _clean(text: str) -> str:
    """Remove delimiters, typography and spacing without meaning."""
    if len(text) >= 4 * _MAX_CHARS:
        return text  # too long, rejected later
    text = " ".join((text if text.isascii() else _without_typography(text)).split())
    for _ in range(4):
        before = text
        text = text.removesuffix(".").rstrip(", ") if not text.endswith("..") else text
        text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
        text = _unboxed(text)
        if text.count("$") - 2 * text.count(r"\$") > 1:
            text = text.replace("$", "").strip()
        for opening, closing in _DELIMITERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
                text = text[len(opening) : -len(closing)].strip()
        if text == before:
            break
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    if amount := _CURRENCY.fullmatch(text):
        text = f"{amount[1]}{amount[3]} {_CURRENCY_NAMES.get(amount[2], amount[2])}"
    return " ".join(text.split())


def _without_typography(text: str) -> str:
    """Replace typographic characters by ASCII or LaTeX."""
    text = _ENUMERATED_CHOICE.sub(r"\1. ", text)
    text = _SUPERSCRIPTS.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    return text.translate(_CHARACTERS)


def _unboxed(text: str) -> str:
    match = re.match(r"\\(?:boxed|fbox)\s*(?=\{)", text)
    if match and (enclosed := _enclosed(text[match.end() :])):
        return enclosed.inside.strip()
    return text


def _same_text(predicted: str, truth: str) -> bool:
    """Compare two texts, ignoring case, article and final punctuation; units keep their case (5 MW, 5 mW)."""
    one, other = (_ARTICLE.sub("", text.rstrip("!.")) for text in (predicted, truth))
    if one == other or one.casefold() != other.casefold():
        return one == other
    words, others = (_WORD.findall(text, _first_digit(text)) for text in (one, other))
    return all(map(same_units_named, words, others))


def _first_digit(text: str) -> int:
    digit = _DIGIT.search(text)
    return digit.start() if digit else len(text)


def _choice(text: str) -> str | None:
    """Return the single option that ``text`` chooses, a capital letter; None for no or several options."""
    if len(text) == 1:
        return text.upper() if text.upper() in "ABCDEFGHIJ" else None
    if _SMALL_CHOICE.match(text):
        text = text.upper()
    match = _CHOICE.fullmatch(text)
    if match is None and _NEGATION.search(text):
        return None
    rest = match[2] or "" if match else text
    if match and re.search(r"(?<![A-Za-z])\(?[A-J][.:)]", rest):
        return None  # a list of the options
    if match:
        return match[1]
    loose = _LOOSE_CHOICE.search(text)
    if loose is None:
        return None
    letter = (loose[1] or loose[2]).upper()
    others = {m[1] or m[2] for m in _OTHER_LETTER.finditer(text)} - {letter}
    return letter if not others else None


def _several_choices(text: str) -> frozenset[str] | None:
    """Return the options of an answer with several right ones (``A, C`` or ``AC``), else None."""
    if _CHOICES.fullmatch(text):
        return frozenset(re.findall(r"[A-J]", text))
    if re.fullmatch(r"[A-J]{2,10}", text) and list(text) == sorted(set(text)):
        return frozenset(text)
    return None


def _sequence(text: str) -> list[str]:
    """Split at ``(1) ... (2) ...`` or at semicolons; without any, return the text as the only part."""
    pieces = _NUMBERED.split(text)
    markers = pieces[1::2]
    if not pieces[0] and len(markers) > 1 and markers == [str(n + 1) for n in range(len(markers))]:
        return [piece.strip(" ,;") for piece in pieces[2::2]]
    return [part.strip() for part in text.split(";") if part.strip()]


def _commas(text: str) -> list[str]:
    """Split a list of values at "and", "or", plus-minus, and commas outside brackets and numbers."""
    parts, depth, start = [], 0, 0
    text = _JOINED.sub(" , ", text)
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character != "," or depth:
            continue
        if not (text[index - 1 : index].isdigit() and _THOUSANDS.match(text, index)):
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return [signed for part in parts for signed in _both_signs(part)]


def _both_signs(text: str) -> list[str]:
    if text.count(r"\pm") != 1:
        return [text]
    before, after = (side.strip() for side in text.split(r"\pm"))
    plus = "+" if before and not before.endswith("=") else ""
    return [f"{before} {plus} {after}".strip(), f"{before} -{after}".strip()]


def _enclosed(text: str) -> _Enclosed | None:
    """Return the outer brackets of an interval (half-open ones mix them), tuple or set, and their content."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    if len(text) < 3 or text[0] not in _CLOSING or text[-1] not in ")]}":
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and index < len(text) - 1:
            return None
    return _Enclosed(text[0] + text[-1], text[1:-1].strip()) if depth == 0 else None


def _without_labels(predicted: str, truth: str) -> tuple[str, str]:
    """Remove ``x =`` from both sides if the labels are equal, or from one side if only that one has a label."""
    labels = _LABEL.fullmatch(predicted), _LABEL.fullmatch(truth)
    if labels[0] and labels[1]:
        same = labels[0][1].replace(" ", "") == labels[1][1].replace(" ", "")
        return (labels[0][2], labels[1][2]) if same else (predicted, truth)
    if labels[0] and "=" not in labels[0][2] + truth:  # a chain, x = 7 = 8, gives two answers
        return labels[0][2], truth
    if labels[1] and "=" not in predicted:
        return predicted, labels[1][2]
    return predicted, truth


def _is_algebra(text: str) -> bool:
    """Return whether math-verify may compare ``text``; it reads words as products of letters: dog equals god."""
    if (
        len(text) > _MAX_SYMBOLIC_CHARS
        or is_chinese(text)
        or "$" in text
        or "boxed" in text
        or _nesting(text) > _MAX_NESTING
    ):
        return False
    return not _PROSE.search(text) and not _COMMAND.sub("1", text).replace(" ", "").isalpha()


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
