"""Benchmark reading of data: start-up time and memory by number of rows, rows per second by number of workers.

    python -m tools.bench.data [--rows 3000 30000 300000] [--workers 0 1 2]

Files of chats about 256 images are made up. ``first`` builds the index, ``again`` uses it: wall and CPU seconds, those
of its processes included, and the growth of the memory that is this process's own. Then rows are read and encoded: how
many a second, and how long a trainer waits that computes for twice as long as HF's processor alone takes for a batch of
decoded images and their text (``processor_alone``). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.harness import provenance, write

if TYPE_CHECKING:
    from prism_megatron.data.chat import ChatProcessor
    from prism_megatron.data.lazy import Rows
    from prism_megatron.types import Example

_IMAGES, _SIDE = 256, 448
_BATCH, _BATCHES = 16, 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[3000, 30_000, 300_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prism-bench-data-") as name:
        folder = Path(name)
        _write_images(folder)
        starts = {count: _starts(folder, count) for count in arguments.rows}
        reading = _reading(folder, arguments.rows[0], arguments.workers)
    write({"benchmark": "data", **provenance(), "start": starts, "reading": reading}, arguments.out)
    return 0


def _write_images(folder: Path) -> None:
    from PIL import Image

    generator = random.Random(1)
    for number in range(_IMAGES):
        noise = Image.frombytes("RGB", (56, 56), generator.randbytes(3 * 56 * 56)).resize((_SIDE, _SIDE))
        noise.save(folder / f"{number}.jpg")


def _write_rows(folder: Path, count: int) -> Path:
    file, text = folder / f"{count}.jsonl", "The chart shows how the number of objects changes. " * 12
    with file.open("w") as lines:
        for number in range(count):
            turns = [{"from": "human", "value": f"<image>Question {number}?"}, {"from": "gpt", "value": text}]
            lines.write(
                json.dumps({"id": number, "images": [f"{number % _IMAGES}.jpg"], "conversations": turns}) + "\n"
            )
    return file


def _rows(file: Path) -> Rows[Example]:
    from prism_megatron.data.dataset import read_sft
    from prism_megatron.data.rows import ReadOptions

    return read_sft(file, ReadOptions(cache=file.parent / "cache"))


def _starts(folder: Path, count: int) -> dict[str, dict[str, float]]:
    from prism_megatron.data.loader import batch_indices

    file = _write_rows(folder, count)

    def start() -> None:
        rows = _rows(file)
        for index in batch_indices(len(rows), 64, 0, 1):
            rows[index]

    return {"first": _measured(start), "again": _measured(start)}


def _measured(work: Callable[[], None]) -> dict[str, float]:
    memory, wall, cpu = _own_memory(), time.perf_counter(), sum(os.times()[:4])
    work()
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "own_memory_mb": (_own_memory() - memory) / 1e6,
    }


def _own_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.partition("RssAnon:")[2].split()[0]) * 1024


def _reading(folder: Path, count: int, workers: list[int]) -> dict[str, Any]:
    from prism_megatron.data.chat import ChatProcessor
    from recipes.tiny_model import make_tiny_model

    make_tiny_model(folder / "model", seed=1)
    processor, rows = ChatProcessor(folder / "model"), _rows(folder / f"{count}.jsonl")
    alone = _processor_alone(rows, folder / "model")
    return {
        "processor_alone": {"rows_per_second": _BATCH / alone},
        **{f"workers_{number}": _with_workers(rows, processor, number, 2 * alone) for number in workers},
    }


def _processor_alone(rows: Rows[Example], model: Path) -> float:
    """Seconds that HF's processor takes for the decoded images of a batch and their text."""
    from transformers import AutoProcessor

    from prism_megatron.data.images import decode_image

    processor, seconds = AutoProcessor.from_pretrained(model), []
    for number in range(4):
        batch = list(rows[number * _BATCH : (number + 1) * _BATCH])
        images = [decode_image(image) for row in batch for image in row.images]
        start = time.perf_counter()
        processor.image_processor(images=images, return_tensors="pt")
        processor.tokenizer([f"{row.messages[-1].content}{row.response}" for row in batch])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _with_workers(rows: Rows[Example], processor: ChatProcessor, workers: int, pause: float) -> dict[str, float]:
    """Rows per second, and the share of the time that a trainer waits that computes ``pause`` seconds a batch."""
    from prism_megatron.data.prefetch import prefetch
    from prism_megatron.stages.sft import demonstrations

    def prepare(batch: int, trace: Any) -> Any:
        return demonstrations(rows[batch * _BATCH : (batch + 1) * _BATCH], processor, trace=trace)

    start = time.perf_counter()
    for _ in prefetch(prepare, rows, range(_BATCHES), workers):
        pass
    rate, waiting = _BATCH * _BATCHES / (time.perf_counter() - start), 0.0
    start = time.perf_counter()
    batches = prefetch(prepare, rows, range(_BATCHES), workers)
    for _ in range(_BATCHES):
        before = time.perf_counter()
        next(batches)
        waiting += time.perf_counter() - before
        time.sleep(pause)
    return {"rows_per_second": rate, "waiting": waiting / (time.perf_counter() - start)}


if __name__ == "__main__":
    sys.exit(main())
