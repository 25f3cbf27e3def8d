"""Reads and encodes the rows of the next iterations in worker processes, while the current one trains."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.data.lazy import Rows
from prism_megatron.data.rows import Trace, no_trace
from prism_megatron.errors import UserError

_AHEAD = 2  # iterations that each worker prepares
_SOURCE_BYTES = 512


def prefetch[Item](
    make: Callable[[int, Trace], Item], rows: Rows[Any], iterations: range, workers: int
) -> Iterator[Item]:
    """``make(iteration, trace)`` for each iteration, made ahead by ``workers`` processes, or, with 0, when it is due.

    ``make`` depends on the iteration and the data only, so that the number of workers changes no number. (torch's
    DataLoader would do, but for a worker that dies: its signal handler raises wherever the trainer happens to be.)

    Args:
        make: Reads and encodes the rows of an iteration. Runs in another process: its tensors are copied, on the CPU.
        rows: What it reads; rows that are skipped in a worker are skipped, and reported, by these.
        iterations: In this order.
        workers: How many processes.

    Raises:
        UserError: as ``make`` did.
        BrokenProcessPool: a worker died. A line on stderr names the rows that were worked on.
    """
    if not workers:
        for iteration in iterations:
            yield make(iteration, no_trace)
        return
    context = multiprocessing.get_context("fork")  # nothing is copied or imported again
    sources = [multiprocessing.RawArray("c", _SOURCE_BYTES) for _ in range(workers)]
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, _start, (make, rows, sources, numbers, os.getpid()))
    upcoming = iter(iterations)
    pending: deque[Future[_Prepared]] = deque(
        pool.submit(_prepare, iteration) for iteration in itertools.islice(upcoming, workers * _AHEAD)
    )
    try:
        while pending:
            prepared = pending.popleft().result()
            pending.extend(pool.submit(_prepare, iteration) for iteration in itertools.islice(upcoming, 1))
            rows.skip_all(prepared.skipped)
            if prepared.fault is not None:
                raise UserError(prepared.fault)
            yield prepared.item()
    except BrokenProcessPool:
        named = "; ".join(filter(None, (source.value.decode(errors="replace") for source in sources)))
        print(f"a data worker died; the workers' rows were: {named}", file=sys.stderr)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# In a worker ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """The objects that a worker process works with: its part of a fork's memory."""

    make: Callable[[int, Trace], Any]
    rows: Rows[Any]
    source: Any

    def trace(self, source: str) -> None:
        self.source.value = source.encode()[: _SOURCE_BYTES - 1]


_worker: _Worker | None = None


def _start(make: Callable[[int, Trace], Any], rows: Rows[Any], sources: list[Any], numbers: Any, parent: int) -> None:
    """Prepare a worker for its first job. The trainer alone listens to Ctrl-C and reports rows."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker = _Worker(make, rows, sources[numbers.get()])
    rows.collect_skipped()


def _end_with(parent: int) -> None:
    """End this process when its parent, however that ended, is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _prepare(iteration: int) -> _Prepared:
    worker = _worker
    assert worker is not None
    content, pickler, fault = io.BytesIO(), None, None
    try:
        item = worker.make(iteration, worker.trace)
        pickler = _Pickler(content)
        pickler.dump(item)
    except UserError as mistake:
        fault = str(mistake)
    tensors = pickler.tensors if pickler else []
    joined = torch.cat(tensors) if tensors else torch.empty(0)
    lengths = [len(tensor) for tensor in tensors]
    return _Prepared(content.getvalue(), joined, lengths, fault, worker.rows.collect_skipped())


# Between processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """The result that a worker sends: an object, its tensors apart in one, or the user's mistake; and skipped rows."""

    content: bytes
    tensors: Tensor
    lengths: list[int]
    fault: str | None
    skipped: dict[int, tuple[str, bool]]

    def item(self) -> Any:
        return _Unpickler(self.content, torch.split(self.tensors, self.lengths)).load()


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
