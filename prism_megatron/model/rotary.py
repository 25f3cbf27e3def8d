"""Rotary angles: interleaved M-RoPE for the language model, axial 2-D for the vision tower."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from prism_megatron.model.sizes import Rotary


def mrope_cos_sin(position_ids: Tensor, head_dim: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of every token's angles, each [T, 1, head_dim] float32.

    ``position_ids`` is [3, T] (time, height, width). Qwen3-VL interleaves the three axes over the frequencies
    (T H W T H W ... T T): frequency ``i`` belongs to height if ``i % 3 == 1`` and to width if ``i % 3 == 2``, for ``i``
    below three times the axis's section, otherwise to time.
    """
    axis = torch.zeros(head_dim // 2, dtype=torch.long, device=position_ids.device)
    for which in (1, 2):
        axis[which : 3 * rotary.mrope_section[which] : 3] = which
    angles = position_ids.float()[axis].T * _frequencies(rotary, head_dim).to(position_ids.device)  # [T, half]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = 1.0 if rotary.yarn is None else rotary.yarn.attention_factor
    return angles.cos() * scale, angles.sin() * scale


@functools.cache
def _frequencies(rotary: Rotary, head_dim: int) -> Tensor:
    """Compute the frequencies in radians per position, [head_dim / 2] float32 on the CPU."""
    half = head_dim // 2
    frequencies = rotary.theta ** (-torch.arange(half, dtype=torch.float32) / half)
    if (yarn := rotary.yarn) is None:
        return frequencies
    # Fractional index of the frequency with this many turns within the original length.
    first, last = (
        half * math.log(yarn.original_positions / (turns * 2 * math.pi)) / math.log(rotary.theta)
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    slowed = ((torch.arange(half) - first) / ((last - first) or 0.001)).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def vision_cos_sin(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine for patches at ``rows`` and ``columns`` [P], each [P, 1, head_dim] float32."""
    quarter = head_dim // 4
    inv_freq = theta ** (-torch.arange(quarter, device=rows.device, dtype=torch.float32) / quarter)
    angles = torch.cat((rows.float()[:, None] * inv_freq, columns.float()[:, None] * inv_freq), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [T, heads, head_dim] by the given angles, computed in float32, returned in ``x``'s dtype."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient is rotated back; autograd of the single operators would take twice as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    values = x.float()
    first, second = values.split(half, dim=-1)
    out = values * cos
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])
    return out.to(x.dtype)
