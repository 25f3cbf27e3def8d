"""The discriminator's losses on pairs of scores (Eq. 2, spec 3.3, 4.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(teacher_scores: Tensor, student_scores: Tensor, weights: Tensor) -> Tensor:
    """sum w softplus(-(s_teacher - s_student)), a scalar: -log sigmoid of the gap, stable at any. Inputs are [M]."""
    return (F.softplus(student_scores - teacher_scores) * weights).sum()


def score_regularizer(teacher_scores: Tensor, student_scores: Tensor, weights: Tensor) -> Tensor:
    """sum w (s_teacher^2 + s_student^2) / 4: where each branch's weights sum to 1, the mean square of all scores.

    Keeps scores from drifting without the dead gradient of a clamp (spec 9.1, D6).
    """
    return ((teacher_scores.square() + student_scores.square()) * weights).sum() / 4
