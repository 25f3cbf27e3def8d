"""One part of the GPU check in its own process: ``python -m tools.gpu_check.worker PART FOLDER``."""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from pathlib import Path

import torch

from prism_megatron.files import JSONLines
from tools.gpu_check import numerics, speed
from tools.gpu_check.models import Scale

_ERROR_CHARACTERS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry:
        torch.set_num_threads(min(torch.get_num_threads(), 2))
    run_variants(arguments.part, Scale(arguments.dry, arguments.layers, arguments.folder))


def run_variants(part: str, scale: Scale) -> None:
    """Run a part's variants and write each result at once, so that none is lost when a later one hangs."""
    variants = {**numerics.PARTS, **speed.PARTS}[part](scale)
    with JSONLines(scale.folder / "variants.jsonl") as lines:
        for name, measure in variants:
            start_time = time.monotonic()
            try:
                measured = measure()
            except Exception as error:  # recorded, and a fault at the end; the other variants are worth their time
                end = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
                measured = {"error": end, "traceback": traceback.format_exc()[-_ERROR_CHARACTERS:]}
            measured["seconds"] = round(time.monotonic() - start_time, 1)
            lines.append([name, measured])
            gc.collect()  # a model in training holds itself; the next one needs its memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
