"""The forms one answer takes: options A to J, units and words in Chinese, currencies, wrappings of a truth."""

from __future__ import annotations

import itertools

import pytest

from prism_megatron.reward.answer import is_correct

LETTERS = "ABCDEFGHIJ"
SAME = {
    "a wrapped truth": [
        ("4", "<answer> 4 </answer>"),
        ("4", "<answer>\\boxed{4}</answer>"),
        ("4", "\\boxed{4}"),
        ("4", "$4$"),
        ("4", "$\\boxed{4}$"),
        ("4", "\\[4\\]"),
        ("B", "<answer>(B)</answer>"),
        ("B", "\\boxed{\\text{B}}"),
        ("4", "答案：4"),
        ("4", "【答案】4"),
        ("4", "最终答案是4。"),
    ],
    "an option": [
        ("the answer is (J)", "J"),
        ("I think the answer is (C)", "C"),
        ("option j", "J"),
        ("B", "Option B"),
        ("B", "option (B): 12"),
        ("5", "J. 5"),
        ("x", "B. x"),
        ("B", "B、12"),
        ("B、12", "B"),
        ("12", "B、12"),
        ("Ｂ", "B"),
        ("（Ｂ）", "B"),
        ("B．12", "B"),
        ("选B", "B"),
        ("选项B", "B"),
        ("故选:B", "B"),
        ("应选B", "B"),
        ("答案是B", "B"),
        ("正确答案为（B）", "B"),
        ("计算得12,选项是B", "B"),
        ("I, J", "J, I"),
        ("IJ", "I and J"),
        ("A、C", "AC"),
        ("A和C", "AC"),
        ("A与C", "A, C"),
        ("ac", "AC"),
    ],
    "a Chinese unit and an English one": [
        ("5 mm", "5毫米"),
        ("0.5 m", "5分米"),
        ("5 km", "5公里"),
        ("5 km", "5千米"),
        ("5 kg", "5千克"),
        ("5 kg", "5公斤"),
        ("500 g", "1斤"),
        ("5 t", "5吨"),
        ("5 mL", "5毫升"),
        ("1 cm^3", "1 立方厘米"),
        ("1 L", "1立方分米"),
        ("5 m²", "5平方米"),
        ("1 ha", "1公顷"),
        ("10000 平方米", "1公顷"),
        ("5 s", "5秒"),
        ("90 minutes", "1.5小时"),
        ("2 days", "48小时"),
        ("1 week", "7天"),
        ("12个月", "1年"),
        ("5 years", "5年"),
        ("60 km/h", "60千米/时"),
        ("60 km/h", "60千米每小时"),
        ("60 km/h", "每小时60千米"),
        ("9.8 m/s^2", "9.8米/秒²"),
        ("5 N", "5牛顿"),
        ("5 N/m^2", "5牛/平方米"),
        ("5 kPa", "5千帕"),
        ("5 W", "5瓦"),
        ("1 kWh", "1千瓦时"),
        ("3 ohm", "3欧姆"),
        ("20°C", "20摄氏度"),
        ("20°C", "20度"),
        ("20 degrees", "20°C"),
        ("60 degrees", "60度"),
        ("\\pi/2", "\\frac{\\pi}{2}"),
        ("2 rad", "2弧度"),
        ("12 inches", "1英尺"),
    ],
    "a sum of units": [
        ("2小时30分钟", "150分钟"),
        ("2 hours 30 minutes", "150 min"),
        ("2 hours and 30 minutes", "2.5小时"),
        ("3米50厘米", "3.5 m"),
        ("5元5角", "5.5元"),
        ("5 ft 6 in", "66 inches"),
    ],
    "a unit left out": [
        ("5", "5元"),
        ("5", "5 平方厘米"),
        ("5元", "5"),
        ("5", "5米/秒"),
        ("20", "20摄氏度"),
        ("5", "5个"),
        ("5个", "5"),
        ("5", "5个苹果"),
        ("5个", "5个苹果"),
        ("5苹果", "5个苹果"),
        ("5", "5人"),
        ("60", "60 words per minute"),
        ("5", "5元/个"),
        ("30000元", "3万元"),
        ("1.2亿", "120000000"),
        ("面积=5平方厘米", "5平方厘米"),
        ("5", "周长=5"),
    ],
    "currencies": [
        ("$5", "5美元"),
        ("US$5", "$5"),
        ("-$5", "-5 dollars"),
        ("50美分", "$0.5"),
        ("¥5", "5元"),
        ("￥5", "5 yuan"),
        ("¥500", "500 yen"),
        ("5 RMB", "5元"),
        ("5块", "5元"),
        ("5块钱", "5元"),
        ("5分", "0.05元"),
        ("€5", "5 euros"),
        ("5欧元", "5€"),
        ("£5", "5 pounds"),
        ("5英镑", "£5"),
        ("5 pounds", "5 lb"),
        ("￡5.50", "£5.5"),
        ("$1,200", "1200"),
    ],
    "percentages": [
        ("50%", "50％"),
        ("50%", "百分之50"),
        ("百分之50", "50%"),
        ("50", "百分之50"),
        ("0.5", "百分之 50"),
    ],
    "joined values": [
        ("3或-3", "3, -3"),
        ("3 或 -3", "±3"),
        ("x=3或x=-3", "3, -3"),
        ("3或者-3", "-3, 3"),
        ("3和5", "5, 3"),
        ("3与5", "3 and 5"),
        ("3以及5", "3, 5"),
        ("3、5", "5，3"),
        ("3厘米和5厘米", "5 cm, 3 cm"),
    ],
    "typography": [
        ("１２．５", "12.5"),
        ("（１，２）", "(1, 2)"),
        ("［０，１）", "[0,1)"),
        ("3：4", "3:4"),
        ("5％", "5%"),
        ("10⁻³", "0.001"),
        ("x²+2x+1", "(x+1)^2"),
        ("2¼", "9/4"),
        ("⅔", "2/3"),
        ("60˚", "60°"),
        ("60∘", "60°"),
        ("−５", "-5"),
        ("5 ‑ 2", "3"),
        ("5　厘米", "5厘米"),
        ("苹果。", "苹果"),
        ("5\u2126", "5Ω"),
    ],
}
OTHER = {
    "another option": [
        ("D", "C. D"),
        ("d", "C. D"),
        ("(D)", "C. D"),
        ("a", "B. a"),
        ("J", "I"),
        ("(I) (J)", "I"),
        ("I or J", "I"),
        ("A、B", "A"),
        ("A或B", "A"),
        ("不是A", "A"),
        ("不选(A)", "A"),
        ("K", "J"),
        ("A. B", "B"),
        ("12", "12. B"),
    ],
    "another quantity": [
        ("5 厘米", "5 米"),
        ("5 cm", "5米"),
        ("6", "5厘米"),
        ("5 cm", "5平方厘米"),
        ("5公斤", "5磅"),
        ("5 lb", "£5"),
        ("5 kg", "£5"),
        ("¥5", "$5"),
        ("5 yen", "5元"),
        ("5 euros", "£5"),
        ("2小时", "2分钟"),
        ("5个苹果", "5个梨"),
        ("5千米/时", "5米/秒"),
        ("60", "百分之50"),
        ("20°F", "20摄氏度"),
        ("1弧度", "1度"),
        ("3万", "3"),
        ("2小时30分钟", "2小时"),
        ("30分钟2小时", "150分钟"),
    ],
    "more than one answer": [
        ("7或8", "7"),
        ("3或-3", "3"),
        ("7、8", "7"),
        ("5厘米或6厘米", "5厘米"),
        ("10⁻³", "10^3"),
    ],
    "words": [
        ("苹果", "梨"),
        ("果苹", "苹果"),
        ("5苹果+x", "x+5"),
        ("5不是", "5"),
    ],
}


def pairs(tables: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(kind, *pair) for kind, rows in tables.items() for pair in rows]


@pytest.mark.parametrize(("kind", "prediction", "truth"), pairs(SAME))
def test_one_answer_in_two_forms(kind: str, prediction: str, truth: str) -> None:
    assert is_correct(prediction, truth), kind


@pytest.mark.parametrize(("kind", "prediction", "truth"), pairs(OTHER))
def test_two_answers(kind: str, prediction: str, truth: str) -> None:
    assert not is_correct(prediction, truth), kind


@pytest.mark.parametrize("letter", LETTERS)
def test_every_form_of_an_option_is_that_option_and_no_other(letter: str) -> None:
    bare = (
        letter,
        f"({letter})",
        f"{letter}.",
        f"{letter})",
        f"{letter}:",
        f"Option {letter}",
        f"\\text{{({letter})}}",
    )
    forms = (*bare, f"{letter}. 5", f"({letter}) 5", f"{letter}: 5", f"{letter}、5")
    for prediction, truth in itertools.product((*forms, letter.lower(), f"the answer is {letter}."), forms):
        assert is_correct(prediction, truth), (prediction, truth)
    other = LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]
    for truth in bare:
        for prediction in (other, f"({other})", f"{other}. 5", f"{letter} or {other}"):
            assert not is_correct(prediction, truth), (prediction, truth)


@pytest.mark.parametrize(
    "text", ["元", "5元5", "每", "每5", "平方", "5平方", "万", "¥", "百分之", "，、。", "5个个个", "5和", "或"]
)
def test_odd_chinese_text_is_only_wrong(text: str) -> None:
    assert not is_correct(text, "7")
    assert not is_correct("7", text)
