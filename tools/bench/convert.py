"""Benchmark checkpoint conversion: speed compared with a plain copy of the files, and peak memory.

    python -m tools.bench.convert --out runs/bench_convert [--gigabytes 2.2]

Makes a random bf16 Qwen3-VL checkpoint of that size, copies it, converts it in both directions (verified against the
original) and prints JSON: seconds, MB/s and peak memory of each step, and the peak memory of the imports alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prism_megatron.convert.qwen3_vl import policy_table
from prism_megatron.model.sizes import read_sizes
from tools.processes import module_environment

# Qwen3-VL-2B with a depth chosen for the size.
_TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [0],
}
_SHARD_BYTES = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to work in; must not exist")
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of the checkpoint")
    args = parser.parse_args()
    if args.out.exists():
        print(f"error: {args.out} exists; remove it or give another --out", file=sys.stderr)
        return 2
    hf, megatron = args.out / "hf", args.out / "megatron"
    largest = make_checkpoint(hf, round(args.gigabytes * 1e9))
    size = sum(path.stat().st_size for path in hf.iterdir())
    convert = [sys.executable, "-W", "ignore", "-m", "tools.convert"]
    measured: dict[str, Any] = {"bytes": size, "largest_tensor_bytes": largest}
    measured["copy"] = copy(hf, args.out / "copy", size)
    measured["import_only"] = {"peak_rss_bytes": run([*convert, "--help"])[1]}
    to_megatron = ["hf-to-megatron", "--hf", str(hf), "--out", str(megatron)]
    to_hf = ["megatron-to-hf", "--megatron", str(megatron), "--out"]
    for name, command in (
        ("hf_to_megatron", to_megatron),
        ("megatron_to_hf", [*to_hf, str(args.out / "back")]),
        ("megatron_to_hf_verified", [*to_hf, str(args.out / "verified"), "--verify", str(hf)]),
    ):
        seconds, peak = run([*convert, *command])
        above = peak - measured["import_only"]["peak_rss_bytes"] - largest
        measured[name] = {
            **speed(size, seconds),
            "times_a_copy": round(seconds / measured["copy"]["seconds"], 2),
            "peak_rss_bytes": peak,
            "above_import_and_largest_tensor_bytes": above,
        }
    shutil.rmtree(args.out)
    print(json.dumps(measured, indent=1))
    return 0


def make_checkpoint(directory: Path, size: int) -> int:
    """Write a random checkpoint of about ``size`` bytes. Returns the bytes of its largest tensor."""
    import torch

    from prism_megatron.convert.manifest import JOURNAL
    from prism_megatron.convert.safetensors_writer import ShardWriter, TensorSpec

    directory.mkdir(parents=True)

    def configure(layers: int) -> int:
        text = _TEXT | {"num_hidden_layers": layers}
        config = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "text_config": text, "vision_config": _VISION}
        (directory / "config.json").write_text(json.dumps(config))
        return 2 * sum(rule.numel for rule in policy_table(read_sizes(directory)) if not rule.tied)

    one, two = configure(1), configure(2)
    layer = two - one
    configure(max(1, -(-(size - one + layer) // layer)))
    rules = [rule for rule in policy_table(read_sizes(directory)) if not rule.tied]
    specs = [TensorSpec(*pair, torch.bfloat16) for rule in rules for pair in zip(rule.hf, rule.shapes, strict=True)]
    writer, generator = ShardWriter(directory, specs, _SHARD_BYTES), torch.Generator().manual_seed(0)
    for spec in specs:
        block = torch.randn(min(spec.shape[0], 64), *spec.shape[1:], generator=generator).bfloat16()
        repeats, rest = divmod(spec.shape[0], len(block))
        writer.add(spec.name, [*[block] * repeats, block[:rest]])
    writer.finish()
    (directory / JOURNAL).unlink()
    return max(entry.bytes for entry in writer.entries)


def copy(source: Path, target: Path, size: int) -> dict[str, float]:
    """Copy the files and sync them to disk, as the converter does."""
    from prism_megatron.files import fsync

    target.mkdir()
    start_time = time.monotonic()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        fsync(target / path.name)
    return speed(size, time.monotonic() - start_time)


def run(command: list[str]) -> tuple[float, int]:
    """Run a command. Returns its seconds and peak resident bytes."""
    start_time = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=module_environment())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start_time, usage.ru_maxrss * 1024


def speed(size: int, seconds: float) -> dict[str, float]:
    return {"seconds": round(seconds, 2), "megabytes_per_second": round(size / seconds / 1e6, 1)}


if __name__ == "__main__":
    sys.exit(main())
