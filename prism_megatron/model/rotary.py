"""Rotary angles: interleaved M-RoPE for the language model, axial 2-D for the vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mrope_cos_sin(position_ids: Tensor, head_dim: int, theta: float, mrope_section: list[int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each [T, 1, head_dim] float32.

    ``position_ids`` is [3, T] (time, height, width). Qwen3-VL interleaves the three axes over the frequencies
    (T H W T H W ... T T): frequency ``i`` turns with height when ``i % 3 == 1`` and with width when ``i % 3 == 2``,
    up to three times the axis's section, and with time elsewhere.
    """
    half = head_dim // 2
    inv_freq = theta ** (-torch.arange(half, device=position_ids.device, dtype=torch.float32) / half)
    axis = torch.zeros(half, dtype=torch.long, device=position_ids.device)
    for which in (1, 2):
        axis[which : 3 * mrope_section[which] : 3] = which
    angles = position_ids.float()[axis].T * inv_freq  # [T, half]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def vision_cos_sin(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Axial rotary of the vision tower, each [P, 1, head_dim] float32, from patch ``rows`` and ``columns`` [P]."""
    quarter = head_dim // 4
    inv_freq = theta ** (-torch.arange(quarter, device=rows.device, dtype=torch.float32) / quarter)
    angles = torch.cat((rows.float()[:, None] * inv_freq, columns.float()[:, None] * inv_freq), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [T, heads, head_dim] by the given angles, in float32, back in ``x``'s dtype."""
    turned: Tensor = _Rotation.apply(x, cos, sin)
    return turned


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles; put together from operators, both take twice as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    values = x.float()
    first, second = values.split(half, dim=-1)
    out = values * cos
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])
    return out.to(x.dtype)
