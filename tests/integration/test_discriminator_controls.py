"""Controls: a discriminator that is warmed up learns what the two sides say, and nothing where they say nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("discriminator_controls_worker.py")
Measured = dict[str, dict[str, Any]]
SHORT_BRANCH = 20  # tokens, as in the worker


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    out = tmp_path_factory.mktemp("controls") / "measured.json"
    launch(1, [str(WORKER), str(tiny_checkpoint), str(tiny_data / "sft.jsonl"), str(out)])
    return dict(json.loads(out.read_text()))


def chance_margin(pairs: float) -> int:
    """The smallest m such that fair coins stay within m of half of ``pairs`` heads 99.9 % of the time."""
    count = int(pairs)
    tail, heads = 0.0, 0
    while tail + math.comb(count, heads) / 2**count <= 0.0005:
        tail += math.comb(count, heads) / 2**count
        heads += 1
    return math.ceil(count / 2 - heads)


def test_the_margin_by_hand() -> None:
    # 0 heads may be left out of 12 coins (1/4096), not of 10 (1/1024).
    assert chance_margin(10) == 5
    assert chance_margin(12) == 5


def test_true_labels_are_learned(measured: Measured) -> None:
    assert measured["true"]["wins"] > 0.9 * measured["true"]["pairs"]


def test_shuffled_labels_are_not(measured: Measured) -> None:
    pairs = measured["shuffled"]["pairs"]
    assert pairs == 80
    assert abs(measured["shuffled"]["wins"] - pairs / 2) <= chance_margin(pairs) < 16


def test_without_content_accuracy_is_chance(measured: Measured) -> None:
    """Neither length, drawn for each side alike, nor tokenisation, padding or terminator."""
    pairs = measured["filler"]["pairs"]
    assert pairs == 80
    assert abs(measured["filler"]["wins"] - pairs / 2) <= chance_margin(pairs)


def test_d2_in_the_papers_code_the_terminator_does(measured: Measured) -> None:
    assert measured["filler_reference"]["wins"] > 0.9 * measured["filler_reference"]["pairs"]


def test_d3_the_same_text_is_the_same_sequence_on_both_sides(measured: Measured) -> None:
    """However long it is, and however the policy cut it into tokens; what is scored is what is compared."""
    same = measured["same"]
    assert same["teachers"] == same["students"] == same["scored"]
    assert max(map(len, same["teachers"])) > 512
    assert max(map(len, same["sampled"])) > 2 * 512
    assert same["cut"] == 0


def test_d3_nor_does_a_limit_on_length_change_that(measured: Measured) -> None:
    same = measured["same_short"]
    assert same["teachers"] == same["students"] != same["scored"]
    assert max(map(len, same["teachers"])) == SHORT_BRANCH
    assert same["scored"] == measured["same"]["scored"]
    assert same["cut"] == sum(len(ids) > SHORT_BRANCH for ids in same["scored"]) > 2


def test_d1_where_one_side_is_too_long_both_are_cut(measured: Measured) -> None:
    """Demonstrations of over 512 tokens, responses of a few dozen: neither shows its end, but the terminator."""
    cut = measured["longer"]
    for whole, teacher, student in list(zip(cut["scored"], cut["teachers"], cut["students"], strict=True))[1::2]:
        assert len(teacher) == len(student) <= SHORT_BRANCH
        assert student[:-1] == whole[: len(student) - 1] != whole[:-1]
        assert teacher[-1] == student[-1] == whole[-1]
