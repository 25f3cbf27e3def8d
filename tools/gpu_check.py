"""Does everything that needs a GPU work on this one, and how fast? One command, one GPU, under 8 minutes, one JSON.

    python tools/gpu_check.py --out gpu_check.json [--only parity,fp8] [--layers 36] [--dry]

Each part runs in a process of its own with its own time; one that fails or hangs is recorded with its error, the others
go on, and the exit status is 1. A GPU that cannot hold the whole 4B-shaped model trains fewer layers; a note says so.
``--dry`` takes the same steps on tiny sizes in the precisions a CPU has, and says of the rest what would be run. Needed
beside torch, transformers and their dependencies: megatron-core and, on a GPU, Transformer Engine. Parts:

    names          every HF tensor into Megatron's parameters (grouped experts too), out, and in again, to the bit
    parity         BF16 beside float32 HF on a tiny and a two-layer model of 4B's widths, with images and gradients
    fp8            50 steps in BF16 and in each FP8 recipe from the same start: loss, gradient norm, divergence
    train          steps of a 4B-shaped model on images of real sizes, BF16 and each FP8 recipe, layers recomputed
    train_hf       the same rows in HF transformers with torch's AdamW and gradient checkpointing
    discriminator  scoring, packed beside one sequence at a time
    sync           new weights to vLLM, where it is installed
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SECONDS = {"names": 45, "parity": 75, "fp8": 95, "train": 105, "train_hf": 50, "discriminator": 45, "sync": 55}
_LOG_TAIL = 3000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the JSON, written after each part")
    parser.add_argument("--only", default=",".join(SECONDS), help="parts to run, in this order")
    parser.add_argument("--layers", type=int, default=0, help="decoder depth of train and train_hf; 0: what fits")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--commit", help="to be noted where there is no git repository")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], Path(arguments.worker[1]), arguments)
        return 0
    parts = arguments.only.split(",")
    if unknown := [part for part in parts if part not in SECONDS]:
        print(f"error: no part {', '.join(unknown)}; there are {', '.join(SECONDS)}", file=sys.stderr)
        return 2
    import torch

    if not arguments.dry and (not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None):
        print("error: this needs a GPU and Transformer Engine; --dry runs tiny sizes without them", file=sys.stderr)
        return 2
    return check(parts, arguments)


def check(parts: list[str], arguments: argparse.Namespace) -> int:
    """Run the parts, print a line for each, write the JSON; the exit status."""
    result: dict[str, Any] = {"benchmark": "gpu_check", "dry": arguments.dry, **_where(arguments.commit), "parts": {}}
    began = time.monotonic()
    for part in parts:
        result["parts"][part] = run_part(part, arguments)
        result |= {"seconds": round(time.monotonic() - began, 1)}
        result |= {"faults": told(result["parts"], _FAULTS), "notes": told(result["parts"], _NOTES)}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        of_part = {part: result["parts"][part]}
        print(f"{part}: {result['parts'][part]['seconds']} s, {len(told(of_part, _FAULTS))} faults")
        for note in told(of_part, _NOTES):
            print(f"note: {note}")
    for fault in result["faults"]:
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(result["faults"]))


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the part measured, variant by variant, and how it ended; it is killed when its time is up."""
    began = time.monotonic()
    command = [sys.executable, "-W", "ignore", __file__, "--layers", str(arguments.layers)]
    command += ["--dry"] if arguments.dry else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--worker", part, folder],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(SECONDS[part])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        lines = Path(folder) / "variants.jsonl"
        variants = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
        result: dict[str, Any] = {"variants": dict(variants)}
        if status != 0:
            end = f"no end after {SECONDS[part]} s" if status is None else f"exit status {status}"
            result |= {"error": end, "log": log.read_text(errors="replace")[-_LOG_TAIL:]}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def told(parts: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    """A line for each fault, of parts that did not end well too, or for each note."""
    found = []
    for part, result in parts.items():
        entries = {part: result, **{f"{part} {name}": measured for name, measured in result["variants"].items()}}
        found += [f"{name}: {text}" for name, entry in entries.items() for text in map(entry.get, kinds) if text]
    return found


_FAULTS = ("error", "fault")  # failed, or measured what it should not
_NOTES = ("note",)  # measured less than the whole


def work(part: str, folder: Path, arguments: argparse.Namespace) -> None:
    """In the part's own process: run its variants, noting each at once, so that none is lost when a later one hangs."""
    from prism_megatron.parallel import cpu

    cpu.install()
    import torch

    from tools import gpu_check_numerics, gpu_check_speed
    from tools.gpu_check_models import Scale

    if arguments.dry:
        torch.set_num_threads(min(torch.get_num_threads(), 2))
    scale = Scale(arguments.dry, arguments.layers, folder)
    variants = {**gpu_check_numerics.PARTS, **gpu_check_speed.PARTS}[part](scale)
    with (folder / "variants.jsonl").open("a") as lines:
        for name, measure in variants:
            began = time.monotonic()
            try:
                measured = measure()
            except Exception as error:  # recorded, and a fault at the end; the other variants are worth their time
                end = f"{type(error).__name__}: {error}"[:_LOG_TAIL]
                measured = {"error": end, "traceback": traceback.format_exc()[-_LOG_TAIL:]}
            measured["seconds"] = round(time.monotonic() - began, 1)
            lines.write(json.dumps([name, measured]) + "\n")
            lines.flush()
            gc.collect()  # a model in training holds itself; the next one needs its memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _where(commit: str | None) -> dict[str, Any]:
    """Commit, versions and hardware."""
    import torch

    from tools.bench import provenance

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


if __name__ == "__main__":
    sys.exit(main())
