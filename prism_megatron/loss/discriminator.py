"""Losses of the discriminator on pairs of scores (Eq. 2, spec 3.3, 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of a micro-batch's M pairs of a demonstration (teacher) and a response (student); all tensors are [M].

    ``weights`` already divide by the global number of valid pairs of the branch. ``branch`` is PERCEPTION or REASONING.
    Invalid pairs (a student outside the grammar) exist in reference mode only. ``response_count`` is the number of
    responses in the global batch.
    """

    teacher: Tensor
    student: Tensor
    branch: Tensor
    valid: Tensor
    weights: Tensor
    response_count: float


@dataclass(frozen=True)
class PairLossConfig:
    """Weight of the score regulariser, and e of the smoothed Bradley-Terry loss."""

    regularizer: float = 0.0
    label_smoothing: float = 0.0


# Returns the loss to differentiate and the loss to log, both scalars.
PairLoss = Callable[[PairScores, PairLossConfig], tuple[Tensor, Tensor]]


def pair_loss(scores: PairScores, config: PairLossConfig) -> tuple[Tensor, Tensor]:
    """Return the regularised Bradley-Terry loss of a micro-batch, and the Bradley-Terry part alone.

    loss = BT + regularizer * sum w (s_teacher^2 + s_student^2) / 4.
    """
    teacher, student, weights = scores.teacher, scores.student, scores.weights
    preference = bradley_terry_loss(teacher, student, weights, label_smoothing=config.label_smoothing)
    return preference + config.regularizer * score_regularizer(teacher, student, weights), preference


def bradley_terry_loss(
    teacher_scores: Tensor, student_scores: Tensor, weights: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return -sum w ((1 - e) log sigmoid(gap) + e log sigmoid(-gap)) with gap = s_teacher - s_student, inputs [M].

    With label smoothing e the minimum is at the finite gap log((1 - e) / e), which keeps the discriminator uncertain.
    """
    gap = teacher_scores - student_scores
    loss = (1 - label_smoothing) * F.softplus(-gap) + label_smoothing * F.softplus(gap)
    return (loss * weights).sum()


def score_regularizer(teacher_scores: Tensor, student_scores: Tensor, weights: Tensor) -> Tensor:
    """Return sum w (s_teacher^2 + s_student^2) / 4: if a branch's weights sum to 1, half the mean square of its scores.

    Keeps scores from drifting without the dead gradient of a clamp (spec 9.1, D6).
    """
    return ((teacher_scores.square() + student_scores.square()) * weights).sum() / 4


def gradient_penalty(perturbed_scores: Tensor, scores: Tensor, weights: Tensor, *, std: float) -> Tensor:
    """Return sum w ((D(x + std e) - D(x)) / std)^2 / 2 of demonstrations, inputs [M]; e is standard normal noise.

    R1 penalises |g|^2 / 2, g being the gradient of D at its input x. Training on it takes second derivatives, which
    fused attention and Megatron's linear layers do not have. This estimate needs none: D(x + std e) - D(x) is std e.g
    up to order std^2, and E (e.g)^2 = g^T E[e e^T] g = |g|^2. The next term is odd in e and has mean zero, so one draw
    estimates R1 with a bias of order std^2 where D is smooth. Scores rounded more coarsely than std |g| drown it.

    A router that chooses topk of more experts makes D jump where its choice changes, and x + std e may be routed
    differently from x. A jump of height h adds about h^2 / std to the mean: with top 2 of 4 the estimate was 1.3 times
    R1 at std 0.1 and 3.5 times at 0.01. Where every expert of a branch is chosen, as in the recipes of published sizes,
    there is no jump; elsewhere a larger std is closer to R1, and the weight must be chosen accordingly.
    """
    slope = (perturbed_scores - scores) / std
    return (slope.square() * weights).sum() / 2
