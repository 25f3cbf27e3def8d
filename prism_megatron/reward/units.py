"""Units by name: symbols, English and Chinese words, SI prefixes, currencies.

Units of one dimension are converted (100 cm is 1 m, 10 cm is not 10 m); each currency, each thing that is counted and
each scale of temperature is a dimension of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Unit:
    """A factor and dimensions with their powers, for example 1000/3600 and (("metre", 1), ("second", -1)) for km/h.

    Without dimensions the unit is a pure number. ``counted`` units are nouns (5 apples), each a dimension of its own.
    """

    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]
    counted: bool = False


_SI_PREFIXES = {"n": -9, "µ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_SCALED = (
    {"m": "metre", "g": "gram", "s": "second", "l": "litre", "L": "litre", "N": "newton", "J": "joule"}
    | {
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
    | {
        "米": "metre",
        "克": "gram",
        "秒": "second",
        "升": "litre",
        "牛": "newton",
        "牛顿": "newton",
        "焦": "joule",
        "焦耳": "joule",
        "瓦": "watt",
        "瓦特": "watt",
        "帕": "pascal",
        "帕斯卡": "pascal",
        "伏": "volt",
        "伏特": "volt",
        "安": "ampere",
        "安培": "ampere",
        "赫": "hertz",
        "赫兹": "hertz",
        "欧": "ohm",
        "欧姆": "ohm",
        "摩尔": "mole",
    }
)
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
    "month": ("year", "1/12"),
    "year": ("year", "1"),
    "yr": ("year", "1"),
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
    "¢": ("dollar", "0.01"),
    "€": ("euro", "1"),
    "euro": ("euro", "1"),
    "EUR": ("euro", "1"),
    "£": ("sterling", "1"),
    "GBP": ("sterling", "1"),
    "yuan": ("yuan", "1"),
    "RMB": ("yuan", "1"),
    "CNY": ("yuan", "1"),
    "yen": ("yen", "1"),
    "JPY": ("yen", "1"),
    "₹": ("rupee", "1"),
    "rupee": ("rupee", "1"),
    "INR": ("rupee", "1"),
    "mph": ("mph", "1"),
    "Wh": ("joule", "3600"),
    "kWh": ("joule", "3600000"),
    "ha": ("hectare", "1"),
    "hectare": ("hectare", "1"),
} | {
    "公里": ("metre", "1000"),
    "公分": ("metre", "0.01"),
    "英寸": ("metre", "0.0254"),
    "英尺": ("metre", "0.3048"),
    "码": ("metre", "0.9144"),
    "英里": ("metre", "1609.344"),
    "公斤": ("gram", "1000"),
    "斤": ("gram", "500"),
    "吨": ("gram", "1000000"),
    "磅": ("gram", "453.59237"),
    "盎司": ("gram", "28.349523125"),
    "秒钟": ("second", "1"),
    "分钟": ("second", "60"),
    "时": ("second", "3600"),
    "小时": ("second", "3600"),
    "钟头": ("second", "3600"),
    "天": ("second", "86400"),
    "日": ("second", "86400"),
    "周": ("second", "604800"),
    "星期": ("second", "604800"),
    "月": ("year", "1/12"),
    "年": ("year", "1"),
    "岁": ("year", "1"),
    "弧度": ("radian", "1"),
    "摄氏度": ("celsius", "1"),
    "华氏度": ("fahrenheit", "1"),
    "开尔文": ("kelvin", "1"),
    "千瓦时": ("joule", "3600000"),
    "公顷": ("hectare", "1"),
    "元": ("yuan", "1"),
    "元钱": ("yuan", "1"),
    "块钱": ("yuan", "1"),
    "人民币": ("yuan", "1"),
    "角钱": ("yuan", "0.1"),
    "分钱": ("yuan", "0.01"),
    "美元": ("dollar", "1"),
    "美金": ("dollar", "1"),
    "美分": ("dollar", "0.01"),
    "欧元": ("euro", "1"),
    "英镑": ("sterling", "1"),
    "日元": ("yen", "1"),
    "卢比": ("rupee", "1"),
}
# Names with several readings; an answer is right if one reading is.
_READINGS = (
    dict.fromkeys(("°", "deg", "degree", "degrees", "度"), ("°", "°C", "°F"))
    | dict.fromkeys(("pound", "pounds"), ("lb", "GBP"))
    | {"¥": ("yuan", "yen"), "分": ("分钟", "分钱", "分"), "角": ("角钱", "角"), "块": ("元", "块")}
)
_DERIVED = {
    "litre": Unit(Fraction(1, 1000), (("metre", 3),)),  # a cubic decimetre, so that 1 ml is 1 cm^3
    "newton metre": Unit(Fraction(1), (("metre", 1), ("newton", 1))),
    "hectare": Unit(Fraction(10_000), (("metre", 2),)),
}
_SI_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9} | {
    "纳": -9,
    "微": -6,
    "毫": -3,
    "厘": -2,
    "分": -1,
    "千": 3,
    "兆": 6,
}
_FACTOR = re.compile(r"([A-Za-zµΩ°%$¥€£¢₹\u3400-\u9fff]+)(?:\^?\{?(-?\d)\}?)?")
_FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "lim", "max", "min", "mod"))
_CHINESE = re.compile(r"[\u3400-\u9fff]+")
_NOT_COUNTED = re.compile("[或和与及不非是为]")  # conjunctions and negations
_CLASSIFIER = re.compile("^[个只条张本名位辆件棵朵支台种次]")  # Chinese measure words, between a number and a noun


def same_units_named(one: str, other: str) -> bool:
    """Return whether two words that differ only in case mean the same; units need the same case (MW, mW)."""
    unit, other_unit = _measured(one), _measured(other)
    return unit is None or other_unit is None or unit == other_unit


def parse_units(text: str) -> list[Unit]:
    """Return the possible units of ``text``, the most common first; none if it is not a unit."""
    readings = (parse_unit(name) for name in _READINGS.get(text, (text,)))
    return [unit for unit in readings if unit is not None]


def parse_unit(text: str) -> Unit | None:
    """Parse a unit, a product, power or ratio of units, or a counted noun."""
    text = re.sub(r"\bper\b|每", "/", text.replace("μ", "µ"))
    text = re.sub(r"\b(square|sq\.?)\s+(\w+)", r"\2^2", text)
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", text)
    text = re.sub(r"(平方|立方)(\w+)", lambda m: f"{m[2]}^{2 if m[1] == '平方' else 3}", text)
    factor, powers, counted = Fraction(1), dict[str, int](), False
    for position, side in enumerate(text.split("/")):
        side = side.strip()
        unit = _product(side) or _product(_CLASSIFIER.sub("", side)) or _counted(side)
        if unit is None:
            return None
        sign = -1 if position else 1
        factor *= unit.factor**sign
        counted = counted or unit.counted
        for dimension, power in unit.dimensions:
            powers[dimension] = powers.get(dimension, 0) + sign * power
    return Unit(factor, tuple(sorted((d, p) for d, p in powers.items() if p)), counted)


def is_chinese(text: str) -> bool:
    """Return whether ``text`` contains a Chinese character."""
    return _CHINESE.search(text) is not None


def _product(text: str) -> Unit | None:
    """Parse a product of powers of units."""
    factor, powers = Fraction(1), dict[str, int]()
    for part in re.split(r"\\cdot|[\s·*]+", text):
        match = _FACTOR.fullmatch(part)
        unit = match and _measured(match[1])
        if match is None or unit is None:
            return None
        power = int(match[2] or 1)
        factor *= unit.factor**power
        for dimension, base_power in unit.dimensions:
            powers[dimension] = powers.get(dimension, 0) + base_power * power
    return Unit(factor, tuple(powers.items()))


def _counted(text: str) -> Unit | None:
    """Parse a counted noun: apples, blue circles, 个苹果. A measure word alone, 个, is no dimension."""
    if _CHINESE.fullmatch(text):
        if _NOT_COUNTED.search(text):
            return None
        noun = _CLASSIFIER.sub("", text)
        return Unit(Fraction(1), ((noun, 1),) if noun else (), counted=True)
    words = text.casefold().split()
    if not words or not all(word.isalpha() and len(word) > 2 and word not in _FUNCTIONS for word in words):
        return None
    return Unit(Fraction(1), ((" ".join(word.removesuffix("s") for word in words), 1),), counted=True)


@cache
def _measured(name: str) -> Unit | None:
    """Look up a measured unit; with wrong case, the everyday unit, or the one with the same prefix."""
    return _simple(name) or _units_by_casefold().get(name.casefold()) or _prefixed_ignoring_case(name)


@cache
def _units_by_casefold() -> dict[str, Unit]:
    everyday = ("kg", "mg", "cm", "mm", "km", "ml", "ms")
    return {name.casefold(): unit for name in (*_NAMED, *_SCALED, *everyday) if (unit := _simple(name))}


def _prefixed_ignoring_case(name: str) -> Unit | None:
    """Look up a prefixed unit, ignoring case where that is unambiguous: KPA is kPa, but MPA is MPa and mpa is mPa."""
    prefix = next((p for p in (name[:1], name[:1].swapcase()) if p in _SI_PREFIXES), None)
    symbol = next((s for s in _SCALED if s.casefold() == name[1:].casefold()), None)
    return _simple(prefix + symbol) if prefix and symbol else None


@cache
def _simple(name: str) -> Unit | None:
    """Look up a unit without powers by its symbol, by a symbol with SI prefix, or by its name, plural or not."""
    for spelled in (name, name.removesuffix("s") if len(name) > 2 else name):
        if spelled in _NAMED:
            dimension, factor = _NAMED[spelled]
            return _unit(dimension, Fraction(factor))
        if spelled in _SCALED:
            return _unit(_SCALED[spelled], Fraction(1))
        if spelled[:1] in _SI_PREFIXES and spelled[1:] in _SCALED and len(spelled) < 5:
            return _unit(_SCALED[spelled[1:]], Fraction(10) ** _SI_PREFIXES[spelled[0]])
        for prefix, exponent in _SI_PREFIX_WORDS.items():
            if spelled.startswith(prefix) and spelled.removeprefix(prefix) in _SCALED:
                return _unit(_SCALED[spelled.removeprefix(prefix)], Fraction(10) ** exponent)
    return None


def _unit(dimension: str, factor: Fraction) -> Unit:
    derived = _DERIVED.get(dimension)
    return Unit(factor * derived.factor, derived.dimensions) if derived else Unit(factor, ((dimension, 1),))
