"""Statistics that routers record in a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.parallel.collectives import sum_over_data_parallel, sum_over_pipeline


class RouterStats:
    """Load-balancing losses and routing counts of this rank's layers and micro-batches.

    One object is passed to every forward call of a training step, and each router records into it once per micro-batch:
    in the forward pass or, with recomputation, when the layer is computed again in the backward pass.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._routing: list[Tensor] = []

    def record(self, loss: Tensor, routing: Tensor) -> None:
        """Add one layer's load-balancing loss (scalar) and routing counts (as :meth:`over_all_ranks` returns them)."""
        self._losses.append(loss)
        self._routing.append(routing)

    def over_all_ranks(self) -> tuple[float, Tensor]:
        """Sum over layers, micro-batches, pipeline stages and data-parallel ranks. Collective.

        Returns:
            The load-balancing loss, and for each branch [2, E + 2]: the tokens sent to each expert, the sum of the
            routing entropies (nats) and the number of tokens, both once per layer.
        """
        loss = sum(float(value) for value in self._losses)
        routing = torch.stack(self._routing).sum(0).double().cpu()
        total, *counts = sum_over_data_parallel(*sum_over_pipeline(loss, *routing.flatten().tolist()))
        return total, torch.tensor(counts).view(routing.shape)
