"""The policy loss of a stage; non-finite values are reported with their sample before they reach the sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prism_megatron.config import AlignConfig, RLVRConfig
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.loss.policy import PolicyLossConfig
from prism_megatron.loss.reduce import BatchTotals, TokenWeights, sequence_mean, token_mean
from prism_megatron.model.logprobs import TokenScores
from prism_megatron.stages.batcher import PolicyMicrobatch, policy_token_weights
from prism_megatron.stages.policy import (
    LOGPROB_TOLERANCE,
    check_difference,
    engine_differences,
    policy_gradient_loss,
    policy_loss_config,
)
from prism_megatron.types import EncodedPrompt, InputSpec
from recipes.train import load

SPEC = InputSpec(image_token_id=9, video_token_id=8, merge_size=1, patch_dim=1, max_positions=1000)
LOSS = PolicyLossConfig("grpo", 0.2, 0.2, kl_coeff=0.1, kl_estimator="k2")


def microbatch() -> PolicyMicrobatch:
    """Three samples with a prompt of one token and a response of two, on-policy and at their reference."""
    packed = pack([TrainingSequence(EncodedPrompt((1,)), (2, 3)) for _ in range(3)], SPEC)
    mask, zeros = packed.loss_mask, torch.zeros_like(packed.loss_mask)
    weights = token_mean(mask, packed.sequence_ids, BatchTotals(tokens=6.0, sequences=3.0))
    advantages = torch.tensor([1.0, -2.0, 4.0])[packed.sequence_ids]
    return PolicyMicrobatch(
        packed, 1.0, ("first", "second", "third"), weights, advantages, zeros, mask, zeros, reference_logprobs=zeros
    )


def scores(**of_token: float) -> TokenScores:
    zeros = torch.zeros(9)
    for token, value in of_token.items():
        zeros[int(token[1:])] = value
    return TokenScores(zeros, torch.zeros(9))


@pytest.mark.parametrize("recipe", ["tiny_align", "tiny_rlvr"])
@pytest.mark.parametrize(("algorithm", "mean"), [("grpo", token_mean), ("dapo", token_mean), ("gspo", sequence_mean)])
def test_both_stages_have_every_algorithms_loss(recipe: str, algorithm: str, mean: TokenWeights) -> None:
    config = load(recipe, [f"algorithm={algorithm}"])
    assert isinstance(config, AlignConfig | RLVRConfig)
    assert (policy_loss_config(config).kind, policy_token_weights(config)) == (algorithm, mean)


def test_the_loss_is_the_mean_over_tokens() -> None:
    loss, stats = policy_gradient_loss(LOSS, microbatch(), scores())
    assert float(loss) == pytest.approx(-(1.0 - 2.0 + 4.0) / 3)
    assert float(stats.sums["tokens"]) == 6


# Tokens 3 and 4 of nine predict the second sample's response.
@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("advantages", "advantage"),
        ("rollout_logprobs", "engine's log-probability"),
        ("reference_logprobs", "reference policy's log-probability"),
        ("old_logprobs", "log-probability before the update"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_inputs_are_named(field: str, named: str, value: float) -> None:
    batch = microbatch()
    broken = getattr(batch, field).clone()
    broken[4] = value
    with pytest.raises(FloatingPointError, match=f"^{named} of sample second is {value}; the step is refused"):
        policy_gradient_loss(LOSS, replace(batch, **{field: broken}), scores())


def test_a_non_finite_log_probability_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"^log-probability of sample third is nan"):
        policy_gradient_loss(LOSS, microbatch(), scores(t6=math.nan))


def test_an_overflowing_loss_names_its_sample() -> None:
    # A = -2 and a ratio of exp(100): more than float32 holds, although all inputs are finite.
    with pytest.raises(FloatingPointError, match=r"^policy loss of sample second is inf"):
        policy_gradient_loss(LOSS, microbatch(), scores(t3=100.0))


def test_trainer_and_engine_are_compared_on_policy_by_hand() -> None:
    # Two responses of two tokens: ratios p / q of 2 and 1/2, then 1 and 4, whose last token an older policy sampled.
    # k3 = r - 1 - ln r: 1 - ln 2, ln 2 - 1/2 and 0. Off-policy values may be anything.
    ln2 = math.log(2)
    differences = torch.tensor([ln2, -ln2, 0.0, math.inf])
    is_on_policy, ids = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    sums, maxima = engine_differences(differences, is_on_policy, ids)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {"on_policy": 3, "difference_sum": 2 * ln2, "mismatch": 0.5}
    )
    assert {name: float(value) for name, value in maxima.items()} == pytest.approx(
        {"difference": ln2, "response_difference": ln2}
    )


def test_one_far_token_of_many_does_not_stop_a_run_and_a_response_far_off_does() -> None:
    ids = torch.repeat_interleave(torch.arange(2), 1000)
    outlier = torch.full((2000,), 0.02)
    outlier[7] = 5.0
    _, maxima = engine_differences(outlier, torch.ones(2000), ids)
    config = load("tiny_rlvr", ["model.precision=bf16"])
    assert isinstance(config, RLVRConfig)
    check_difference(float(maxima["response_difference"]), config)
    outlier[1000:] = 0.6
    _, maxima = engine_differences(outlier, torch.ones(2000), ids)
    with pytest.raises(RuntimeError, match=r"differ by 0.6 nats a token over a response, more than .* allows \(0.5\)"):
        check_difference(float(maxima["response_difference"]), config)


@pytest.mark.parametrize(
    ("precision", "limit", "allowed"), [("fp32", 0, 1e-3), ("bf16", 0, 0.5), ("fp8", 0, 1.0), ("fp32", 2.0, 2.0)]
)
def test_every_precision_has_a_finite_limit(precision: str, limit: float, allowed: float) -> None:
    assert set(LOGPROB_TOLERANCE) == {"fp32", "bf16", "fp8"}
    config = load("tiny_rlvr", [f"model.precision={precision}", f"rollout.max_logprob_abs_diff={limit}"])
    assert isinstance(config, RLVRConfig)
    check_difference(0.99 * allowed, config)
    with pytest.raises(RuntimeError, match="raise the limit"):
        check_difference(1.01 * allowed, config)
    check_difference(1e6, replace(config, rollout=replace(config.rollout, max_logprob_abs_diff=1e9)))
