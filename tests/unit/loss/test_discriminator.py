"""The discriminator's losses, by hand (Eq. 2)."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.loss.discriminator import (
    PairLossConfig,
    PairScores,
    bradley_terry_loss,
    gradient_penalty,
    pair_loss,
    score_regularizer,
)


def test_bradley_terry_by_hand() -> None:
    # Gaps 0 and ln 3: -log sigmoid = ln 2 and -log(3/4).
    teacher, student = torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0])
    loss = bradley_terry_loss(teacher, student, torch.tensor([0.5, 0.5]))
    assert float(loss) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4 / 3))


def test_gradient_survives_where_the_paper_clamps_it_away() -> None:
    # D6: a gap of -40 is far outside a clamp at 10; the gradient must still be the full -1 and nothing overflow.
    teacher = torch.tensor([-20.0], requires_grad=True)
    loss = bradley_terry_loss(teacher, torch.tensor([20.0]), torch.ones(1))
    loss.backward()
    assert float(loss) == pytest.approx(40.0)
    assert teacher.grad is not None
    assert float(teacher.grad) == pytest.approx(-1.0)


def test_regularizer_is_the_mean_square_of_all_scores() -> None:
    # Perception scores 1, 3 and 2, 0 (two pairs, weight 1/2 each), reasoning 2 and 4 (one pair): means 3.5 and 10.
    teacher, student = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 0.0, 4.0])
    value = score_regularizer(teacher, student, torch.tensor([0.5, 0.5, 1.0]))
    assert float(value) == pytest.approx(0.5 * (3.5 + 10.0))


def test_label_smoothing_by_hand() -> None:
    # Gap ln 3, e = 0.1: 0.9 ln(4/3) + 0.1 ln 4. The slope vanishes at sigmoid(gap) = 0.9, gap ln 9.
    teacher = torch.tensor([math.log(3), math.log(9)], requires_grad=True)
    loss = bradley_terry_loss(teacher, torch.zeros(2), torch.tensor([1.0, 0.0]), label_smoothing=0.1)
    assert float(loss) == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    bradley_terry_loss(teacher, torch.zeros(2), torch.tensor([0.0, 1.0]), label_smoothing=0.1).backward()
    assert teacher.grad is not None
    assert teacher.grad.tolist() == pytest.approx([0, 0], abs=1e-7)


def test_gradient_penalty_by_hand() -> None:
    # D(x) = (1, 2, -2).x at x = 0 with noise (1/2, -1, 1/4) of std 0.1: the slope along it is 1/2 - 2 - 1/2 = -2.
    weight, noise = torch.tensor([1.0, 2.0, -2.0]), torch.tensor([0.5, -1.0, 0.25])
    perturbed = torch.stack(((0.1 * noise) @ weight, torch.tensor(3.0)))
    value = gradient_penalty(perturbed, torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.5]), std=0.1)
    assert float(value) == pytest.approx(0.5 * (-2) ** 2 / 2)


def test_gradient_penalty_is_half_the_squared_gradient_on_average() -> None:
    # D(x) = (1, 2, -2).x + 3 |x|^2 at x = 0, where its gradient is (1, 2, -2): R1 is 9/2, the curvature averages out.
    weight, noise = torch.tensor([1.0, 2.0, -2.0]), torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1))
    step = 0.01 * noise
    perturbed = step @ weight + 3 * step.square().sum(1)
    weights = torch.full((len(noise),), 1 / len(noise))
    value = gradient_penalty(perturbed, torch.zeros(len(noise)), weights, std=0.01)
    assert float(value) == pytest.approx(4.5, rel=0.02)


def test_the_pair_loss_adds_the_regularizer_and_logs_the_preference_alone() -> None:
    # One pair of each branch, weights 1.5 and 0.5. Gaps 0 and ln 3; squares 1 + 1 and (ln 3)^2.
    ln3 = math.log(3)
    scores = PairScores(
        teacher=torch.tensor([1.0, ln3]),
        student=torch.tensor([1.0, 0.0]),
        branch=torch.tensor([0, 1]),
        valid=torch.tensor([True, True]),
        weights=torch.tensor([1.5, 0.5]),
        response_count=1.0,
    )
    loss, logged = pair_loss(scores, PairLossConfig(regularizer=0.1))
    assert float(logged) == pytest.approx(1.5 * math.log(2) + 0.5 * math.log(4 / 3))
    assert float(loss) == pytest.approx(float(logged) + 0.1 * (1.5 * 2 + 0.5 * ln3**2) / 4)
