"""Log-probabilities, entropy and gradients computed for a few tokens at a time equal those of all logits at once."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.model import logprobs


def test_three_tokens_by_hand() -> None:
    # logits (0, log 2, log 5), so probabilities 1/8, 2/8, 5/8
    hidden = torch.eye(3)[:1].repeat(3, 1)
    weight = torch.tensor([[0.0, 0, 0], [math.log(2), 0, 0], [math.log(5), 0, 0]])
    scores = logprobs.token_scores(hidden, weight, torch.tensor([0, 1, 2]))
    assert scores.logprobs.tolist() == pytest.approx([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert scores.entropy.tolist() == pytest.approx([entropy] * 3)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, slopes = torch.randint(0, 11, (9,)), torch.randn(9)
    plain = (hidden @ weight.T).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * slopes).sum(), (hidden, weight))

    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk * 11)
    scores = logprobs.token_scores(hidden, weight, targets)
    torch.testing.assert_close(scores.logprobs, expected)
    torch.testing.assert_close(scores.entropy, -(plain.exp() * plain).sum(-1))
    ours = torch.autograd.grad((scores.logprobs * slopes).sum(), (hidden, weight))
    for ours_of, expected_of in zip(ours, gradients, strict=True):
        torch.testing.assert_close(ours_of, expected_of)


def test_padding_rows_are_in_no_sum() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6)
    padded = torch.cat((weight, torch.full((2, 6), float("nan")))).requires_grad_()
    targets = torch.tensor([0, 10, 3, 4, 10])
    plain = logprobs.token_scores(hidden, weight, targets)
    scores = logprobs.token_scores(hidden, padded, targets, padding=2)
    assert torch.equal(scores.logprobs, plain.logprobs)
    assert torch.equal(scores.entropy, plain.entropy)
    scores.logprobs.sum().backward()
    assert padded.grad is not None
    assert padded.grad[:11].any(1).all()
    assert not padded.grad[11:].any()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_no_trained_token_gives_no_gradient() -> None:
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    scores = logprobs.token_scores(hidden, weight, torch.zeros(0, dtype=torch.long))
    scores.logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
