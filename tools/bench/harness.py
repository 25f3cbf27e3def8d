"""Shared code of the benchmarks: interleaved steps, medians, provenance, and comparison with a baseline."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from tools.processes import ROOT, module_environment


def interleaved(sides: Mapping[str, Callable[[int], Any]], steps: int, warmup: int) -> dict[str, list[float]]:
    """Run the sides alternately, so that a busy machine slows all. Returns the seconds of the measured steps."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + steps):
        for name, step in sides.items():
            _synchronize()
            start_time = time.perf_counter()
            step(number)
            _synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start_time)
    return seconds


def median_and_p90(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 90th percentile of at least two values."""
    return {"median": statistics.median(values), "p90": statistics.quantiles(values, n=10, method="inclusive")[-1]}


def peak_bytes() -> int:
    """Return the peak memory of this process: on the GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes_of_children() -> int:
    """Return the sum of the peak resident memory of all living descendants of this process."""
    parents, peaks = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended in the meantime
            fields = dict(re.findall(r"^(\w+):\s+(\d+)", status.read_text(), re.MULTILINE))
            process = int(fields["Pid"])
            parents[process], peaks[process] = int(fields["PPid"]), 1024 * int(fields.get("VmHWM", 0))
    found, new = set[int](), {os.getpid()}
    while new := {process for process, parent in parents.items() if parent in new}:
        found |= new
    return sum(peaks[process] for process in found)


def extra_peak_bytes(work: Callable[[], Any]) -> int:
    """Return the peak memory of ``work`` beyond the memory in use when it starts.

    It is GPU memory if there is a GPU, else resident memory as the Linux kernel counts it, which includes every
    allocator. Freed memory counts until it is returned to the system, so ``work`` should call :func:`release_freed`.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        in_use = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - in_use
    release_freed()  # memory freed earlier must not be reused
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    in_use = _resident("VmRSS")
    work()
    return _resident("VmHWM") - in_use


def release_freed() -> None:
    """Return freed memory that malloc caches to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def _resident(line: str) -> int:
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def provenance() -> dict[str, Any]:
    """Return the commit, versions and hardware of a measurement."""
    import torch

    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def hardware() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def start_ranks(ranks: int, module: str) -> int:
    """Run ``module`` with this process's command line in ``ranks`` processes on this machine. Returns the exit status.

    Raises UserError with the first one-line error of a rank.
    """
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(max(cores // ranks, 1)), "PYTHONWARNINGS": "ignore", **module_environment()}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, "-m", module, *sys.argv[1:]], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode and errors:
        raise UserError(errors[0].removeprefix("error: "))
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode


def read_baseline(path: Path) -> dict[str, Any]:
    """Read an earlier result. Raises UserError if that fails."""
    try:
        baseline = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"baseline {path} cannot be read ({error}); write one with --out") from error
    if not isinstance(baseline, dict):
        raise UserError(f"baseline {path} is not a benchmark's JSON; write one with --out")
    return baseline


def regressions(
    result: Mapping[str, Any], baseline: Mapping[str, Any], higher_is_better: Sequence[str], tolerance: float
) -> list[str]:
    """Return a line for each figure that is worse than the baseline's by more than ``tolerance``.

    Figures are named by their path, such as "ours.tokens_per_second". Raises UserError if the two runs have different
    settings or hardware, or none of the figures in common.
    """
    for key in ("benchmark", "config", "hardware", "threads", "ranks"):
        then, now = baseline.get(key), result.get(key)
        if then != now:
            raise UserError(f"the baseline's {key} is {then!r}, this run's is {now!r}; compare like with like")
    pairs = [(name, _figure(result, name), _figure(baseline, name)) for name in higher_is_better]
    both = [(name, new, old) for name, new, old in pairs if new is not None and old is not None]
    if not both:
        raise UserError(f"the baseline has none of {', '.join(higher_is_better)}")
    return [
        f"{name} is {new:.4g}, the baseline's {old:.4g}: worse by more than {tolerance:.0%}"
        for name, new, old in both
        if new < old * (1 - tolerance)
    ]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`finish` reads. An unreadable baseline is refused before the measurement."""
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument(
        "--compare", type=_baseline, metavar="OLD.json", help="an earlier result; exit status 1 if this one is worse"
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="allowed relative loss")


def finish(result: Mapping[str, Any], arguments: argparse.Namespace, higher_is_better: Sequence[str]) -> int:
    """Write the result and compare it with the baseline, if there is one. Returns the exit status."""
    write(result, arguments.out)
    if arguments.compare is None:
        return 0
    try:
        worse = regressions(result, arguments.compare, higher_is_better, arguments.tolerance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in worse:
        print(line, file=sys.stderr)
    return int(bool(worse))


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result as one JSON line, and write it to ``out`` if given."""
    print(json.dumps(result))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


def resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """Parse WIDTHxHEIGHT,WIDTHxHEIGHT. Raises UserError for anything else."""
    sizes = []
    for item in text.split(","):
        width, _, height = item.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise UserError(f"--resolutions has {item!r}; give WIDTHxHEIGHT in pixels, for example 448x448,1024x768")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def _baseline(path: str) -> dict[str, Any]:
    try:
        return read_baseline(Path(path))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _figure(result: Mapping[str, Any], name: str) -> float | None:
    value: Any = result
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _git(*arguments: str) -> str:
    """Return git's output, empty without a repository or git."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
