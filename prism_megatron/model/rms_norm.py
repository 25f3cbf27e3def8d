"""RMS normalisation for machines without Transformer Engine.

torch puts it together from elementwise operators on a CPU, and keeps what each of them made: here the input is all that
is kept, and half as many passes are made over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``hidden`` [..., H] over its root mean square, times ``weight`` [H]; in float32, back in ``hidden``'s dtype."""
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = hidden.float()
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (x * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden, weight, scale = ctx.saved_tensors
        upstream, normed = gradient.float(), hidden.float() * scale
        product = upstream * normed
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = (product @ weight.float())[..., None].div_(hidden.shape[-1])
        of_hidden = (upstream * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return of_hidden.to(hidden.dtype), of_weight, None
