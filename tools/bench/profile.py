"""Profile a training step: a torch profiler trace, and the ten largest costs with their share.

    python -m tools.bench.profile --out runs/profile [--recipe tiny] [global_batch_size=8 ...]
    python -m tools.bench.profile --out runs/profile --recipe tiny_align

Writes ``trace.json`` (for Perfetto or chrome://tracing) and ``costs.json``, and prints the costs. A cost is an
operator's self time; shares are of the profiled steps' wall-clock time on a CPU, of the kernels' time on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from tools.bench import harness
from tools.bench.inputs import Settings
from tools.bench.train import prepare

_COSTS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--recipe", default="tiny", help="of any stage that trains, or a family of SFT recipes")
    parser.add_argument("--images", default="shapes", help="shapes, mock, or a directory of images")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, after as many steps of warm-up")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.recipe,
        images=arguments.images,
        overrides=tuple(arguments.overrides),
        steps=arguments.steps,
        warmup=arguments.steps,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = costs(settings, Path(folder), arguments.out / "trace.json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (arguments.out / "costs.json").write_text(json.dumps(result, indent=2) + "\n")
    print("  share  calls/step  operator")
    for cost in result["costs"]:
        print(f"{cost['share']:7.1%}  {cost['calls_per_step']:10.1f}  {cost['operator']}")
    return 0


def costs(settings: Settings, folder: Path, trace: Path) -> dict[str, Any]:
    """Return the largest costs of a step in descending order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from prism_megatron.parallel import groups

    prepared = prepare(settings, folder)
    step = prepared.sides["ours"]
    on_gpu = torch.cuda.is_available()
    for number in range(settings.warmup):
        step(number)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    start_time = time.perf_counter()
    with profile(activities=activities) as profiler:
        for number in range(settings.steps):
            step(number)
    seconds = time.perf_counter() - start_time
    groups.shutdown()
    profiler.export_chrome_trace(str(trace))
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events) if on_gpu else seconds * 1e6
    return {
        "benchmark": "profile",
        "steps": settings.steps,
        "step_seconds": seconds / settings.steps,
        "costs": [
            {
                "operator": event.key,
                "share": getattr(event, attribute) / total,
                "calls_per_step": event.count / settings.steps,
            }
            for event in events[:_COSTS]
        ],
        **harness.provenance(),
    }


if __name__ == "__main__":
    sys.exit(main())
