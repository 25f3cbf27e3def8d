"""Advantages from scores and rewards, normalised within prompt groups (Eq. 3, spec 4.5, 5.1).

All tensors are [N], one entry per response; responses to the same prompt have the same number in ``groups``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_megatron.config import GatingConfig

# Rewards that differ by less than this are equal: sums of the same float64 numbers in another order.
_ABSOLUTE_ROUNDING, _RELATIVE_ROUNDING = 1e-12, 1e-9


@dataclass(frozen=True)
class ScoredResponses:
    """The discriminator's scores and the verifier's verdicts on N responses; all tensors are [N].

    ``format_valid`` marks responses inside the grammar and ``correct`` right answers; the scores of a response outside
    the grammar are ignored.
    """

    perception_scores: Tensor
    reasoning_scores: Tensor
    format_valid: Tensor
    correct: Tensor
    groups: Tensor


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of :func:`alignment_advantage`.

    perception_weight  alpha, the weight of the perception branch; the reasoning branch has 1 - alpha
    format_penalty     subtracted for a response outside the grammar, unless a gating mode has its own
    combine            per_branch normalises, then adds (released code); weighted_sum adds, then normalises (Eq. 1, 3)
    eps, std_floor     see :func:`group_normalize`; the floor applies to scores, not to verified rewards
    """

    perception_weight: float
    format_penalty: float
    combine: str
    eps: float
    std_floor: float = 0.0
    gating: GatingConfig = field(default_factory=GatingConfig)


# (scores, groups, eps, std_floor) -> normalised scores
GroupNormalize = Callable[[Tensor, Tensor, float, float], Tensor]


def group_normalize(scores: Tensor, groups: Tensor, eps: float, std_floor: float = 0.0) -> Tensor:
    """Return (s - mean) / (max(std, std_floor) + eps) within each group, computed in float64 (spec 4.5, 5.1).

    ``std`` is the unbiased standard deviation of the group. ``eps`` only keeps the quotient finite; ``std_floor`` (not
    in the paper) keeps scores that hardly differ from getting advantages of full size. A group of one has no
    comparison, and a group of equal scores no preference: their advantages are exactly 0.

    Returns:
        [N] float32.
    """
    index, size = _group_index(groups)
    counts = torch.bincount(index, minlength=size)
    scores = scores.double()
    zeros = torch.zeros(size, dtype=scores.dtype, device=scores.device)
    mean = zeros.index_add(0, index, scores) / counts
    centred = scores - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (counts - 1).clamp(min=1)
    deviation = variance.sqrt().clamp(min=std_floor)
    return torch.where(informative_groups(scores, groups), centred / (deviation[index] + eps), 0.0).float()


def alignment_advantage(scored: ScoredResponses, config: AdvantageConfig) -> Tensor:
    """Return the advantage of each response in adversarial alignment, [N] float32 (spec 4.5, repairs of 9.1).

        A = alpha GN(s_perception) + (1 - alpha) GN(s_reasoning) - format_penalty F

    GN is :func:`group_normalize`; F is 1 outside the grammar, where a response scores one less than the worst valid
    response of its group. ``combine`` and ``gating`` change the formula, see :func:`combine_branches`. A group without
    any valid response has nothing to learn from: its advantages are 0 (D8).
    """
    advantage = combine_branches(scored, config, group_normalize)
    index, size = _group_index(scored.groups)
    valid_count = torch.zeros(size, device=scored.groups.device).index_add(0, index, scored.format_valid.float())
    return torch.where((valid_count > 0)[index], advantage, 0.0)


def combine_branches(scored: ScoredResponses, config: AdvantageConfig, normalize: GroupNormalize) -> Tensor:
    """Return the advantages before groups without a valid response are masked, [N] float32.

    With A the normalised scores of both branches, GN the normalisation without floor, c the ``align_coeff``, wa and wf
    the accuracy and format weights, wp and fp the penalties of ``config.gating``, F outside the grammar and W inside it
    with a wrong answer:

        none        A - format_penalty F
        acc_gating  c A - wp W - fp F
        gated       c A (1 - F)(1 - W) - wp W - fp F
        rlvr        GN(wa acc + wf fmt) + c A (1 - F)(1 - W)
        rlvr_v2     GN(wa acc + wf fmt - wp W - fp F) + c A (1 - F)(1 - W)
        sign_align  GN(wa acc + wf fmt - wp W - fp F) + c A (1 - F)(1 - 2 W)
    """
    alpha, valid, groups = config.perception_weight, scored.format_valid, scored.groups
    perception = _below_worst(scored.perception_scores.float(), valid, groups)
    reasoning = _below_worst(scored.reasoning_scores.float(), valid, groups)

    def normalized(scores: Tensor) -> Tensor:
        return normalize(scores, groups, config.eps, config.std_floor)

    if config.combine == "per_branch":
        advantage = alpha * normalized(perception) + (1 - alpha) * normalized(reasoning)
    else:
        assert config.combine == "weighted_sum"
        advantage = normalized(alpha * perception + (1 - alpha) * reasoning)
    if config.gating.mode == "none":
        return advantage - config.format_penalty * (~valid).float()
    return _gated(advantage, scored, config, normalize).float()


def _gated(align: Tensor, scored: ScoredResponses, config: AdvantageConfig, normalize: GroupNormalize) -> Tensor:
    """Combine normalised scores with verified rewards, in float64: equal rewards then differ by rounding only."""
    gating = config.gating
    valid, accuracy = scored.format_valid.double(), (scored.correct & scored.format_valid).double()
    wrong, invalid = valid - accuracy, 1 - valid
    align = gating.align_coeff * align
    reward = gating.accuracy_weight * accuracy + gating.format_weight * valid
    penalty = gating.wrong_penalty * wrong + gating.format_penalty * invalid

    def normalized(rewards: Tensor) -> Tensor:
        return normalize(rewards, scored.groups, config.eps, 0.0)

    if gating.mode == "acc_gating":
        return align - penalty
    if gating.mode == "gated":
        return align * valid * (1 - wrong) - penalty
    if gating.mode == "rlvr":
        return normalized(reward) + align * valid * (1 - wrong)
    if gating.mode == "rlvr_v2":
        return normalized(reward - penalty) + align * valid * (1 - wrong)
    assert gating.mode == "sign_align"
    return normalized(reward - penalty) + align * valid * (1 - 2 * wrong)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return which responses belong to a group whose rewards differ by more than rounding, [N] bool.

    Other groups have no gradient.
    """
    index, size = _group_index(groups)
    rewards = rewards.double()
    low = torch.full((size,), float("inf"), dtype=rewards.dtype).scatter_reduce(0, index, rewards, "amin")
    high = torch.full((size,), float("-inf"), dtype=rewards.dtype).scatter_reduce(0, index, rewards, "amax")
    rounding = _ABSOLUTE_ROUNDING + _RELATIVE_ROUNDING * torch.maximum(high.abs(), low.abs())
    return (high - low > rounding)[index]


def _group_index(groups: Tensor) -> tuple[Tensor, int]:
    """Return the group of each response, counted from 0, [N], and the number of groups."""
    names, index = torch.unique(groups, return_inverse=True)
    return index, len(names)


def _below_worst(scores: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Replace invalid entries by their group's lowest valid score minus one (minus one if none is valid)."""
    index, size = _group_index(groups)
    worst = torch.full((size,), float("inf"))
    worst = worst.scatter_reduce(0, index[valid], scores[valid], "amin")
    worst = torch.where(worst.isinf(), 0.0, worst)
    return torch.where(valid, scores, worst[index] - 1)
