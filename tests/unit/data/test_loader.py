"""The order of rows."""

from __future__ import annotations

from prism_megatron.data.loader import batch_indices, rank_share


def test_every_row_once_per_epoch_across_batches() -> None:
    seen = [i for iteration in range(7) for i in batch_indices(7, 3, iteration, seed=5)]
    epochs = [sorted(seen[low : low + 7]) for low in (0, 7, 14)]
    assert epochs == [list(range(7))] * 3
    assert seen[:7] != seen[7:14], "each epoch has its own order"


def test_a_pure_function_of_the_iteration() -> None:
    later = batch_indices(100, 8, 40, seed=1)
    batch_indices(50, 8, 3, seed=2)
    assert batch_indices(100, 8, 40, seed=1) == later
    assert batch_indices(100, 8, 40, seed=3) != later


def test_ranks_share_a_batch() -> None:
    assert [rank_share(list(range(10)), rank, 3) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
