"""Losses of the paper's code, by hand (spec 4.4, 4.6)."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.loss.discriminator import PairLossConfig, PairScores
from prism_megatron.loss.reduce import BatchTotals
from prism_megatron.reference.loss import branch_loss, microbatch_mean, pair_loss


def test_the_branch_loss_by_hand() -> None:
    # Two valid rows with gaps 0 and ln 3, one invalid row for the regulariser only: squares 1, 9, 4 and 1, 0, 16
    # (with ln 3 squared instead of 9).
    teacher, student = torch.tensor([1.0, math.log(3), 2.0]), torch.tensor([1.0, 0.0, -4.0])
    loss = branch_loss(teacher, student, torch.tensor([True, True, False]), regularizer=0.1)
    squares = (1 + math.log(3) ** 2 + 4) / 3 + (1 + 0 + 16) / 3
    assert float(loss) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2 + 0.1 * squares / 4)


def test_the_branch_loss_falls_back_without_a_valid_row() -> None:
    teacher = torch.tensor([0.0, 2 * math.log(3)], requires_grad=True)
    loss = branch_loss(teacher, torch.zeros(2), torch.tensor([False, False]), regularizer=0.0)
    assert float(loss) == pytest.approx(0.01 * math.log(4 / 3))


def test_the_pair_loss_weighs_branch_means_by_their_pairs() -> None:
    # Two responses of a global batch of four, in both branches: gaps ln 3, 0 and 0 of perception, the last one invalid,
    # and no pair of reasoning but an invalid one.
    teacher = torch.tensor([math.log(3), 0.0, 0.0, 0.0])
    scores = PairScores(
        teacher,
        torch.zeros(4),
        branch=torch.tensor([0, 0, 0, 1]),
        valid=torch.tensor([True, True, False, False]),
        weights=torch.full((4,), 99.0),
        response_count=4.0,
    )
    loss, logged = pair_loss(scores, PairLossConfig(regularizer=0.0, label_smoothing=0.4))
    perception, reasoning = (math.log(2) + math.log(4 / 3)) / 2, 0.01 * math.log(2)
    assert float(loss) == pytest.approx(perception * 3 / 4 + reasoning / 4)
    assert logged is loss


def test_tokens_are_averaged_within_the_micro_batch() -> None:
    # Sequences of 1 and 3 trained tokens out of the global batch's 4 sequences: 1/4 each, times 2/4.
    weights = microbatch_mean(torch.tensor([0.0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1]), BatchTotals(9.0, 4.0))
    assert weights.tolist() == [0, 1 / 8, 1 / 8, 1 / 8, 1 / 8]
