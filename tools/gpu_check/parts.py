"""Run the parts of the GPU check, each in a process with a time limit, and collect results, faults and notes."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prism_megatron.files import read_json_lines, write_atomic
from tools.processes import run_module

SECONDS = {"names": 45, "parity": 75, "fp8": 95, "train": 105, "train_hf": 50, "discriminator": 45, "sync": 55}
FAULTS = ("error", "fault")  # keys of a result: it failed, or it measured what it should not
NOTES = ("note",)  # it measured less than the full model
_LOG_TAIL = 3000  # characters


@dataclass(frozen=True)
class Options:
    """Command-line options. ``layers`` is the decoder depth of the timed parts, 0 for what fits."""

    out: Path
    dry: bool = False
    layers: int = 0
    commit: str | None = None


def check(parts: list[str], options: Options) -> int:
    """Run the parts, print a line for each and write the JSON after each. Returns the exit status."""
    result: dict[str, Any] = {"benchmark": "gpu_check", "dry": options.dry, **_where(options.commit), "parts": {}}
    start_time = time.monotonic()
    for part in parts:
        result["parts"][part] = run_part(part, options)
        result |= {"seconds": round(time.monotonic() - start_time, 1)}
        result |= {"faults": lines_of(result["parts"], FAULTS), "notes": lines_of(result["parts"], NOTES)}
        write_atomic(options.out, json.dumps(result, indent=2) + "\n")
        of_part = {part: result["parts"][part]}
        print(f"{part}: {result['parts'][part]['seconds']} s, {len(lines_of(of_part, FAULTS))} faults")
        for note in lines_of(of_part, NOTES):
            print(f"note: {note}")
    for fault in result["faults"]:
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(result["faults"]))


def run_part(part: str, options: Options) -> dict[str, Any]:
    """Run one part and return its results by variant, with an ``error`` if it failed or was killed at its limit."""
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [part, folder, "--layers", str(options.layers), *["--dry"] * options.dry]
        done = run_module("tools.gpu_check.worker", arguments, SECONDS[part], {"HF_HUB_OFFLINE": "1"})
        result: dict[str, Any] = {"variants": dict(read_json_lines(Path(folder) / "variants.jsonl"))}
        if done.status != 0:
            end = f"no end after {SECONDS[part]} s" if done.status is None else f"exit status {done.status}"
            result |= {"error": end, "log": done.output[-_LOG_TAIL:]}
    return result | {"seconds": round(time.monotonic() - start_time, 1)}


def lines_of(parts: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    """Return a line for each value under ``kinds`` in the results of the parts and of their variants."""
    found = []
    for part, result in parts.items():
        entries = {part: result, **{f"{part} {name}": measured for name, measured in result["variants"].items()}}
        found += [f"{name}: {text}" for name, entry in entries.items() for text in map(entry.get, kinds) if text]
    return found


def _where(commit: str | None) -> dict[str, Any]:
    """Commit, versions and hardware."""
    import torch

    from tools.bench.harness import provenance

    where = provenance()
    where["commit"] = where["commit"] or commit
    for package in ("transformer-engine", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            where["versions"][package] = metadata.version(package)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        where["compute_capability"] = [found.major, found.minor]
        where["memory_gib"] = round(found.total_memory / 2**30, 1)
    return where
