"""Benchmark saving during training: the time that a step waits for a save, and the time until it is on disk.

    python -m tools.bench.checkpoint --out runs/bench_checkpoint [--megabytes 600]

One rank trains a Qwen3-VL of that size (weights and AdamW state) on constant gradients, and saves once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from prism_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from prism_megatron.convert.qwen3_vl import policy_table
from prism_megatron.model.sizes import HFSizes
from recipes.tiny_model import TEXT_CONFIG, VISION_CONFIG

_STATE_BYTES = 12  # per parameter: weight and AdamW's two moments, in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to save in; must not exist")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the checkpoint")
    args = parser.parse_args()
    if args.out.exists():
        print(f"error: {args.out} exists; remove it or give another --out", file=sys.stderr)
        return 2
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    from prism_megatron.checkpoint.checkpointer import Checkpointer

    chunks, optimizer = train_model(args.megabytes * 1_000_000)
    checkpointer = Checkpointer(args.out, keep=1)
    without_save = [step(chunks, optimizer) for _ in range(5)]

    start_time = time.monotonic()
    checkpointer.save(1, {"policy": (chunks, optimizer)})
    blocked = time.monotonic() - start_time
    during_save = []
    while checkpointer.latest() == 0:
        during_save.append(step(chunks, optimizer))
        checkpointer.poll()
    written = time.monotonic() - start_time
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    shutil.rmtree(args.out)
    measured = {
        "bytes": size,
        "seconds_blocked": round(blocked, 3),
        "seconds_until_saved": round(written, 3),
        "step_seconds": round(statistics.median(without_save), 3),
        "step_seconds_during_save": round(statistics.median(during_save), 3),
        "steps_during_save": len(during_save),
    }
    print(json.dumps(measured))
    groups.shutdown()
    return 0


def train_model(size: int) -> tuple[Any, Any]:
    """Return a model whose checkpoint has about ``size`` bytes, and its optimizer after one step."""
    from prism_megatron.model.build import build_policy, wrap_for_training
    from prism_megatron.optim.optimizer import build_optimizer

    def sizes(layers: int) -> HFSizes:
        text = TEXT_CONFIG | {"vocab_size": 400, "rms_norm_eps": 1e-6, "num_hidden_layers": layers}
        text |= {"hidden_size": 1024, "intermediate_size": 3072}
        return HFSizes(text, VISION_CONFIG | {"in_channels": 3, "out_hidden_size": 1024}, True)

    def bytes_of(layers: int) -> int:
        return _STATE_BYTES * sum(rule.numel for rule in policy_table(sizes(layers)) if not rule.tied)

    layers = max(1, round((size - bytes_of(0)) / (bytes_of(1) - bytes_of(0))))
    built = build_policy(ModelConfig(hf_checkpoint=""), ParallelConfig(), sizes(layers))
    for chunk in built:
        for parameter in chunk.parameters():
            parameter.data.normal_(0, 0.02)
    chunks = wrap_for_training(built, use_distributed_optimizer=False)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), chunks)
    step(chunks, optimizer)
    return chunks, optimizer


def step(chunks: Any, optimizer: Any) -> float:
    """Return the seconds of an optimizer step on gradients of one."""
    start_time = time.monotonic()
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1.0)
    optimizer.step()
    return time.monotonic() - start_time


if __name__ == "__main__":
    sys.exit(main())
