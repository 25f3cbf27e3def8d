"""Converts there and back, killed again and again on the way. Arguments: HF directory, where to work, seed.

Everything is imported once and each attempt forked from there; an attempt kills itself after a few tensors.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from prism_megatron.config import ParallelConfig
from prism_megatron.convert.convert_checkpoint import Report, hf_to_megatron, megatron_to_hf

SMALL = 300_000  # bytes of a file


def main() -> None:
    hf, work, rng = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    there = attempts(
        work / "megatron",
        rng,
        lambda report: hf_to_megatron(hf, work / "megatron", ParallelConfig(), file_bytes=SMALL, report=report),
    )
    back = attempts(
        work / "hf",
        rng,
        lambda report: megatron_to_hf(work / "megatron", work / "hf", verify=hf, shard_bytes=SMALL, report=report),
    )
    print(json.dumps({"there": there, "back": back}))


def attempts(out: Path, rng: random.Random, convert: Callable[[Report], object]) -> list[int]:
    """Bytes that were done when each attempt had added its first tensor."""
    started: list[int] = []
    while not out.exists():
        reader, writer = os.pipe()
        last = rng.randint(5, 40)
        if (pid := os.fork()) == 0:
            attempt(convert, last, writer)
        os.close(writer)
        with os.fdopen(reader) as first:
            started.append(int(first.readline() or -1))
        os.waitpid(pid, 0)
    return started


def attempt(convert: Callable[[Report], object], last: int, writer: int) -> None:
    calls = 0

    def report(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.write(writer, f"{done}\n".encode())
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(report)
    os._exit(0)


if __name__ == "__main__":
    main()
