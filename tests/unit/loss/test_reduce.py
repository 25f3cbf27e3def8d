"""Token weights, by hand, and their independence of how the batch is split (D9)."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.loss.reduce import BatchTotals, TokenWeights, require_finite, sequence_mean, token_mean
from prism_megatron.loss.sft import sft_loss

# Two sequences: 1 trained token of 2, and 3 of 3.
MASK, IDS = torch.tensor([0.0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
TOTALS = BatchTotals(tokens=4, sequences=2)


def test_token_mean_counts_every_token_alike() -> None:
    weights = token_mean(MASK, IDS, TOTALS)
    assert weights.tolist() == [0, 0.25, 0.25, 0.25, 0.25]


def test_sequence_mean_counts_every_sequence_alike() -> None:
    weights = sequence_mean(MASK, IDS, TOTALS)
    assert weights.tolist() == pytest.approx([0, 1 / 2, 1 / 6, 1 / 6, 1 / 6])


# token mean: (1 + 2 + 3 + 4) / 4; sequence mean: (1 + (2 + 3 + 4) / 3) / 2
@pytest.mark.parametrize(("mean", "expected"), [(token_mean, 2.5), (sequence_mean, 2.0)])
def test_the_sum_over_micro_batches_is_the_mean_over_the_batch(mean: TokenWeights, expected: float) -> None:
    logprobs = torch.tensor([-9.0, -1, -2, -3, -4])
    total = sft_loss(logprobs, mean(MASK, IDS, TOTALS))
    split = sum(
        sft_loss(logprobs[part], mean(MASK[part], IDS[part] - IDS[part][0], TOTALS))
        for part in (slice(0, 2), slice(2, 5))
    )
    assert float(total) == pytest.approx(expected)
    assert float(split) == pytest.approx(float(total))


def test_what_is_not_finite_is_named() -> None:
    require_finite("score", torch.tensor([1.0, -2.0]), ["a", "b"])
    with pytest.raises(FloatingPointError, match="score of sample b is inf; the step is refused"):
        require_finite("score", torch.tensor([1.0, float("inf")]), ["a", "b"])


def test_sft_by_hand() -> None:
    # Three tokens, the first belongs to the prompt: (0.5 + 1.5) / 2.
    weights = token_mean(torch.tensor([0.0, 1, 1]), torch.zeros(3).long(), BatchTotals(tokens=2, sequences=1))
    logprobs = torch.tensor([-7.0, -0.5, -1.5], requires_grad=True)
    loss = sft_loss(logprobs, weights)
    loss.backward()
    assert float(loss) == pytest.approx(1.0)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, -0.5, -0.5]
