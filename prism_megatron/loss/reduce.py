"""How per-token losses become one number, however the batch is cut.

Every token gets a weight that already divides by the global count, over all micro-batches and data-parallel ranks. A
loss is the weighted sum; summing losses and gradients over micro-batches and ranks is then exactly the mean over the
global batch (spec 9.1, D9: local means over-weight sparse shards).

Why the cut does not matter. Deal the global batch's tokens t out to micro-batches B of ranks r in any way. Let w_t =
1 / N, N the count of all trained tokens (or 1 / (S L_s) for a mean over S sequences, L_s tokens in the one that t is
in). N, S and L_s are the global batch's, and a token's own loss l_t depends on its sequence only, since attention
keeps sequences apart; so neither w_t nor l_t changes with the cut, and

    sum_r sum_B sum_(t in B) w_t l_t = sum_t w_t l_t

is one sum in another order, equal but for rounding. So are its gradients, of which Megatron takes the sum over ranks,
not the mean (``calculate_per_token_loss``). Packing, micro-batches and data parallelism choose B and r; context
parallelism cuts a sequence, whose l_t are put together again before the loss sees them; tensor, pipeline and expert
parallelism cut the network that gives l_t. Local means over R micro-batches would make it w_t = 1 / (R |B|), which is
1 / N only where all are of one size. Pairs of scores are weighed likewise, N being the count of their branch's pairs.
Load balancing alone is by nature over a micro-batch: it changes with what is in one, and not with how that lies over
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prism_megatron.errors import UserError

Aggregation = Literal["token_mean", "sequence_mean", "reference"]


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
    same, 1 / ``total_sequences``, shared by its trained tokens. Totals are global. reference is what the paper's code
    does (spec 4.6): a mean over this micro-batch's tokens, weighted by its part of the sequences.
    """
    if aggregation == "token_mean":
        return mask / max(total_tokens, 1.0)
    lengths = sequence_sums(mask, sequence_ids)
    if aggregation == "sequence_mean":
        return mask / lengths[sequence_ids].clamp(min=1.0) / max(total_sequences, 1.0)
    if aggregation == "reference":
        return mask / mask.sum().clamp(min=1.0) * (lengths > 0).sum() / max(total_sequences, 1.0)
    raise UserError(f"aggregation must be token_mean, sequence_mean or reference, got {aggregation!r}")


def require_finite(what: str, values: Tensor, owners: Sequence[str]) -> None:
    """Refuse values [N] that are not finite. Raises FloatingPointError naming what they are and whose."""
    if bool(torch.isfinite(values).all()):
        return
    index = int((~torch.isfinite(values)).nonzero()[0])
    raise FloatingPointError(
        f"{what} of sample {owners[index]} is {float(values[index])}; the step is refused. "
        "Lower the learning rate, or look at this sample"
    )


def sequence_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum of ``values`` [T] over each sequence, [max id + 1]."""
    sums = torch.zeros(int(sequence_ids.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, sequence_ids, values)
