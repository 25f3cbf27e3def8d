"""Reads and encodes the rows of the next iterations in worker processes, while the current one trains."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from prism_megatron.data.lazy import Rows
from prism_megatron.data.rows import Trace, no_trace
from prism_megatron.errors import UserError

_AHEAD = 2  # iterations that each worker prepares
_SOURCE_BYTES = 512


def prefetch[Item](
    make: Callable[[int, Trace], Item], rows: Rows[Any], iterations: range, workers: int
) -> Iterator[Item]:
    """``make(iteration, trace)`` for each iteration, made ahead by ``workers`` processes, or, with 0, when it is due.

    ``make`` depends on the iteration and the data only, so that the number of workers changes no number.

    Args:
        make: Reads and encodes the rows of an iteration. Runs in another process: its tensors are copied, on the CPU.
        rows: What it reads; rows that are skipped in a worker are skipped, and reported, by these.
        iterations: In this order.
        workers: How many processes.

    Raises:
        UserError: as ``make`` did.
        RuntimeError: a worker died. A line on stderr names the row it worked on.
    """
    if not workers:
        for iteration in iterations:
            yield make(iteration, no_trace)
        return
    jobs = _Jobs(make, rows, [multiprocessing.RawArray("c", _SOURCE_BYTES) for _ in range(workers)])
    loader = DataLoader(
        jobs,
        batch_size=None,
        sampler=iterations,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=jobs.start,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # or the loader would draw from the trainer's
    )
    try:
        for prepared in loader:
            rows.skip_all(prepared.skipped)
            if prepared.fault is not None:
                raise UserError(prepared.fault)
            yield prepared.item()
    except RuntimeError:
        jobs.name_rows()
        raise


def _unchanged(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class _Prepared:
    """What a worker sends: an object without its tensors, these in one, or the user's mistake; and skipped rows."""

    content: bytes
    tensors: Tensor
    lengths: list[int]
    fault: str | None
    skipped: dict[int, str]

    def item(self) -> Any:
        return _Unpickler(self.content, torch.split(self.tensors, self.lengths)).load()


class _Jobs(Dataset[_Prepared]):
    """Iterations by number, as a torch data set. ``sources`` are in shared memory, one of each worker."""

    def __init__(self, make: Callable[[int, Trace], Any], rows: Rows[Any], sources: list[Any]) -> None:
        self._make, self._rows, self._sources = make, rows, sources

    def start(self, worker: int) -> None:
        """In a worker, before its first job: the trainer alone listens to signals and reports rows."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._rows.collect_skipped()

    def __getitem__(self, iteration: int) -> _Prepared:
        content, pickler, fault = io.BytesIO(), None, None
        try:
            item = self._make(iteration, self._trace)
            pickler = _Pickler(content)
            pickler.dump(item)
        except UserError as mistake:
            fault = str(mistake)
        tensors = pickler.tensors if pickler else []
        joined = torch.cat(tensors) if tensors else torch.empty(0)
        skipped = self._rows.collect_skipped()
        return _Prepared(content.getvalue(), joined, [len(tensor) for tensor in tensors], fault, skipped)

    def _trace(self, source: str) -> None:
        worker = get_worker_info()
        assert worker is not None
        self._sources[worker.id].value = source.encode()[: _SOURCE_BYTES - 1]

    def name_rows(self) -> None:
        """Print which row each worker last began to work on."""
        rows = [source.value.decode(errors="replace") for source in self._sources]
        print(f"a data worker ended; the workers' rows were: {'; '.join(filter(None, rows))}", file=sys.stderr)


class _Pickler(pickle.Pickler):
    """Pickles an object, its tensors left out: one for all is cheaper to send than one for each image."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(io.BytesIO(content))
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
