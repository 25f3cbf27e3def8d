"""Losses of the paper's code (spec 4.4, 4.6): averaged within micro-batches (D9), on clamped scores (D6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prism_megatron.loss.discriminator import PairLossConfig, PairScores
from prism_megatron.loss.reduce import BatchTotals, sequence_sums
from prism_megatron.types import PERCEPTION, REASONING

MAX_SCORE = 10.0  # spec 4.1
_FALLBACK = 0.01  # spec 4.4


def pair_loss(scores: PairScores, config: PairLossConfig) -> tuple[Tensor, Tensor]:
    """Return the micro-batch's loss twice, to differentiate and to log: the sum over branches of

        branch_loss * (pairs of the branch in the micro-batch / responses in the global batch).

    Both branches weigh alike whatever ``perception_weight`` is (D10); weights and label smoothing are unused.
    """
    loss = 0.0 * (scores.teacher.sum() + scores.student.sum())
    for branch in (PERCEPTION, REASONING):
        rows = scores.branch == branch
        if rows.any():
            part = branch_loss(
                scores.teacher[rows], scores.student[rows], scores.valid[rows], regularizer=config.regularizer
            )
            loss = loss + part * (rows.sum() / scores.response_count)
    return loss, loss


def branch_loss(teacher_scores: Tensor, student_scores: Tensor, valid: Tensor, *, regularizer: float) -> Tensor:
    """Return one branch's loss over one micro-batch (spec 4.4); inputs [M], ``valid`` bool.

    The loss is mean_valid(-log sigmoid(s_teacher - s_student)) of scores clamped to +-10, which have no gradient beyond
    (D6). Without a valid pair it is -0.01 log sigmoid(mean s_teacher). Invalid pairs, split in half, still count for
    the regulariser regularizer * (mean s_teacher^2 + mean s_student^2) / 4.
    """
    teacher = teacher_scores.clamp(-MAX_SCORE, MAX_SCORE)
    student = student_scores.clamp(-MAX_SCORE, MAX_SCORE)
    preference = F.softplus(student - teacher)[valid].mean() if valid.any() else _FALLBACK * F.softplus(-teacher.mean())
    return preference + regularizer * (teacher.square().mean() + student.square().mean()) / 4


def microbatch_mean(mask: Tensor, sequence_ids: Tensor, totals: BatchTotals) -> Tensor:
    """Weigh tokens by a mean over this micro-batch's tokens, times its fraction of the sequences (spec 4.6, D9).

    Returns:
        w_t = mask_t / N_B * S_B / S, [T], with N_B tokens and S_B sequences in the micro-batch, S in the global batch.
    """
    lengths = sequence_sums(mask, sequence_ids)
    return mask / mask.sum().clamp(min=1.0) * (lengths > 0).sum() / max(totals.sequences, 1.0)
