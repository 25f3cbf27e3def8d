"""Weights that turn per-token losses into one number, independent of how the batch is split.

Every token's weight already divides by the global count, over all micro-batches and data-parallel ranks. A loss is the
weighted sum, so summing losses and gradients over micro-batches and ranks gives exactly the mean over the global batch
(spec 9.1, D9: local means over-weight sparse shards).

Why the split does not matter. Deal the global batch's tokens t out to micro-batches B of ranks r in any way. Let
w_t = 1 / N with N the number of trained tokens, or w_t = 1 / (S L_s) for a mean over S sequences, L_s being the number
of trained tokens of the sequence of t. N, S and L_s belong to the global batch, and a token's loss l_t depends on its
own sequence only, since attention does not cross sequences. Neither w_t nor l_t changes with the split, and

    sum_r sum_B sum_(t in B) w_t l_t = sum_t w_t l_t

is one sum in another order, equal up to rounding. The same holds for its gradients, which Megatron sums over ranks
(``calculate_per_token_loss``). Packing, micro-batches and data parallelism choose B and r; context parallelism splits a
sequence, whose l_t are gathered before the loss; tensor, pipeline and expert parallelism split the network that
computes l_t. Local means over R micro-batches would give w_t = 1 / (R |B|), which is 1 / N only if all have one size.
Pairs of scores are weighted in the same way, N being the number of pairs of their branch. Only the load-balancing loss
is defined per micro-batch: it depends on the micro-batch's tokens, but not on their distribution over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchTotals:
    """Numbers of trained tokens and of sequences in the global batch, over all micro-batches and ranks."""

    tokens: float
    sequences: float


# (mask [T], sequence_ids [T], totals of the global batch) -> weight of each token, [T] float32
TokenWeights = Callable[[Tensor, Tensor, BatchTotals], Tensor]


def token_mean(mask: Tensor, sequence_ids: Tensor, totals: BatchTotals) -> Tensor:
    """Weigh every trained token alike: w_t = mask_t / N."""
    return mask / max(totals.tokens, 1.0)


def sequence_mean(mask: Tensor, sequence_ids: Tensor, totals: BatchTotals) -> Tensor:
    """Weigh every sequence alike, and the trained tokens within it: w_t = mask_t / (S L_s)."""
    lengths = sequence_sums(mask, sequence_ids)
    return mask / lengths[sequence_ids].clamp(min=1.0) / max(totals.sequences, 1.0)


def require_finite(what: str, values: Tensor, sample_ids: Sequence[str]) -> None:
    """Raise FloatingPointError, naming the sample, if one of ``values`` [N] is not finite."""
    if bool(torch.isfinite(values).all()):
        return
    index = int((~torch.isfinite(values)).nonzero()[0])
    raise FloatingPointError(
        f"{what} of sample {sample_ids[index]} is {float(values[index])}; the step is refused. "
        "Lower the learning rate, or look at this sample"
    )


def sequence_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum ``values`` [T] over each sequence, [max id + 1]."""
    sums = torch.zeros(int(sequence_ids.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, sequence_ids, values)
