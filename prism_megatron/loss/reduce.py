"""How per-token losses become one number, however the batch is cut.

Every token gets a weight that already divides by the global count, over all micro-batches and data-parallel ranks. A
loss is the weighted sum; summing losses and gradients over micro-batches and ranks is then exactly the mean over the
global batch (spec 9.1, D9: local means over-weight sparse shards).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(
    mask: Tensor,
    sequence_ids: Tensor,
    *,
    aggregation: Aggregation,
    total_tokens: float,
    total_sequences: float,
) -> Tensor:
    """Weight of each token, [T] float32, from its ``mask`` [T] and ``sequence_ids`` [T].

    token_mean: every trained token counts the same, 1 / ``total_tokens``. sequence_mean: every sequence counts the
    same, 1 / ``total_sequences``, shared by its trained tokens. Totals are global.
    """
    if aggregation == "token_mean":
        return mask / max(total_tokens, 1.0)
    if aggregation != "sequence_mean":
        raise ValueError(f"aggregation must be token_mean or sequence_mean, got {aggregation!r}")
    lengths = sequence_sums(mask, sequence_ids)
    return mask / lengths[sequence_ids].clamp(min=1.0) / max(total_sequences, 1.0)


def sequence_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum of ``values`` [T] over each sequence, [max id + 1]."""
    sums = torch.zeros(int(sequence_ids.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, sequence_ids, values)
