"""Which rows an iteration sees: a pure function of the iteration, so there is no loader state to save or lose."""

from __future__ import annotations

import random
from collections.abc import Sequence


def batch_indices(num_rows: int, batch_size: int, iteration: int, seed: int) -> list[int]:
    """Rows of iteration ``iteration`` (from 0): epochs follow each other, each a new shuffle, none shortened."""
    assert num_rows > 0, "readers refuse an empty data set"
    start = iteration * batch_size
    indices: list[int] = []
    for position in range(start, start + batch_size):
        epoch, offset = divmod(position, num_rows)
        indices.append(_epoch_order(num_rows, epoch, seed)[offset])
    return indices


def further_indices(num_rows: int, taken: Sequence[int], iteration: int, seed: int) -> list[int]:
    """The rows not among ``taken``, in an order of this iteration's own: what it samples if those are useless."""
    rest = sorted(set(range(num_rows)).difference(taken))
    random.Random(f"{seed}/{iteration}/further").shuffle(rest)
    return rest


_orders: dict[tuple[int, int, int], list[int]] = {}


def _epoch_order(num_rows: int, epoch: int, seed: int) -> list[int]:
    key = (num_rows, epoch, seed)
    if key not in _orders:
        if len(_orders) > 4:  # a run needs this epoch and the next
            _orders.clear()
        order = list(range(num_rows))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _orders[key] = order
    return _orders[key]


def rank_share[Indices: (list[int], range)](indices: Indices, rank: int, size: int) -> Indices:
    """This data-parallel rank's part, contiguous so that it does not depend on how the others are cut."""
    low, high = len(indices) * rank // size, len(indices) * (rank + 1) // size
    return indices[low:high]
