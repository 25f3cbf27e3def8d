"""The rows of an iteration: a pure function of the iteration, so there is no loader state to save or lose."""

from __future__ import annotations

import dataclasses
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.config import PolicyGradientConfig, SFTConfig, WarmupConfig
from prism_megatron.observe import metrics as names


@dataclass(frozen=True)
class Passes:
    """The number of times a stage goes through its rows. ``str`` of it is what the stage prints when it starts."""

    stage: str
    num_rows: int
    rows_per_iteration: int
    train_iters: int

    def metrics(self, iteration: int) -> dict[str, float | None]:
        """Rows and epochs seen after ``iteration`` iterations."""
        rows = iteration * self.rows_per_iteration
        return {names.ROWS: rows, names.EPOCHS: rows / self.num_rows}

    def __str__(self) -> str:
        epochs = self.train_iters * self.rows_per_iteration / self.num_rows
        return (
            f"{self.stage}: {self.num_rows} rows, {self.rows_per_iteration} in an iteration; "
            f"{self.train_iters} iterations are {epochs:.4g} epochs"
        )


def count_passes[ConfigT: SFTConfig | WarmupConfig | PolicyGradientConfig](
    config: ConfigT, num_rows: int
) -> tuple[ConfigT, Passes]:
    """``config`` with ``run.train_iters`` set, from ``run.num_epochs`` where that is, and what it comes to.

    Every row is seen at least ``num_epochs`` times: the last iteration goes on into the next epoch.
    """
    rows = config.prompts_per_iteration if isinstance(config, PolicyGradientConfig) else config.global_batch_size
    run = config.run
    if run.num_epochs:
        run = dataclasses.replace(run, train_iters=math.ceil(run.num_epochs * num_rows / rows))
    return dataclasses.replace(config, run=run), Passes(config.stage, num_rows, rows, run.train_iters)


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


_orders: dict[tuple[int, int, int], array[int]] = {}


def _epoch_order(num_rows: int, epoch: int, seed: int) -> array[int]:
    key = (num_rows, epoch, seed)
    if key not in _orders:
        if len(_orders) > 4:  # a run needs this epoch and the next
            _orders.clear()
        order = array("l", range(num_rows))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _orders[key] = order
    return _orders[key]


def shard_for_rank[Indices: (list[int], range)](indices: Indices, rank: int, size: int) -> Indices:
    """This data-parallel rank's part, contiguous so that it does not depend on how the others are cut."""
    low, high = len(indices) * rank // size, len(indices) * (rank + 1) // size
    return indices[low:high]
