"""Token weights, by hand, and that cutting a batch differently changes nothing (D9)."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.loss.reduce import Aggregation, require_finite, token_weights
from prism_megatron.loss.sft import sft_loss

# Two sequences: 1 trained token of 2, and 3 of 3.
MASK, IDS = torch.tensor([0.0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1])


def test_token_mean_counts_every_token_alike() -> None:
    weights = token_weights(MASK, IDS, aggregation="token_mean", total_tokens=4, total_sequences=2)
    assert weights.tolist() == [0, 0.25, 0.25, 0.25, 0.25]


def test_sequence_mean_counts_every_sequence_alike() -> None:
    weights = token_weights(MASK, IDS, aggregation="sequence_mean", total_tokens=4, total_sequences=2)
    assert weights.tolist() == pytest.approx([0, 1 / 2, 1 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_sum_over_micro_batches_is_the_mean_over_the_batch(aggregation: Aggregation) -> None:
    logprobs = torch.tensor([-9.0, -1, -2, -3, -4])
    totals = {"total_tokens": 4.0, "total_sequences": 2.0}
    whole = sft_loss(logprobs, token_weights(MASK, IDS, aggregation=aggregation, **totals))
    cut = sum(
        sft_loss(logprobs[part], token_weights(MASK[part], IDS[part] - IDS[part][0], aggregation=aggregation, **totals))
        for part in (slice(0, 2), slice(2, 5))
    )
    # token mean: (1 + 2 + 3 + 4) / 4; sequence mean: (1 + (2 + 3 + 4) / 3) / 2
    assert float(whole) == pytest.approx(2.5 if aggregation == "token_mean" else 2.0)
    assert float(cut) == pytest.approx(float(whole))


def test_unknown_aggregation() -> None:
    with pytest.raises(ValueError, match="aggregation must be token_mean, sequence_mean or reference, got 'sum'"):
        token_weights(MASK, IDS, aggregation="sum", total_tokens=4, total_sequences=2)  # type: ignore[arg-type]


def test_what_is_not_finite_is_named() -> None:
    require_finite("score", torch.tensor([1.0, -2.0]), ["a", "b"])
    with pytest.raises(FloatingPointError, match="score of sample b is inf; the step is refused"):
        require_finite("score", torch.tensor([1.0, float("inf")]), ["a", "b"])


def test_sft_by_hand() -> None:
    # Three tokens, the first belongs to the prompt: (0.5 + 1.5) / 2.
    weights = token_weights(
        torch.tensor([0.0, 1, 1]), torch.zeros(3).long(), aggregation="token_mean", total_tokens=2, total_sequences=1
    )
    logprobs = torch.tensor([-7.0, -0.5, -1.5], requires_grad=True)
    loss = sft_loss(logprobs, weights)
    loss.backward()
    assert float(loss) == pytest.approx(1.0)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, -0.5, -0.5]
