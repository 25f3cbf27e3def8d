"""Numbers as people write them, with their units: what math-verify has no rules for.

A value is exact: 1000001 is not 1000000, and 1/3 is only approached by 0.333333. Units of one dimension are converted
(100 cm is 1 m, 10 cm is not 10 m); currencies, counted things and temperatures each are a dimension of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

_RELATIVE_TOLERANCE = Fraction(1, 10**6)  # spec 5.3
_MAX_EXPONENT = 400  # beyond it, 1e9999999 would be written out

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<whole>\d+)?\s*\\frac\s*(?:\{{(?P<a>\d+)\}}\s*\{{(?P<b>\d+)\}}|(?P<c>\d)\s*(?P<d>\d))"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<e>\d+)\s*/\s*(?P<f>\d+)"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+)|\s*(?:\\times|\\cdot|[*x])\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d+)\s*\}}?)?"
    r")(?P<unit>(?P<space>\s*)[^\d\s.,/].*)?"
)
_FACTOR = re.compile(r"([A-Za-zµμΩ°%$]+)(?:\^?\{?(-?\d)\}?)?")
_FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "lim", "max", "min", "mod"))


@dataclass(frozen=True)
class Unit:
    """A factor and the dimensions with their powers, for example 1000/3600 and (("metre", 1), ("second", -1)).

    No dimensions: they cancel. ``counted``: words for what is counted, a dimension of their own.
    """

    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]
    counted: bool = False


_SCALES = {"n": -9, "µ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_SCALED = {"m": "metre", "g": "gram", "s": "second", "l": "litre", "L": "litre", "N": "newton", "J": "joule"} | {
    "W": "watt",
    "Pa": "pascal",
    "V": "volt",
    "A": "ampere",
    "Hz": "hertz",
    "Ω": "ohm",
    "mol": "mole",
    "K": "kelvin",
    "eV": "electronvolt",
    "cal": "calorie",
    "Nm": "newton metre",
    "metre": "metre",
    "meter": "metre",
    "gram": "gram",
    "liter": "litre",
    "litre": "litre",
    "newton": "newton",
    "joule": "joule",
    "watt": "watt",
    "volt": "volt",
    "ohm": "ohm",
}
_NAMED = {
    "inch": ("metre", "0.0254"),
    "in": ("metre", "0.0254"),
    "inches": ("metre", "0.0254"),
    "ft": ("metre", "0.3048"),
    "foot": ("metre", "0.3048"),
    "feet": ("metre", "0.3048"),
    "yd": ("metre", "0.9144"),
    "yard": ("metre", "0.9144"),
    "mi": ("metre", "1609.344"),
    "mile": ("metre", "1609.344"),
    "micron": ("metre", "0.000001"),
    "lb": ("gram", "453.59237"),
    "pound": ("gram", "453.59237"),
    "oz": ("gram", "28.349523125"),
    "ounce": ("gram", "28.349523125"),
    "t": ("gram", "1000000"),
    "tonne": ("gram", "1000000"),
    "sec": ("second", "1"),
    "second": ("second", "1"),
    "min": ("second", "60"),
    "minute": ("second", "60"),
    "h": ("second", "3600"),
    "hr": ("second", "3600"),
    "hour": ("second", "3600"),
    "day": ("second", "86400"),
    "week": ("second", "604800"),
    "deg": ("degree", "1"),
    "degree": ("degree", "1"),
    "°": ("degree", "1"),
    "rad": ("radian", "1"),
    "radian": ("radian", "1"),
    "°C": ("celsius", "1"),
    "°F": ("fahrenheit", "1"),
    "%": ("percent", "1"),
    "percent": ("percent", "1"),
    "$": ("dollar", "1"),
    "dollar": ("dollar", "1"),
    "USD": ("dollar", "1"),
    "cent": ("dollar", "0.01"),
    "mph": ("mph", "1"),
}
_DERIVED = {
    "litre": Unit(Fraction(1, 1000), (("metre", 3),)),  # a cubic decimetre, so that 1 ml is 1 cm^3
    "newton metre": Unit(Fraction(1), (("metre", 1), ("newton", 1))),
}
_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}


@dataclass(frozen=True)
class Quantity:
    """``exact``: without a decimal point. ``may_lack_unit``: what stands there is surely a unit, not algebra."""

    value: Fraction
    unit: Unit | None = None
    exact: bool = True
    may_lack_unit: bool = True


_PERCENT = Unit(Fraction(1), (("percent", 1),))


def parse_quantity(text: str) -> Quantity | None:
    """The number ``text`` is, and its unit; None if it is anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = _value(match)
    if value is None:
        return None
    exact = "." not in (match["decimal"] or "")
    written = (match["unit"] or "").strip()
    if not written:
        return Quantity(value, None, exact)
    unit = parse_unit(written)
    if unit is None:
        return None
    if not unit.dimensions:
        return Quantity(value * unit.factor, None, exact)  # 5 m/m is 5, 5 km/m is 5000
    attached = not match["space"]
    if attached and unit.counted and unit.dimensions[0][0] == written:
        return None  # 5xyz is algebra; 5 apples are not
    return Quantity(value, unit, exact, may_lack_unit=not attached or len(written) > 1 or written in "°%$")


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"] is not None:
        exponent = int(match["exponent"] or match["power"] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return sign * Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** exponent
    numerator, denominator = (int(match[x] or match[y] or match[z]) for x, y, z in (("a", "c", "e"), ("b", "d", "f")))
    if denominator == 0:
        return None
    return sign * (int(match["whole"] or match["mixed"] or 0) + Fraction(numerator, denominator))


def same_quantity(predicted: Quantity, truth: Quantity) -> bool:
    """Whether two quantities are equal. A unit may be left out on one side, the question having named it.

    A percentage is a fraction of one only when the truth says so, by being one: a truth of 50 % may be answered 50, 0.5
    or 1/2. A truth of 0.5 or 1/2 may be answered 0.5 %, its unit left out; 50 % would be a second, other answer.
    """
    if predicted.unit is not None and truth.unit is not None:
        if predicted.unit.dimensions != truth.unit.dimensions:
            return False
        return _close(predicted, truth, predicted.unit.factor, truth.unit.factor)
    if not (predicted.may_lack_unit and truth.may_lack_unit):
        return False
    if _close(predicted, truth):
        return True
    return truth.unit == _PERCENT and _close(predicted, truth, Fraction(100))


def _close(a: Quantity, b: Quantity, scale_a: Fraction = Fraction(1), scale_b: Fraction = Fraction(1)) -> bool:
    left, right = a.value * scale_a, b.value * scale_b
    if a.exact and b.exact:
        return left == right
    return abs(left - right) <= _RELATIVE_TOLERANCE * max(abs(left), abs(right))


def same_units_named(one: str, other: str) -> bool:
    """Whether two words that differ in case alone may stand for each other: MW and mW may not."""
    unit, other_unit = _measured(one), _measured(other)
    return unit is None or other_unit is None or unit == other_unit


def parse_unit(text: str) -> Unit | None:
    """A unit, or a product, power or ratio of units, or words for what is counted."""
    text = re.sub(r"\bper\b", "/", text)
    text = re.sub(r"\b(square|sq\.?)\s+(\w+)", r"\2^2", text)
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", text)
    factor, powers = Fraction(1), dict[str, int]()
    for position, side in enumerate(text.split("/")):
        parts = re.split(r"\\cdot|[\s·*]+", side.strip())
        for part in parts:
            match = _FACTOR.fullmatch(part)
            unit = match and _measured(match[1])
            if match is None or unit is None:
                return _counted(text)
            power = int(match[2] or 1) * (-1 if position else 1)
            factor *= unit.factor**power
            for dimension, base_power in unit.dimensions:
                powers[dimension] = powers.get(dimension, 0) + base_power * power
    return Unit(factor, tuple(sorted((d, p) for d, p in powers.items() if p)))


def _counted(text: str) -> Unit | None:
    """Words for what is counted: apples, blue circles."""
    words = text.casefold().split()
    if not all(word.isalpha() and len(word) > 2 and word not in _FUNCTIONS for word in words):
        return None
    return Unit(Fraction(1), ((" ".join(word.removesuffix("s") for word in words), 1),), counted=True)


@cache
def _measured(name: str) -> Unit | None:
    """A unit that is not counted; where its case is not right, the everyday one, or the one with the same prefix."""
    return _simple(name) or _units_by_casefold().get(name.casefold()) or _prefixed_ignoring_case(name)


@cache
def _units_by_casefold() -> dict[str, Unit]:
    everyday = ("kg", "mg", "cm", "mm", "km", "ml", "ms")
    return {name.casefold(): unit for name in (*_NAMED, *_SCALED, *everyday) if (unit := _simple(name))}


def _prefixed_ignoring_case(name: str) -> Unit | None:
    """KPA is kPa, but MPA is MPa and mpa is mPa."""
    prefix = next((p for p in (name[:1], name[:1].swapcase()) if p in _SCALES), None)
    symbol = next((s for s in _SCALED if s.casefold() == name[1:].casefold()), None)
    return _simple(prefix + symbol) if prefix and symbol else None


@cache
def _simple(name: str) -> Unit | None:
    """A unit without powers: by its symbol, with an SI prefix, or by its name, plural or not."""
    name = name.replace("μ", "µ")
    for spelled in (name, name.removesuffix("s") if len(name) > 2 else name):
        if spelled in _NAMED:
            dimension, factor = _NAMED[spelled]
            return _unit(dimension, Fraction(factor))
        if spelled in _SCALED:
            return _unit(_SCALED[spelled], Fraction(1))
        if spelled[:1] in _SCALES and spelled[1:] in _SCALED and len(spelled) < 5:
            return _unit(_SCALED[spelled[1:]], Fraction(10) ** _SCALES[spelled[0]])
        for prefix, exponent in _PREFIX_WORDS.items():
            if spelled.startswith(prefix) and spelled.removeprefix(prefix) in _SCALED:
                return _unit(_SCALED[spelled.removeprefix(prefix)], Fraction(10) ** exponent)
    return None


def _unit(dimension: str, factor: Fraction) -> Unit:
    derived = _DERIVED.get(dimension)
    return Unit(factor * derived.factor, derived.dimensions) if derived else Unit(factor, ((dimension, 1),))
