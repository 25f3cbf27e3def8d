"""Answer verification of the paper's code, its mistakes included (spec 5.3, 9.2).

:mod:`prism_megatron.reward.answer` is the verifier to train with. This one accepts 5 kg for 5 lb, (1, 2) for [1, 2] and
x=3.5 for x=35, and rejects 1234 for 1,234.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prism_megatron.reward.symbolic import Budget, TooHard, same_as_extracted

_RELATIVE_TOLERANCE = 1e-6
_PAIR = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*,\s*([-+]?\d+(?:\.\d+)?)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_TRUTH_CHOICE = re.compile(r"([A-H])|\(([A-H])\)\s*\S.*|([A-H])\.\s+[(\[{\d+−-].*", re.DOTALL)
_WHOLE_CHOICE = re.compile(r"[(\[]?([A-Ha-h])[)\]]?[.:]?")
_CHOICE_BY_PRIORITY = (
    re.compile(r"\b(?:answer|option|choice|is)\b\s*(?:is\b)?\s*:?\s*\(?([A-H])\b|:\s*\(?([A-H])\b", re.IGNORECASE),
    re.compile(r"\(([A-H])\)"),
    re.compile(r"\b([A-H])[.)]"),
)
_UNIT = re.compile(
    r"(?<=\d)\s*(°C|°F|°|%|mm|cm|dm|km|m|inch|ft|kg|mg|lb|min|hour|h|day|year|s|plates|pieces|items|people|students|times"
    r"|ml|L|cm[²³]|m[²³]|米|厘米|毫米|千米|千克|克|度|秒|分钟|小时|天|年|个|人|元)$"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def is_correct(prediction: str, truth: str, equivalents: Sequence[str] = ()) -> bool:
    """Return the paper's verdict; as safe as :func:`prism_megatron.reward.answer.is_correct` for any strings."""
    budget = Budget()
    try:
        return any(_judge(prediction.strip(), answer.strip(), budget) for answer in (truth, *equivalents))
    except TooHard:
        return False


def _judge(prediction: str, truth: str, budget: Budget) -> bool:
    if not prediction or not truth:
        return False
    parts = _parts(prediction), _parts(truth)
    if max(map(len, parts)) > 1:
        return len(parts[0]) == len(parts[1]) and all(map(_exact, *parts))
    return _exact(prediction, truth) or _by_math_verify(prediction, truth, budget)


def _parts(text: str) -> list[str]:
    """Split at (1) ... (2) ..., else at semicolons, else at commas outside brackets, those of 1,234 included."""
    markers = list(re.finditer(r"\(\d\)", text))
    if len(markers) > 1 and markers[0].start() <= 2:
        ends = [marker.start() for marker in markers[1:]] + [len(text)]
        return [text[marker.end() : end].strip() for marker, end in zip(markers, ends, strict=True)]
    if re.search("[;；]", text):
        return [part.strip() for part in re.split("[;；]", text) if part.strip()]
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _exact(prediction: str, truth: str) -> bool:
    prediction, truth = _simple(prediction), _simple(truth)
    points, true_points = _points(prediction), _points(truth)
    if points and true_points:
        return len(points) == len(true_points) and all(
            abs(a - b) <= _RELATIVE_TOLERANCE for a, b in zip(points, true_points, strict=True)
        )
    if choice := _TRUTH_CHOICE.fullmatch(truth):
        return _predicted_choice(prediction) in choice.groups(default="")
    if prediction == truth:
        return True
    (number, unit), (true_number, true_unit) = _without_unit(prediction), _without_unit(truth)
    if _NUMBER.fullmatch(number) and _NUMBER.fullmatch(true_number):
        # Units are ignored.
        value, true_value = float(number), float(true_number)
        return value == 0 if true_value == 0 else abs(value - true_value) / abs(true_value) < _RELATIVE_TOLERANCE
    if _normalized(prediction) == _normalized(truth):
        return True
    return unit == true_unit and _normalized(number) == _normalized(true_number)


def _points(text: str) -> list[float]:
    return [float(number) for pair in _PAIR.findall(text) for number in pair]


def _simple(text: str) -> str:
    text = _undelimited(text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = " ".join(text.split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    return text.replace("，", "").removesuffix(".").strip()


def _undelimited(text: str) -> str:
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            return text[len(opening) : -len(closing)].strip()
    return text


def _predicted_choice(text: str) -> str | None:
    if whole := _WHOLE_CHOICE.fullmatch(text):
        return whole[1].upper()
    for pattern in _CHOICE_BY_PRIORITY:
        if match := pattern.search(text):
            return str(next(filter(None, match.groups()))).upper()
    return None


def _without_unit(text: str) -> tuple[str, str]:
    match = _UNIT.search(text)
    return (text[: match.start()].strip(), match[1]) if match else (text, "")


def _normalized(text: str) -> str:
    """Return ``text`` in lower case without punctuation, decimal points and brackets included."""
    return re.sub(r"\*\*|[.,!?:;()\[\]{}'\"]|\s", "", text.lower())


def _by_math_verify(prediction: str, truth: str, budget: Budget) -> bool:
    """Ask math-verify about the plain and the normalised text; without its $ delimiters LaTeX is not recognised."""
    variants = [(_undelimited(prediction), _undelimited(truth)), (_normalized(prediction), _normalized(truth))]
    return any(same_as_extracted(*variant, budget) for variant in variants)
