"""Functions of samples, compared with values by hand: pass rates, correlations within groups, masking, rewards."""

from __future__ import annotations

import statistics

import pytest

from prism_megatron.config import RLVRConfig
from prism_megatron.data.samples import Sample
from prism_megatron.stages.align import within_groups
from prism_megatron.stages.collect import pass_rates
from prism_megatron.stages.rlvr import reward, trained_samples
from prism_megatron.types import EncodedPrompt, Example, Rollout
from recipes.train import load


def sample(*, finished: bool, tokens: int = 4) -> Sample:
    rollout = Rollout((1,) * tokens, (0.0,) * tokens, "text", finished, 0)
    return Sample(Example("same", (), (), "row"), EncodedPrompt((1,)), rollout, None, False, 0)


def rlvr(*overrides: str) -> RLVRConfig:
    config = load("tiny_rlvr", list(overrides))
    assert isinstance(config, RLVRConfig)
    return config


def test_pass_rates_are_per_row_even_if_ids_repeat() -> None:
    # Three rows with two samples each: both right, both wrong, one right.
    assert pass_rates([True, True, False, False, False, True], 2) == [1.0, 0.0, 0.5]
    assert pass_rates([], 2) == []


def test_lengths_and_scores_are_correlated_within_groups_only() -> None:
    # Group 1 is long and scores high: pooled, 0.99. Within each group the longer response scores lower: -1.
    scores, lengths, groups = [1.0, 2.0, 101.0, 102.0], [11.0, 10.0, 111.0, 110.0], [0, 0, 1, 1]
    assert statistics.correlation(scores, lengths) > 0.99
    assert within_groups(scores, groups) == [-0.5, 0.5, -0.5, 0.5]
    assert within_groups(lengths, groups) == [0.5, -0.5, 0.5, -0.5]
    assert within_groups([0.1] * 3 + [7.0], [0, 0, 0, 1]) == [0.0] * 4


@pytest.mark.parametrize(("mask", "trained"), [("false", [0, 1, 2]), ("true", [0, 2])])
def test_mask_truncated_leaves_cut_responses_out_of_the_loss(mask: str, trained: list[int]) -> None:
    samples = [sample(finished=finished) for finished in (True, False, True)]
    assert trained_samples(samples, rlvr(f"mask_truncated={mask}")) == trained


def test_a_reward_is_not_rounded_to_float32() -> None:
    # 100 tokens of 160, a buffer of 96: 36 / 96 of 0.1, exact in neither float32 nor a sum of rounded parts.
    config = rlvr("algorithm=dapo", "overlong_buffer_tokens=96", "overlong_penalty=0.1")
    assert reward(sample(finished=True, tokens=100), config) == pytest.approx(-0.0375, abs=1e-15)
