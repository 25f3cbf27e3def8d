"""The order of rows."""

from __future__ import annotations

import pytest

from prism_megatron.config import apply_overrides, to_yaml
from prism_megatron.data.loader import batch_indices, count_passes, shard_for_rank
from prism_megatron.observe.metrics import EPOCHS, ROWS
from recipes import tiny


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


@pytest.mark.parametrize(("num_rows", "epochs", "iterations"), [(640, 1, 40), (641, 1, 41), (640, 3, 120), (3, 2, 1)])
def test_epochs_are_as_many_iterations_as_show_every_row(num_rows: int, epochs: int, iterations: int) -> None:
    configured = apply_overrides(tiny.tiny_warmup(), [f"run.num_epochs={epochs}"])
    counted, passes = count_passes(configured, num_rows)
    assert (counted.run.train_iters, passes.train_iters) == (iterations, iterations)
    assert to_yaml(counted) == to_yaml(configured), "a run is known by what was asked for"
    assert passes.metrics(0) == {ROWS: 0, EPOCHS: 0}
    assert passes.metrics(iterations)[EPOCHS] == 16 * iterations / num_rows >= epochs
    seen = [row for i in range(iterations) for row in batch_indices(num_rows, 16, i, seed=1)]
    assert all(seen.count(row) >= epochs for row in range(num_rows))


def test_iterations_given_are_those_run() -> None:
    counted, passes = count_passes(tiny.tiny_rlvr(), 100)
    assert counted == tiny.tiny_rlvr()
    assert str(passes) == "rlvr: 100 rows, 16 in an iteration; 30 iterations are 4.8 epochs"


def test_ranks_share_a_batch() -> None:
    assert [shard_for_rank(list(range(10)), rank, 3) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
