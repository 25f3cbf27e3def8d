"""The discriminator's losses, by hand (Eq. 2)."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.loss.discriminator import bradley_terry_loss, score_regularizer


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
