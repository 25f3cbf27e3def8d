"""Controls: a discriminator learns from the content of the two sides, and nothing from pairs without content."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("discriminator_controls_worker.py")
Metrics = dict[str, dict[str, Any]]
SHORT_BRANCH = 20  # tokens, as in the worker


@pytest.fixture(scope="module")
def metrics(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Metrics:
    out = tmp_path_factory.mktemp("controls") / "metrics.json"
    launch(1, [str(WORKER), str(tiny_checkpoint), str(tiny_data / "sft.jsonl"), str(out)])
    return dict(json.loads(out.read_text()))


def chance_margin(pairs: float) -> int:
    """Return the smallest m such that fair coins stay within m of half of ``pairs`` heads 99.9 % of the time."""
    count = int(pairs)
    tail, heads = 0.0, 0
    while tail + math.comb(count, heads) / 2**count <= 0.0005:
        tail += math.comb(count, heads) / 2**count
        heads += 1
    return math.ceil(count / 2 - heads)


def test_the_margin_by_hand() -> None:
    # 0 heads may be excluded for 12 coins (1/4096), not for 10 (1/1024).
    assert chance_margin(10) == 5
    assert chance_margin(12) == 5


def test_true_labels_are_learned(metrics: Metrics) -> None:
    assert metrics["true"]["wins"] > 0.9 * metrics["true"]["pairs"]


def test_shuffled_labels_are_not(metrics: Metrics) -> None:
    pairs = metrics["shuffled"]["pairs"]
    assert pairs == 80
    assert abs(metrics["shuffled"]["wins"] - pairs / 2) <= chance_margin(pairs) < 16


def test_without_content_accuracy_is_chance(metrics: Metrics) -> None:
    """Length (drawn alike for each side), tokenisation, padding and terminator give nothing away."""
    pairs = metrics["filler"]["pairs"]
    assert pairs == 80
    assert abs(metrics["filler"]["wins"] - pairs / 2) <= chance_margin(pairs)


def test_d2_the_terminator_gives_the_side_away_in_the_papers_code(metrics: Metrics) -> None:
    assert metrics["filler_reference"]["wins"] > 0.9 * metrics["filler_reference"]["pairs"]


def test_d3_the_same_text_is_the_same_sequence_on_both_sides(metrics: Metrics) -> None:
    """Long texts and unusual tokenisations by the policy included; the scored sequences are the compared ones."""
    same = metrics["same"]
    assert same["teachers"] == same["students"] == same["scored"]
    assert max(map(len, same["teachers"])) > 512
    assert max(map(len, same["sampled"])) > 2 * 512
    assert same["cut"] == 0


def test_d3_a_limit_on_length_does_not_change_that(metrics: Metrics) -> None:
    same = metrics["same_short"]
    assert same["teachers"] == same["students"] != same["scored"]
    assert max(map(len, same["teachers"])) == SHORT_BRANCH
    assert same["scored"] == metrics["same"]["scored"]
    assert same["cut"] == sum(len(ids) > SHORT_BRANCH for ids in same["scored"]) > 2


def test_d1_where_one_side_is_too_long_both_are_cut(metrics: Metrics) -> None:
    """Demonstrations of over 512 tokens, responses of a few dozen: both lose their end but get the terminator."""
    cut = metrics["longer"]
    for complete, teacher, student in list(zip(cut["scored"], cut["teachers"], cut["students"], strict=True))[1::2]:
        assert len(teacher) == len(student) <= SHORT_BRANCH
        assert student[:-1] == complete[: len(student) - 1] != complete[:-1]
        assert teacher[-1] == student[-1] == complete[-1]
