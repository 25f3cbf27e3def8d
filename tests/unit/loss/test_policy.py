"""Policy-gradient losses and their gradients, by hand. Ratios are chosen, log-probabilities follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism_megatron.loss.policy import PolicyLossConfig, TokenLogprobs, kl_estimate, policy_loss
from prism_megatron.loss.reduce import BatchTotals, sequence_mean, token_mean

GRPO = PolicyLossConfig("grpo", clip_low=0.2, clip_high=0.2, dual_clip=None)


def loss_of(
    ratios: list[float],
    advantages: list[float],
    config: PolicyLossConfig = GRPO,
    mask: list[float] | None = None,
    sequence_ids: list[int] | None = None,
) -> tuple[float, list[float], float]:
    """The loss with weight 1 on every token, its gradient per token, and how many tokens were clipped."""
    logprobs = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    selected = torch.ones(len(ratios)) if mask is None else torch.tensor(mask)
    ids = torch.zeros(len(ratios), dtype=torch.long) if sequence_ids is None else torch.tensor(sequence_ids)
    tokens = TokenLogprobs(logprobs, torch.zeros(len(ratios)))
    losses, stats = policy_loss(tokens, torch.tensor(advantages), selected, selected, ids, config)
    value = losses.sum()
    value.backward()
    assert isinstance(logprobs.grad, Tensor)
    return float(value), logprobs.grad.tolist(), float(stats.clip_fraction_sum)


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    value, gradient, clipped = loss_of([1.0, 1.0], [2.0, -3.0])
    assert value == pytest.approx(1.0)
    assert gradient == pytest.approx([-2.0, 3.0])
    assert clipped == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # gained enough: the clipped branch is the smaller objective
        (0.5, 1.0, -0.5, -0.5),  # fell although it was good: not clipped
        (0.5, -1.0, 0.8, 0.0),  # lost enough
        (1.5, -1.0, 1.5, 1.5),  # rose although it was bad: not clipped
    ],
)
def test_clipping_on_its_four_sides(ratio: float, advantage: float, value: float, gradient: float) -> None:
    loss, slope, clipped = loss_of([ratio], [advantage])
    assert loss == pytest.approx(value)
    assert slope[0] == pytest.approx(gradient)
    assert clipped == (gradient == 0.0)


def test_dual_clip_bounds_a_bad_token_that_became_likely() -> None:
    # r = 10, A = -1: 10 without it, 3 with it, and then no gradient.
    bounded = PolicyLossConfig("grpo", 0.2, 0.2, dual_clip=3.0)
    assert loss_of([10.0], [-1.0])[0] == pytest.approx(10.0)
    value, gradient, _ = loss_of([10.0], [-1.0], bounded)
    assert (value, gradient[0]) == (pytest.approx(3.0), 0.0)


def test_clip_higher_lets_a_good_token_rise_further() -> None:
    dapo = PolicyLossConfig("dapo", clip_low=0.2, clip_high=0.28, dual_clip=None)
    assert loss_of([1.25], [1.0], dapo)[1][0] == pytest.approx(-1.25)
    assert loss_of([1.25], [1.0])[1][0] == 0.0


def test_gspo_uses_one_ratio_for_the_sequence() -> None:
    # Sequence 0 has ratios 4 and 1, whose geometric mean is 2; sequence 1 has ratio 1.
    gspo = PolicyLossConfig("gspo", clip_low=0.9, clip_high=9.0, dual_clip=None)
    value, gradient, _ = loss_of([4.0, 1.0, 1.0], [1.0, 1.0, 5.0], gspo, sequence_ids=[0, 0, 1])
    assert value == pytest.approx(-2 - 2 - 5)
    assert gradient == pytest.approx([-2.0, -2.0, -5.0])


def test_gspo_clips_whole_sequences() -> None:
    # Sequence 0, A = 1: ratios 4 and 1, mean 2 > 1.5: clipped, no gradient although its second token never moved.
    # Sequence 1, A = -1: ratio 0.5 < 0.6 is clipped, too.
    gspo = PolicyLossConfig("gspo", clip_low=0.4, clip_high=0.5, dual_clip=None)
    value, gradient, clipped = loss_of([4.0, 1.0, 0.5], [1.0, 1.0, -1.0], gspo, sequence_ids=[0, 0, 1])
    assert value == pytest.approx(-1.5 - 1.5 + 0.6)
    assert gradient == [0, 0, 0]
    assert clipped == 3


def test_gspo_averages_over_trained_tokens_only() -> None:
    # The prompt's token is not part of the sequence's mean: the trained ones have ratios 2 and 8, mean 4.
    gspo = PolicyLossConfig("gspo", clip_low=0.9, clip_high=9.0, dual_clip=None)
    value, gradient, _ = loss_of([1e9, 2.0, 8.0], [1.0, 1.0, 1.0], gspo, mask=[0.0, 1.0, 1.0], sequence_ids=[0, 0, 0])
    assert value == pytest.approx(-8)
    assert gradient == pytest.approx([0, -4, -4])


def test_kl_estimators_by_hand() -> None:
    # p / p_ref = 1, 2 and 1/2, so d = 0, ln 2, -ln 2.
    ln2 = math.log(2)
    logprobs, reference = torch.tensor([0.0, ln2, -ln2]), torch.zeros(3)
    assert kl_estimate(logprobs, reference, "k1").tolist() == pytest.approx([0, ln2, -ln2])
    assert kl_estimate(logprobs, reference, "k2").tolist() == pytest.approx([0, ln2**2 / 2, ln2**2 / 2])
    assert kl_estimate(logprobs, reference, "k3").tolist() == pytest.approx([0, 0.5 - 1 + ln2, 2 - 1 - ln2])


@pytest.mark.parametrize(("estimator", "slope"), [("k1", math.log(2)), ("k2", math.log(2)), ("k3", 0.5)])
def test_gradients_of_the_kl_estimators(estimator: str, slope: float) -> None:
    # d for k1 and k2; 1 - exp(-d) for k3.
    logprobs = torch.tensor([math.log(2)], requires_grad=True)
    kl_estimate(logprobs, torch.zeros(1), estimator).sum().backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad) == pytest.approx(slope)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_agree_in_expectation(estimator: str) -> None:
    # Over the whole vocabulary of three tokens: KL((.5, .3, .2) || (.4, .4, .2)) for k1 and k3, and the gradients of
    # k1 and k2 are its gradient with respect to the logits, p (log(p / q) - KL).
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    q = torch.tensor([0.4, 0.4, 0.2])
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    divergence = float((p * (p / q).log()).sum())
    estimates = kl_estimate(logp, q.log(), estimator)
    if estimator != "k2":
        assert float((p * estimates).sum()) == pytest.approx(divergence, abs=1e-6)
    if estimator != "k3":
        (p * estimates).sum().backward()
        assert logits.grad is not None
        assert logits.grad.tolist() == pytest.approx((p * ((p / q).log() - divergence)).tolist(), abs=1e-6)


def test_kl_to_the_reference_is_added() -> None:
    # On-policy, A = 1 on one token: loss -1 + 0.1 (ln 2)^2 / 2, slope -1 + 0.1 ln 2.
    config = PolicyLossConfig("grpo", 0.2, 0.2, kl_coeff=0.1, kl_estimator="k2")
    logprobs = torch.tensor([0.0], requires_grad=True)
    one, ids = torch.ones(1), torch.zeros(1, dtype=torch.long)
    tokens = TokenLogprobs(logprobs, torch.zeros(1), reference=torch.tensor([-math.log(2)]))
    losses, stats = policy_loss(tokens, one, one, one, ids, config)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert losses.tolist() == pytest.approx([-1 + 0.05 * math.log(2) ** 2])
    assert float(logprobs.grad) == pytest.approx(-1 + 0.1 * math.log(2))
    assert float(stats.reference_kl_sum) == pytest.approx(math.log(2) ** 2 / 2)


def test_importance_weights_are_truncated() -> None:
    # Trainer over engine: 0.5, 1.5 and 8, truncated at 2. A = 1, on-policy: each token's loss is minus its weight.
    config = PolicyLossConfig("grpo", 0.2, 0.2, importance_cap=2.0)
    old = torch.tensor([0.5, 1.5, 8.0]).log()
    logprobs = old.clone().requires_grad_()
    ones = torch.ones(3)
    tokens = TokenLogprobs(logprobs, old, engine=torch.zeros(3))
    losses, stats = policy_loss(tokens, ones, ones, ones, torch.zeros(3, dtype=torch.long), config)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -1.5, -2.0])
    assert losses.tolist() == pytest.approx([-0.5, -1.5, -2.0])
    assert float(stats.truncated_sum) == 1


def test_gspo_truncates_one_importance_weight_for_the_sequence() -> None:
    # Trainer over engine: 2 and 8 in sequence 0, whose geometric mean is 4, truncated at 3; 1/2 in sequence 1. The
    # prompt's token, 1e9, is not part of the mean. A = 1, on-policy: each token's loss is minus its sequence's weight.
    config = PolicyLossConfig("gspo", 0.2, 0.2, importance_cap=3.0)
    old, ids = torch.tensor([1e9, 2.0, 8.0, 0.5]).log(), torch.tensor([0, 0, 0, 1])
    mask = torch.tensor([0.0, 1.0, 1.0, 1.0])
    tokens = TokenLogprobs(old.clone().requires_grad_(), old, engine=torch.zeros(4))
    losses, stats = policy_loss(tokens, torch.ones(4), mask, mask, ids, config)
    losses.sum().backward()
    assert tokens.current.grad is not None
    assert tokens.current.grad.tolist() == pytest.approx([0, -3, -3, -0.5])
    assert losses.tolist() == pytest.approx([0, -3, -3, -0.5])
    assert float(stats.truncated_sum) == 2


@pytest.mark.parametrize("estimator", ["k1", "k2"])
@pytest.mark.parametrize("cap", [None, 100.0])
def test_the_kl_gradient_is_that_of_the_policy_as_it_is_now(estimator: str, cap: float | None) -> None:
    # Three tokens, sampled from the engine's policy, which is the old one or (with a cap) a third: in expectation the
    # gradient is that of KL(p || ref) with respect to the logits, p (log(p / ref) - KL), though p has moved away.
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    old, reference = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    sampled = old if cap is None else torch.tensor([0.3, 0.3, 0.4])
    logp, ids = logits.log_softmax(0), torch.arange(3)
    config = PolicyLossConfig("grpo", 0.2, 0.2, None, 1.0, estimator, cap)  # type: ignore[arg-type]
    tokens = TokenLogprobs(logp, old.log(), sampled.log(), reference.log())
    losses, _ = policy_loss(tokens, torch.zeros(3), sampled, torch.ones(3), ids, config)
    losses.sum().backward()
    p = logp.exp().detach()
    divergence = (p * (p / reference).log()).sum()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx((p * ((p / reference).log() - divergence)).tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
def test_cutting_the_batch_changes_nothing(kind: str) -> None:
    """Sum over micro-batches and ranks = the whole: weights divide by global totals, and ratios need one sequence only.

    loss = sum_t w_t l_t with w_t = 1 / T (token mean) or 1 / (N T_n) (sequence mean), T, N and T_n independent of the
    cut; l_t depends on token t (grpo, dapo) or on the tokens of t's own sequence (gspo), which no cut divides.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 5, 2, 4]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    current, old = (torch.randn(14, generator=generator) * 0.3 for _ in range(2))
    mask = (torch.rand(14, generator=generator) > 0.3).float()
    mask[[0, 3, 8, 10]] = 1.0
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.1])[ids]
    token_weights = sequence_mean if kind == "gspo" else token_mean
    totals = BatchTotals(tokens=float(mask.sum()), sequences=4.0)
    config = PolicyLossConfig(kind, 0.1, 0.2, dual_clip=3.0)  # type: ignore[arg-type]

    def gradient_of(parts: list[list[int]]) -> tuple[float, list[float]]:
        logprobs, total = current.clone().requires_grad_(), 0.0
        for part in parts:
            chosen = torch.cat([(ids == n).nonzero()[:, 0] for n in part])
            local = torch.repeat_interleave(torch.arange(len(part)), torch.tensor([lengths[n] for n in part]))
            weights = token_weights(mask[chosen], local, totals)
            tokens = TokenLogprobs(logprobs[chosen], old[chosen])
            losses, _ = policy_loss(tokens, advantages[chosen], weights, mask[chosen], local, config)
            losses.sum().backward()
            total += float(losses.sum())
        assert logprobs.grad is not None
        return total, logprobs.grad.tolist()

    whole_loss, whole_gradient = gradient_of([[0, 1, 2, 3]])
    for cut in ([[0], [1], [2], [3]], [[3, 1], [2, 0]], [[2], [0, 3, 1]]):
        cut_loss, cut_gradient = gradient_of(cut)
        assert cut_loss == pytest.approx(whole_loss, abs=1e-6)
        assert cut_gradient == pytest.approx(whole_gradient, abs=1e-6)


def test_what_the_mask_hides_cannot_reach_the_loss() -> None:
    value, gradient, clipped = loss_of([1.0, 1e30], [2.0, -1.0], mask=[1.0, 0.0])
    assert value == pytest.approx(-2.0)
    assert gradient == [-2.0, 0.0]
    assert clipped == 0
