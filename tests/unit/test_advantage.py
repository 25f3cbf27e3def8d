"""Advantages worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prism_megatron.advantage import (
    AdvantageConfig,
    ScoredResponses,
    alignment_advantage,
    group_normalize,
    informative_groups,
)
from prism_megatron.config import GatingConfig

ROOT_HALF = 1 / math.sqrt(2)  # z-score of the two ends of a pair, the deviation being unbiased


CONFIG = AdvantageConfig(perception_weight=0.5, format_penalty=1.5, combine="per_branch", eps=0.0)


def align(
    perception: list[float],
    reasoning: list[float],
    valid: list[bool],
    groups: list[int],
    *,
    correct: list[bool] | None = None,
    config: AdvantageConfig = CONFIG,
) -> Tensor:
    verdicts = torch.tensor(correct or [False] * len(valid))
    scores = torch.tensor(perception), torch.tensor(reasoning)
    return alignment_advantage(ScoredResponses(*scores, torch.tensor(valid), verdicts, torch.tensor(groups)), config)


def test_group_normalize_is_the_z_score_with_the_unbiased_deviation() -> None:
    # 1, 2, 3: mean 2, unbiased deviation 1. 5, 5: no spread. Group names need not be 0..G-1, nor in order.
    scores, groups = torch.tensor([1.0, 5.0, 2.0, 5.0, 3.0]), torch.tensor([7, 3, 7, 3, 7])
    assert group_normalize(scores, groups, eps=1e-6).tolist() == pytest.approx([-1, 0, 0, 0, 1], abs=1e-5)


def test_a_group_of_one_has_no_advantage() -> None:
    # The paper's code leaves the raw score (here 9) as the advantage.
    assert group_normalize(torch.tensor([9.0, 1.0, 2.0]), torch.tensor([0, 1, 1]), eps=1e-6)[0] == 0


def test_grpo_by_hand() -> None:
    # Rewards 1.0, 0.2, 0.2, 0.2: mean 0.4, squares 0.36 + 3 * 0.04 = 0.48, deviation sqrt(0.48 / 3) = 0.4.
    rewards = torch.tensor([1.0, 0.2, 0.2, 0.2])
    assert group_normalize(rewards, torch.zeros(4), eps=0.0).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.2, 0.8, 1.0, -7.3])
def test_equal_rewards_have_no_advantage_at_all(value: float, eps: float) -> None:
    """The float32 mean of sixteen rewards of 0.2 is not 0.2, and the deviation is as small as the difference."""
    rewards, groups = torch.tensor([value] * 16 + [0.0, 1.0]), torch.tensor([0] * 16 + [1, 1])
    advantage = group_normalize(rewards, groups, eps=eps)
    assert advantage.dtype == torch.float32
    assert advantage[:16].tolist() == [0.0] * 16
    assert advantage[16:].tolist() == pytest.approx([-ROOT_HALF, ROOT_HALF], abs=1e-5)


def test_close_scores_on_a_high_level_differ() -> None:
    # In float32 the mean, 4096.0003, would be rounded to a multiple of 0.0005.
    scores = torch.tensor([4096.0, 4096.0, 4096.0 + 2**-10])
    root_third = 1 / math.sqrt(3)
    expected = [-root_third, -root_third, 2 * root_third]
    assert group_normalize(scores, torch.zeros(3), eps=0.0).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("sums", "other"), [((0.3, -0.7), -0.4), ((0.1, 0.2, -0.3), 0.0), ((0.8, 0.2, -0.1), 0.9), ((1e6, 0.1, -1e6), 0.1)]
)
def test_equal_rewards_of_different_sums_have_no_advantage(sums: tuple[float, ...], other: float) -> None:
    """0.3 - 0.7 is not -0.4 in float64."""
    rewards = torch.tensor([sum(sums), other, other, 1.0, 0.0], dtype=torch.float64)
    advantage = group_normalize(rewards, torch.tensor([0, 0, 0, 1, 1]), eps=1e-6)
    assert advantage[:3].tolist() == [0.0] * 3
    assert advantage[3] > 0


def test_gated_rewards_that_are_equal_in_the_reals_have_no_advantage() -> None:
    # In the grammar and wrong: 0.3 - 0.7; outside of it: -0.4. In float32 these differ, and their z-scores are 0.7.
    gating = GatingConfig("rlvr_v2", 0.0, wrong_penalty=0.7, format_penalty=0.4, accuracy_weight=1.0, format_weight=0.3)
    advantage = align([0.0, 0.0], [0.0, 0.0], [True, False], [0, 0], config=replace(CONFIG, gating=gating))
    assert advantage.tolist() == [0.0, 0.0]


def test_a_floor_keeps_scores_that_hardly_differ_small() -> None:
    # Deviations: 1 in group 0, 0.02 in group 1. Under a floor of 0.5 the latter's advantages are a 25th of a z-score.
    scores, groups = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.02, 5.04]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_normalize(scores, groups, eps=0.0).tolist() == pytest.approx([-1, 0, 1, -1, 0, 1], abs=1e-4)
    floored = group_normalize(scores, groups, eps=0.0, std_floor=0.5)
    assert floored.tolist() == pytest.approx([-1, 0, 1, -0.04, 0, 0.04], abs=1e-4)


def test_the_floor_is_for_scores_and_not_for_verified_rewards() -> None:
    # Scores 0 and 1 have a deviation of 0.71, here divided by 7.1; rewards 1 and 2 keep their z-score.
    gating = GatingConfig("rlvr", align_coeff=1.0)
    config = replace(CONFIG, std_floor=7.0710678, gating=gating, format_penalty=0.0)
    advantage = align([0.0, 1.0], [0.0, 1.0], [True, True], [0, 0], correct=[False, True], config=config)
    assert advantage.tolist() == pytest.approx([-ROOT_HALF, ROOT_HALF + 0.0707107], abs=1e-5)


def test_informative_groups_are_those_with_different_rewards() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 0.2, 1.0]), torch.tensor([0, 0, 1, 1])
    assert informative_groups(rewards, groups).tolist() == [False, False, True, True]


def test_branches_are_normalised_each_on_its_own_scale() -> None:
    # Perception spreads over 100, reasoning over 1, in opposite order: on equal terms they cancel.
    assert align([0.0, 100.0], [1.0, 0.0], [True, True], [0, 0]).tolist() == pytest.approx([0, 0], abs=1e-6)
    heavier = align([0.0, 100.0], [1.0, 0.0], [True, True], [0, 0], config=replace(CONFIG, perception_weight=0.75))
    assert heavier.tolist() == pytest.approx([-0.5 * ROOT_HALF, 0.5 * ROOT_HALF])


def test_weighted_sum_lets_the_wider_branch_win() -> None:
    # Eq. 1 and 3: 0.5 * (0, 100) + 0.5 * (1, 0) = (0.5, 50), one z-score.
    advantage = align([0.0, 100.0], [1.0, 0.0], [True, True], [0, 0], config=replace(CONFIG, combine="weighted_sum"))
    assert advantage.tolist() == pytest.approx([-ROOT_HALF, ROOT_HALF])


def test_a_broken_response_stands_below_the_worst_and_pays_the_penalty() -> None:
    # Both branches become 2, 0, 0 - 1 = -1 (whatever score was stored): mean 1/3, squares 25/9 + 1/9 + 16/9 = 14/3.
    advantage = align([2.0, 0.0, 77.0], [2.0, 0.0, 77.0], [True, True, False], [0, 0, 0])
    deviation = math.sqrt(14 / 3 / 2)
    expected = [(2 - 1 / 3) / deviation, (0 - 1 / 3) / deviation, (-1 - 1 / 3) / deviation - 1.5]
    assert advantage.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["none", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align"])
def test_a_group_without_a_valid_response_teaches_nothing(mode: str) -> None:
    # D8: the paper's code gives -1.5 to all of them.
    gating = GatingConfig(mode, format_penalty=2.0)
    config = replace(CONFIG, gating=gating)
    assert align([1.0, 2.0], [3.0, 4.0], [False, False], [0, 0], config=config).tolist() == [0, 0]


# One group of four: right, wrong, wrong, outside the grammar. Branches agree, so A is one z-score: scores 3, 2, 1 and
# 1 - 1 = 0, mean 1.5, squares 2.25 + 0.25 + 0.25 + 2.25 = 5, deviation sqrt(5 / 3).
SCORES, VALID, CORRECT = [3.0, 2.0, 1.0, 9.0], [True, True, True, False], [True, False, False, False]
A = [value / math.sqrt(5 / 3) for value in (1.5, 0.5, -0.5, -1.5)]
# acc + fmt = 2, 1, 1, 0: mean 1, deviation sqrt(2 / 3).
REWARD = [value / math.sqrt(2 / 3) for value in (1.0, 0.0, 0.0, -1.0)]
# minus 0.5 where wrong, minus 2 where broken: 2, 0.5, 0.5, -2: mean 0.25, squares 3.0625 + 2 * 0.0625 + 5.0625 = 8.25.
PENALIZED = [value / math.sqrt(8.25 / 3) for value in (1.75, 0.25, 0.25, -2.25)]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [A[0], A[1], A[2], A[3] - 1.5]),
        ("acc_gating", [2 * A[0], 2 * A[1] - 0.5, 2 * A[2] - 0.5, 2 * A[3] - 2]),
        ("gated", [2 * A[0], -0.5, -0.5, -2]),
        ("rlvr", [REWARD[0] + 2 * A[0], REWARD[1], REWARD[2], REWARD[3]]),
        ("rlvr_v2", [PENALIZED[0] + 2 * A[0], PENALIZED[1], PENALIZED[2], PENALIZED[3]]),
        ("sign_align", [PENALIZED[0] + 2 * A[0], PENALIZED[1] - 2 * A[1], PENALIZED[2] - 2 * A[2], PENALIZED[3]]),
    ],
)
def test_gates_by_hand(mode: str, expected: list[float]) -> None:
    gating = GatingConfig(mode, align_coeff=2.0, wrong_penalty=0.5, format_penalty=2.0)
    config = replace(CONFIG, gating=gating)
    advantage = align(SCORES, SCORES, VALID, [0, 0, 0, 0], correct=CORRECT, config=config)
    assert advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_splitting_the_prompts_over_ranks_changes_nothing() -> None:
    """Advantages need one group only, and no rank ever holds part of a group."""
    generator = torch.Generator().manual_seed(1)
    perception, reasoning = torch.randn(2, 12, generator=generator).tolist()
    valid = (torch.rand(12, generator=generator) > 0.3).tolist()
    groups = [0] * 4 + [1] * 4 + [2] * 4
    whole = align(perception, reasoning, valid, groups).tolist()
    cut = [align(perception[i : i + 4], reasoning[i : i + 4], valid[i : i + 4], [7] * 4).tolist() for i in (0, 4, 8)]
    assert whole == pytest.approx(cut[0] + cut[1] + cut[2], abs=1e-6)
