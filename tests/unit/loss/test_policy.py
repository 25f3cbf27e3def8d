"""Policy-gradient losses and their gradients, by hand. Ratios are chosen, log-probabilities follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism_megatron.loss.policy import PolicyLossConfig, policy_loss

GRPO = PolicyLossConfig("grpo", clip_low=0.2, clip_high=0.2, dual_clip=None)


def loss_of(
    ratios: list[float],
    advantages: list[float],
    config: PolicyLossConfig = GRPO,
    mask: list[float] | None = None,
    sequence_ids: list[int] | None = None,
) -> tuple[float, list[float], float]:
    """The loss with weight 1 on every token, its gradient per token, and how many tokens were clipped."""
    logprobs = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    selected = torch.ones(len(ratios)) if mask is None else torch.tensor(mask)
    ids = torch.zeros(len(ratios), dtype=torch.long) if sequence_ids is None else torch.tensor(sequence_ids)
    value, stats = policy_loss(
        logprobs, torch.zeros(len(ratios)), torch.tensor(advantages), selected, selected, ids, config
    )
    value.backward()
    assert isinstance(logprobs.grad, Tensor)
    return float(value), logprobs.grad.tolist(), float(stats.clip_fraction_sum)


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    value, gradient, clipped = loss_of([1.0, 1.0], [2.0, -3.0])
    assert value == pytest.approx(1.0)
    assert gradient == pytest.approx([-2.0, 3.0])
    assert clipped == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # gained enough: the clipped branch is the smaller objective
        (0.5, 1.0, -0.5, -0.5),  # fell although it was good: not clipped
        (0.5, -1.0, 0.8, 0.0),  # lost enough
        (1.5, -1.0, 1.5, 1.5),  # rose although it was bad: not clipped
    ],
)
def test_clipping_on_its_four_sides(ratio: float, advantage: float, value: float, gradient: float) -> None:
    measured, slope, clipped = loss_of([ratio], [advantage])
    assert measured == pytest.approx(value)
    assert slope[0] == pytest.approx(gradient)
    assert clipped == (gradient == 0.0)


def test_dual_clip_bounds_a_bad_token_that_became_likely() -> None:
    # r = 10, A = -1: 10 without it, 3 with it, and then no gradient.
    bounded = PolicyLossConfig("grpo", 0.2, 0.2, dual_clip=3.0)
    assert loss_of([10.0], [-1.0])[0] == pytest.approx(10.0)
    value, gradient, _ = loss_of([10.0], [-1.0], bounded)
    assert (value, gradient[0]) == (pytest.approx(3.0), 0.0)


def test_clip_higher_lets_a_good_token_rise_further() -> None:
    dapo = PolicyLossConfig("dapo", clip_low=0.2, clip_high=0.28, dual_clip=None)
    assert loss_of([1.25], [1.0], dapo)[1][0] == pytest.approx(-1.25)
    assert loss_of([1.25], [1.0])[1][0] == 0.0


def test_gspo_uses_one_ratio_for_the_sequence() -> None:
    # Sequence 0 has ratios 4 and 1, whose geometric mean is 2; sequence 1 has ratio 1.
    gspo = PolicyLossConfig("gspo", clip_low=0.9, clip_high=9.0, dual_clip=None)
    value, gradient, _ = loss_of([4.0, 1.0, 1.0], [1.0, 1.0, 5.0], gspo, sequence_ids=[0, 0, 1])
    assert value == pytest.approx(-2 - 2 - 5)
    assert gradient == pytest.approx([-2.0, -2.0, -5.0])


def test_what_the_mask_hides_cannot_reach_the_loss() -> None:
    value, gradient, clipped = loss_of([1.0, 1e30], [2.0, -1.0], mask=[1.0, 0.0])
    assert value == pytest.approx(-2.0)
    assert gradient == [-2.0, 0.0]
    assert clipped == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppo", 0.2, 0.2, None), "policy loss must be grpo, dapo or gspo, got 'ppo'"),
        (("grpo", 1.0, 0.2, None), r"clip_low must be in \[0, 1\) and clip_high >= 0, got 1.0 and 0.2"),
        (("grpo", 0.2, 0.2, 1.0), "dual_clip must be above 1, got 1.0"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(*arguments)  # type: ignore[arg-type]
