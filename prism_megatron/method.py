"""The choice between this package's method and the paper's released code, by ``compat``.

prism_megatron/README.md lists the differences; tests/unit/test_reference_defects.py has a test of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prism_megatron import advantage, reference
from prism_megatron.advantage import AdvantageConfig, GroupNormalize, ScoredResponses
from prism_megatron.config import AlignConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair, split_samples
from prism_megatron.data.response import Response
from prism_megatron.data.samples import Sample
from prism_megatron.loss.discriminator import PairLoss, pair_loss
from prism_megatron.loss.reduce import TokenWeights, token_mean
from prism_megatron.reward.verifiable import judge
from prism_megatron.types import Example, Rollout

Judge = Callable[[Rollout, Example, ChatProcessor], tuple[Response | None, bool]]
Split = Callable[[Sequence[Sample], ChatProcessor, AlignConfig], tuple[list[TrainingSequence], list[Pair]]]


@dataclass(frozen=True)
class Method:
    """The functions in which the paper's code differs.

    judge       parses and verifies a rollout
    split       splits samples into the branches to score and the pairs to train on
    max_score   scores are clamped to +-max_score before they become advantages
    normalize   normalises rewards within groups
    advantage   turns scores into alignment's advantages
    pair_loss   the discriminator's loss
    token_mean  token weights of the GRPO and DAPO losses
    """

    judge: Judge
    split: Split
    max_score: float
    normalize: GroupNormalize
    advantage: Callable[[ScoredResponses, AdvantageConfig], Tensor]
    pair_loss: PairLoss
    token_mean: TokenWeights


FIXED = Method(
    judge=judge,
    split=split_samples,
    max_score=math.inf,
    normalize=advantage.group_normalize,
    advantage=advantage.alignment_advantage,
    pair_loss=pair_loss,
    token_mean=token_mean,
)
REFERENCE = Method(
    judge=reference.judge,
    split=reference.split_samples,
    max_score=reference.MAX_SCORE,
    normalize=reference.group_normalize,
    advantage=reference.alignment_advantage,
    pair_loss=reference.pair_loss,
    token_mean=reference.microbatch_mean,
)
METHODS = {"fixed": FIXED, "reference": REFERENCE}  # by config.compat
