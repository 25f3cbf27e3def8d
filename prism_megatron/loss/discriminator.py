"""The discriminator's losses on pairs of scores (Eq. 2, spec 3.3, 4.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

REFERENCE_SCORE_CLIP = 10.0  # spec 4.1
_REFERENCE_FALLBACK = 0.01  # spec 4.4


def bradley_terry_loss(
    teacher_scores: Tensor, student_scores: Tensor, weights: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """-sum w ((1 - e) log sigmoid(gap) + e log sigmoid(-gap)), a scalar; gap = s_teacher - s_student, inputs [M].

    With label smoothing e the loss is smallest at the gap log((1 - e) / e), not at infinity: the discriminator is told
    to stay unsure.
    """
    gap = teacher_scores - student_scores
    loss = (1 - label_smoothing) * F.softplus(-gap) + label_smoothing * F.softplus(gap)
    return (loss * weights).sum()


def score_regularizer(teacher_scores: Tensor, student_scores: Tensor, weights: Tensor) -> Tensor:
    """sum w (s_teacher^2 + s_student^2) / 4: where each branch's weights sum to 1, the mean square of all scores.

    Keeps scores from drifting without the dead gradient of a clamp (spec 9.1, D6).
    """
    return ((teacher_scores.square() + student_scores.square()) * weights).sum() / 4


def gradient_penalty(perturbed_scores: Tensor, scores: Tensor, weights: Tensor, *, std: float) -> Tensor:
    """sum w ((D(x + std e) - D(x)) / std)^2 / 2 of demonstrations, inputs [M]; e is standard normal noise.

    R1 penalises |g|^2 / 2, g the gradient of D in its input x, and training on it takes second derivatives, which fused
    attention and Megatron's linear layers do not have. This needs none: D(x + std e) - D(x) is std e.g up to a term of
    order std^2, and E (e.g)^2 = g^T E[e e^T] g = |g|^2. The next term, odd in e, has mean zero, so that one draw is an
    estimate of R1 whose bias is of order std^2, as long as D is smooth where it is measured. Scores rounded more
    coarsely than std |g| drown it.

    A router that chooses topk of more experts makes D jump where its choice changes, and x + std e may be routed
    otherwise than x. A jump of height h adds about h^2 / std to the mean: with top 2 of 4 the estimate was 1.3 times R1
    at std 0.1 and 3.5 times at 0.01. Where every expert of a branch is chosen, as in the recipes of published sizes,
    there is no jump; elsewhere a larger std is closer to R1, and the weight must be chosen with that in mind.
    """
    slope = (perturbed_scores - scores) / std
    return (slope.square() * weights).sum() / 2


def reference_branch_loss(
    teacher_scores: Tensor, student_scores: Tensor, valid: Tensor, *, regularizer: float
) -> Tensor:
    """One branch's loss over one micro-batch as the paper's code has it (spec 4.4); inputs [M], ``valid`` bool.

    Scores are clamped, and have no gradient beyond. The mean is over this micro-batch's valid rows; without one, the
    teacher's mean score is pushed up a little instead. Invalid rows, split in half, still count for the regulariser.
    """
    teacher = teacher_scores.clamp(-REFERENCE_SCORE_CLIP, REFERENCE_SCORE_CLIP)
    student = student_scores.clamp(-REFERENCE_SCORE_CLIP, REFERENCE_SCORE_CLIP)
    if bool(valid.any()):
        loss = F.softplus(student - teacher)[valid].mean()
    else:
        loss = _REFERENCE_FALLBACK * F.softplus(-teacher.mean())
    return loss + regularizer * (teacher.square().mean() + student.square().mean()) / 4
