"""Units by name: symbols, English and Chinese words, SI prefixes, currencies.

Units of one dimension are converted (100 cm is 1 m, 10 cm is not 10 m); each currency, each thing that is counted and
each scale of temperature is a dimension of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
# Dimension: symbols and names that take SI prefixes.
_PREFIXED = """
metre: m metre meter 米
gram: g gram 克
second: s 秒
litre: l L liter litre 升
newton: N newton 牛 牛顿
joule: J joule 焦 焦耳
watt: W watt 瓦 瓦特
pascal: Pa 帕 帕斯卡
volt: V volt 伏 伏特
ampere: A 安 安培
hertz: Hz 赫 赫兹
ohm: Ω ohm 欧 欧姆
mole: mol 摩尔
kelvin: K
electronvolt: eV
calorie: cal
newton_metre: Nm
"""
# Factor and dimension: symbols and names without prefixes.
_PLAIN = """
0.0254 metre: inch in inches 英寸
0.3048 metre: ft foot feet 英尺
0.9144 metre: yd yard 码
1609.344 metre: mi mile 英里
0.000001 metre: micron
1000 metre: 公里
0.01 metre: 公分
453.59237 gram: lb pound 磅
28.349523125 gram: oz ounce 盎司
1000000 gram: t tonne 吨
1000 gram: 公斤
500 gram: 斤
1 second: sec second 秒钟
60 second: min minute 分钟
3600 second: h hr hour 时 小时 钟头
86400 second: day 天 日
604800 second: week 周 星期
1/12 year: month 月
1 year: year yr 年 岁
1 degree: deg degree °
1 radian: rad radian 弧度
1 celsius: °C 摄氏度
1 fahrenheit: °F 华氏度
1 kelvin: 开尔文
1 percent: % percent
1 dollar: $ dollar USD 美元 美金
0.01 dollar: cent ¢ 美分
1 euro: € euro EUR 欧元
1 sterling: £ GBP 英镑
1 yuan: yuan RMB CNY 元 元钱 块钱 人民币
0.1 yuan: 角钱
0.01 yuan: 分钱
1 yen: yen JPY 日元
1 rupee: ₹ rupee INR 卢比
1 mph: mph
3600 joule: Wh
3600000 joule: kWh 千瓦时
1 hectare: ha hectare 公顷
"""


def _rows(table: str) -> Iterator[tuple[list[str], str]]:
    """Yield the definition and each name of the lines of ``table``."""
    for line in table.strip().splitlines():
        definition, names = line.split(": ")
        yield from ((definition.split(), name) for name in names.split())


_SCALED = {name: dimension for (dimension,), name in _rows(_PREFIXED)}
_NAMED = {name: (dimension, Fraction(factor)) for (factor, dimension), name in _rows(_PLAIN)}
# Names with several readings; an answer is right if one reading is.
_READINGS = (
    dict.fromkeys(("°", "deg", "degree", "degrees", "度"), ("°", "°C", "°F"))
    | dict.fromkeys(("pound", "pounds"), ("lb", "GBP"))
    | {"¥": ("yuan", "yen"), "分": ("分钟", "分钱", "分"), "角": ("角钱", "角"), "块": ("元", "块")}
)
_DERIVED = {
    "litre": Unit(Fraction(1, 1000), (("metre", 3),)),  # a cubic decimetre, so that 1 ml is 1 cm^3
    "newton_metre": Unit(Fraction(1), (("metre", 1), ("newton", 1))),
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
            return _unit(dimension, factor)
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
