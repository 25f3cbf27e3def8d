"""Whether two answers say the same (spec 5.3, and 9.2 for what the paper's verifier gets wrong).

Multiple choice, plain text, numbers with units, and answers of several parts are compared here; everything symbolic is
left to math-verify.
"""

from __future__ import annotations

import logging
import math
import re

from math_verify import parse, verify

# It warns at every call that there is no timeout. The limit on length below is ours.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_RELATIVE_TOLERANCE = 1e-6  # spec 5.3
_MAX_SYMBOLIC_CHARS = 256  # a longer "answer" is prose, and prose can keep a computer algebra system busy for hours
_CHOICE = re.compile(r"\(?([A-H])\)?(?:[.:)]\s*.*)?", re.DOTALL)
_LOOSE_CHOICE = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Ha-h])\b\)?|\(([A-H])\)")
_NUMBER = re.compile(r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*([^\d\s].*)?")
_UNIT = re.compile(r"[A-Za-z°%µμ][A-Za-z°²³/^0-9 ]*")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def answers_match(prediction: str, ground_truth: str) -> bool:
    """Whether ``prediction`` gives the answer ``ground_truth``. Any two strings are allowed; empty ones never match."""
    predicted, truth = _clean(prediction), _clean(ground_truth)
    if not predicted or not truth:
        return False
    if _CHOICE.fullmatch(truth):
        return _choice(predicted) == _choice(truth)
    return _same(predicted, truth)


def _same(predicted: str, truth: str) -> bool:
    if predicted.casefold() == truth.casefold():
        return True
    numbers = _number_and_unit(predicted), _number_and_unit(truth)
    if numbers[0] is not None and numbers[1] is not None:
        return _same_quantity(numbers[0], numbers[1])
    parts = _parts(predicted), _parts(truth)
    if max(map(len, parts)) > 1:
        return len(parts[0]) == len(parts[1]) and all(map(_same, *parts))
    if _brackets(truth) and _brackets(predicted):
        inner = predicted[1:-1].strip(), truth[1:-1].strip()
        return _brackets(predicted) == _brackets(truth) and bool(inner[0]) and _same(*inner)
    return _same_symbolically(predicted, truth)


def _clean(text: str) -> str:
    text = " ".join(text.split())
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return text.removesuffix(".").strip() if not text.endswith("..") else text


def _choice(text: str) -> str | None:
    if match := _CHOICE.fullmatch(text):
        return match[1]
    if len(text) == 1:
        return text.upper()
    if match := _LOOSE_CHOICE.search(text):
        return (match[1] or match[2]).upper()
    return None


def _number_and_unit(text: str) -> tuple[float, str] | None:
    match = _NUMBER.fullmatch(text)
    if not match or not any(character.isdigit() for character in match[1]):
        return None
    unit = (match[2] or "").strip()
    if unit and not _UNIT.fullmatch(unit):
        return None
    return float(match[1].replace(",", "")), unit.casefold()


def _same_quantity(predicted: tuple[float, str], truth: tuple[float, str]) -> bool:
    units_agree = predicted[1] == truth[1] or not predicted[1] or not truth[1]
    return units_agree and math.isclose(predicted[0], truth[0], rel_tol=_RELATIVE_TOLERANCE, abs_tol=0.0)


def _brackets(text: str) -> str | None:
    """The outer brackets of an interval, tuple or set: half-open intervals mix them."""
    return text[0] + text[-1] if text[0] in _CLOSING and text[-1] in _CLOSING.values() else None


def _parts(text: str) -> list[str]:
    """Top-level parts of a list: split at semicolons, else at commas that are not inside brackets or numbers."""
    if ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        thousands = re.match(r",\d{3}(?!\d)", text[index:]) and text[index - 1 : index].isdigit()
        if character == "," and depth == 0 and not thousands:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _same_symbolically(predicted: str, truth: str) -> bool:
    if max(len(predicted), len(truth)) > _MAX_SYMBOLIC_CHARS:
        return False
    # Timeouts in math-verify need signals, which only the main thread has; the length limit above stands in for them.
    sides = [parse(f"${_latex(text)}$", parsing_timeout=None) for text in (truth, predicted)]
    return all(sides) and bool(verify(*sides, timeout_seconds=None))


def _latex(text: str) -> str:
    return re.sub(r"√\s*(\d+|\{[^{}]*\}|\([^()]*\))", r"\\sqrt{\1}", text)
