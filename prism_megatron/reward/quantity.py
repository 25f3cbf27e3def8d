"""Numbers with units as people write them, which math-verify has no rules for.

Values are exact fractions: 1000001 is not 1000000, and 1/3 equals 0.333333 only within the tolerance of decimals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_megatron.reward.units import Unit, is_chinese, parse_units

_RELATIVE_TOLERANCE = Fraction(1, 10**6)  # spec 5.3
_MAX_EXPONENT = 400  # a larger power of ten would not fit in memory

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<whole>\d+)?\s*\\frac\s*(?:\{{(?P<a>\d+)\}}\s*\{{(?P<b>\d+)\}}|(?P<c>\d)\s*(?P<d>\d))"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<e>\d+)\s*/\s*(?P<f>\d+)"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+)|\s*(?:\\times|\\cdot|[*x])\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d+)\s*\}}?)?"
    r")(?P<unit>(?P<space>\s*)[^\d\s.,/].*)?"
)
_MYRIADS = {"万": 10**4, "亿": 10**8}
_PER = re.compile(r"每(平方\w+?|[^\d\s]+?)\s*([-+]?\d.*)")  # 每小时60千米
_PIECE = re.compile(r"(\d+(?:\.\d+)?\s*[^\d\s.,/+*^-]+(?:\s+(?:and\s+)?)?)")


@dataclass(frozen=True)
class Quantity:
    """A value with the possible readings of its unit, none for a plain number.

    ``exact`` numbers have no decimal point. ``may_lack_unit`` means that the unit is certainly one, not algebra, so
    that the other side may omit it.
    """

    value: Fraction
    units: tuple[Unit, ...] = ()
    exact: bool = True
    may_lack_unit: bool = True


_PERCENT = Unit(Fraction(1), (("percent", 1),))


def parse_quantity(text: str) -> Quantity | None:
    """Parse ``text`` as a number with an optional unit; None for anything else."""
    if rate := _PER.fullmatch(text):
        text = f"{rate[2]}/{rate[1]}"
    match = _NUMBER.fullmatch(text)
    if match is None:
        return _sum_of_units(text)
    value = _value(match)
    if value is None:
        return None
    exact = "." not in (match["decimal"] or "")
    written = (match["unit"] or "").strip()
    if written[:1] in _MYRIADS:
        value *= _MYRIADS[written[0]]
        written = written[1:].strip()
    if not written:
        return Quantity(value, (), exact)
    units = parse_units(written)
    if not units:
        return _sum_of_units(text)
    usual = units[0]
    if not usual.dimensions:
        return Quantity(value * usual.factor, (), exact)  # 5 m/m is 5, 5 km/m is 5000, and 5个 is 5
    attached = not match["space"] and not is_chinese(written)
    if attached and usual.counted and ("/" in written or usual.dimensions[0][0] == written):
        return None  # 5xyz is algebra; 5 apples are not
    return Quantity(value, tuple(units), exact, may_lack_unit=not attached or len(written) > 1 or written in "°%$¥€£¢₹")


def _sum_of_units(text: str) -> Quantity | None:
    """Parse a sum of ever smaller units of one dimension, such as 2 hours 30 minutes or 3米50厘米."""
    pieces = _PIECE.findall(text)
    if len(pieces) < 2 or "".join(pieces) != text:
        return None
    total, exact, smallest = Fraction(0), True, None
    for piece in pieces:
        part = parse_quantity(piece.strip().removesuffix(" and"))
        units = [unit for unit in (part.units if part else ()) if not unit.counted]
        if smallest is not None:
            units = [u for u in units if u.dimensions == smallest.dimensions and u.factor < smallest.factor]
        if part is None or not units:
            return None
        smallest = units[0]
        total, exact = total + part.value * smallest.factor, exact and part.exact
    assert smallest is not None
    return Quantity(total, (Unit(Fraction(1), smallest.dimensions),), exact, may_lack_unit=False)


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
    """Return whether two quantities are equal. One side may omit the unit, since the question may have named it.

    A percentage equals a fraction of one only if the truth is a percentage: 50, 0.5 and 1/2 are right for a truth of
    50 %. For a truth of 0.5, 0.5 % is right (the truth omits the unit), so 50 %, a different value, is wrong.
    """
    if predicted.units and truth.units:
        return any(
            unit.dimensions == true_unit.dimensions and _close(predicted, truth, unit.factor, true_unit.factor)
            for unit in predicted.units
            for true_unit in truth.units
        )
    if not (predicted.may_lack_unit and truth.may_lack_unit):
        return False
    if _close(predicted, truth):
        return True
    return _PERCENT in truth.units and _close(predicted, truth, Fraction(100))


def _close(a: Quantity, b: Quantity, scale_a: Fraction = Fraction(1), scale_b: Fraction = Fraction(1)) -> bool:
    left, right = a.value * scale_a, b.value * scale_b
    if a.exact and b.exact:
        return left == right
    return abs(left - right) <= _RELATIVE_TOLERANCE * max(abs(left), abs(right))
