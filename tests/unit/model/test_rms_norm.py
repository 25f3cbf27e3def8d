"""Our RMS normalisation against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prism_megatron.model.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(37, 1, 64), (37, 1, 4, 32)])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    hidden, weight, upstream = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    found = []
    for norm in (rms_norm, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = norm(*leaves, 1e-6)
        found.append((output, *torch.autograd.grad(output, leaves, upstream)))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_rounded_once() -> None:
    hidden = torch.randn(8, 16).bfloat16()
    weight = torch.randn(16).bfloat16()
    whole = rms_norm(hidden.float(), weight.float(), 1e-6)
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-6), whole.bfloat16(), rtol=0, atol=0)
