"""Benchmark collectives: latency and bandwidth between ranks, for ``tools/plan``.

    python -m tools.bench.collectives --ranks 2 [--out NEW.json]        # on a cluster, under torchrun or srun

Seconds are fitted as latency + bytes sent by a rank / bandwidth, by least squares of relative errors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.config import ParallelConfig
from tools.bench import harness

if TYPE_CHECKING:
    import torch

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes
Exchange = Callable[["torch.Tensor"], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start on this machine")
    parser.add_argument("--steps", type=int, default=20, help="measured exchanges per size, at least 2")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    if arguments.ranks < 2 or arguments.steps < 2:
        print("error: --ranks and --steps must be at least 2", file=sys.stderr)
        return 2
    if "RANK" not in os.environ:
        return harness.start_ranks(arguments.ranks, "tools.bench.collectives")
    result = measure(arguments.steps)
    if result:
        harness.write(result, arguments.out)
    return 0


def measure(steps: int) -> dict[str, Any] | None:
    """Return median seconds by collective and size, and the fit; None on all ranks but the first."""
    import torch
    import torch.distributed as dist

    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    ranks, is_main = dist.get_world_size(), groups.is_main_rank()
    found: dict[str, Any] = {}
    for name, (exchange, sent) in exchanges(ranks).items():
        points = []
        for size in SIZES:
            tensor = torch.ones(size // 4, device=groups.device())
            seconds = harness.interleaved({name: partial(_run, exchange, tensor)}, steps, warmup=3)[name]
            points.append((sent * size, statistics.median(seconds)))
        latency, bandwidth = fit(points)
        found[name] = {"latency_seconds": latency, "bytes_per_second": bandwidth, "points": points}
    groups.shutdown()
    facts = {"benchmark": "collectives", "config": {"steps": steps}, "ranks": ranks} | harness.provenance()
    return facts | found if is_main else None


def _run(exchange: Exchange, tensor: torch.Tensor, _: int) -> None:
    exchange(tensor)


def exchanges(ranks: int) -> dict[str, tuple[Exchange, float]]:
    """Return each collective with the bytes that a rank sends per byte of the tensor, in a ring."""
    import torch.distributed as dist

    def all_reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def all_gather(tensor: torch.Tensor) -> None:
        part = tensor.chunk(ranks)[dist.get_rank()].contiguous()
        dist.all_gather_into_tensor(tensor, part)

    def send(tensor: torch.Tensor) -> None:
        rank = dist.get_rank()
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif rank == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)

    ring = (ranks - 1) / ranks
    return {"all_reduce": (all_reduce, 2 * ring), "all_gather": (all_gather, ring), "there_and_back": (send, 2.0)}


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit latency in seconds and bandwidth in bytes per second to pairs of (bytes, seconds)."""
    import torch

    size, seconds = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    rows = torch.stack((torch.ones_like(size), size), 1) / seconds[:, None]
    latency, per_byte = torch.linalg.lstsq(rows, torch.ones(len(size), 1, dtype=torch.float64)).solution[:, 0]
    return max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15)


if __name__ == "__main__":
    sys.exit(main())
