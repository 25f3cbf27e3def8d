"""Program of a subprocess of :class:`SubprocessEngine`: executes the commands that arrive through a pipe.

The command-line argument is the file descriptor of the pipe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.rollout.interface import NoWeights
from prism_megatron.rollout.transport import Piece, Transport
from prism_megatron.rollout.weight_sync import WeightSync

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def _serve(connection: Connection) -> None:
    """Start one rank of the engine, then execute commands until the pipe is closed."""
    checkpoint, config, invitations = connection.recv()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    engine = RolloutEngine(checkpoint, config)
    connection.send(("done", (engine.banned_token_ids, engine.cache_block_tokens)))
    transport: Transport = invitations[dist.get_rank()]()
    is_first = dist.get_rank() == 0
    commands: dict[str, Callable[..., Any]] = {
        "generate": lambda requests, sampling: engine.generate(
            requests, sampling, lambda count: connection.send(("answered", count)) if is_first else None
        ),
        "update": lambda sync: _received(connection, transport, lambda tensors: _update(engine, tensors, sync)),
        "differing_parameters": lambda: _received(connection, transport, engine.differing_parameters),
        "reset_caches": engine.reset_caches,
        "sleep": engine.sleep,
        "wake": engine.wake,
    }
    while True:
        command, arguments = connection.recv()
        try:
            answer = commands[command](*arguments)
        except (UserError, NoWeights) as refusal:
            connection.send(("refused", refusal))
        else:
            connection.send(("done", answer))


def _update(engine: RolloutEngine, tensors: Iterable[tuple[str, Tensor]], sync: WeightSync) -> Mapping[str, int]:
    engine.update_weights(tensors, sync)
    return sync.checksums


def _received[Answer](
    connection: Connection, transport: Transport, use: Callable[[Iterable[tuple[str, Tensor]]], Answer]
) -> Answer:
    tensors = transport.receive(_announced(connection))
    try:
        return use(tensors)
    finally:
        for _ in tensors:  # the rest of a refused update is sent as well
            pass


def _announced(connection: Connection) -> Iterator[list[Piece]]:
    while True:
        connection.send(("waits", None))
        kind, value = connection.recv()
        if kind == "end":
            if value is not None:
                raise value
            return
        yield value


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to this process, too; the rank decides
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    try:
        _serve(Connection(int(sys.argv[1])))
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    _main()
