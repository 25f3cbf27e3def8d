"""Run ``tools.bench.train`` for many settings, and write one table (Markdown and JSON) and one plot.

    python -m tools.bench.train --out runs/sweep --sweep ranks:global_batch_size=1:16,2:32      # weak scaling
    python -m tools.bench.sweep --out runs/scaling runs/scaling/*.json                          # of a cluster

A sweep runs every combination of its keys, one after the other; keys joined by a colon vary together. ``ranks``,
``recipe``, ``size``, ``discriminator_size``, ``images``, ``resolutions`` and ``response_tokens`` are the benchmark's
own, other keys the recipe's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from tools.bench import harness
from tools.processes import run_module

_OPTIONS = (
    *("recipe", "size", "discriminator_size", "images", "resolutions", "response_tokens"),
    *("ranks", "steps", "warmup", "vs"),
)
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {  # columns of the table, from a result's ``ours``
    "tokens/s/rank": lambda ours: f"{ours['tokens_per_second_per_rank']:.0f}",
    "tokens/s": lambda ours: f"{ours['tokens_per_second']:.0f}",
    "step ms, median": lambda ours: f"{1e3 * ours['step_seconds']['median']:.0f}",
    "p90": lambda ours: f"{1e3 * ours['step_seconds']['p90']:.0f}",
    "TFLOP/s/rank": lambda ours: f"{ours['tflops_per_rank']:.4g}",
    "MFU": lambda ours: "–" if ours["mfu"] is None else f"{ours['mfu']:.1%}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("results", nargs="+", type=Path, help="results of tools.bench.train")
    arguments = parser.parse_args()
    try:
        results = [harness.read_baseline(path) for path in arguments.results]
        write([{"facts": facts(result), "result": result} for result in results], arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sweep(axes: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run every point. Returns exit status 1 if one crashed; points that are refused are part of the table."""
    if arguments.out is None or arguments.compare is not None:
        raise UserError("--sweep needs --out FOLDER, and takes no --compare")
    points = [dict(pairs) for pairs in combinations(axes)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    broken = 0
    for number, point in enumerate(points):
        out = arguments.out / f"point_{number}.json"
        out.unlink(missing_ok=True)
        done = run_module("tools.bench.train", [*_command_line(arguments, point), "--out", str(out)])
        print(f"{number + 1}/{len(points)} {point}: {'done' if out.is_file() else done.output.strip()}", flush=True)
        if out.is_file():
            result = harness.read_baseline(out)
            rows.append({"facts": facts(result), "result": result})
        else:
            errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
            broken += not errors
            rows.append({"facts": point, "refused": errors[0] if errors else f"exit status {done.status}"})
    write(rows, arguments.out)
    return int(bool(broken))


def combinations(axes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return every combination of ``KEY=V,W`` (or ``A:B=V:W,X:Y``) as (key, value) pairs."""
    choices_by_axis = []
    for axis in axes:
        names, separator, values = axis.partition("=")
        keys = names.split(":")
        choices = [value.split(":") for value in values.split(",")]
        if not separator or not all(keys) or any(len(choice) != len(keys) or not all(choice) for choice in choices):
            raise UserError(f"--sweep {axis!r} is not KEY=V,W or A:B=V:W,X:Y with a value for each key")
        choices_by_axis.append([list(zip(keys, choice, strict=True)) for choice in choices])
    return [list(itertools.chain(*parts)) for parts in itertools.product(*choices_by_axis)]


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a result by the keys of a sweep."""
    config = dict(result["config"])
    overrides = dict(override.split("=", 1) for override in config.pop("overrides"))
    config["resolutions"] = ",".join(f"{width}x{height}" for width, height in config["resolutions"])
    return {key: str(value) for key, value in {"ranks": result["ranks"], **config, **overrides}.items()}


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write ``table.json``, ``table.md`` and ``plot.svg``."""
    keys = varied(rows)
    text = table(rows, keys)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps({"benchmark": "train_sweep", "rows": list(rows)}, indent=2) + "\n")
    (out / "table.md").write_text(text)
    _plot(rows, keys, out / "plot.svg")
    print(text)


def varied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that differ between rows. A refused row has the swept keys only."""
    keys = dict.fromkeys(key for row in rows for key in row["facts"])

    def values(key: str) -> set[str | None]:
        return {row["facts"].get(key) for row in rows if "result" in row or key in row["facts"]}

    return [key for key in keys if len(values(key)) > 1] or ["ranks"]


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Return Markdown; ``relative`` is the speed per rank over that of the first row."""
    speeds = [row["result"]["ours"]["tokens_per_second_per_rank"] for row in rows if "result" in row]
    has_hf = any("ours_over_hf" in row.get("result", {}) for row in rows)
    header = [*keys, *_COLUMNS, "relative", "peak GB/rank", *["over HF"] * has_hf]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row["facts"].get(key, "") for key in keys]
        if "refused" in row:
            lines.append([*cells, row["refused"], *[""] * (len(header) - len(cells) - 1)])
            continue
        result = row["result"]
        ours = result["ours"]
        cells += [text_of(ours) for text_of in _COLUMNS.values()]
        cells += [f"{ours['tokens_per_second_per_rank'] / speeds[0]:.2f}"]
        cells += [f"{max(result['peak_bytes_of_all_sides']) / 1e9:.2f}"]
        lines.append(cells + ([f"{result['ours_over_hf']:.2f}" if "ours_over_hf" in result else "–"] if has_hf else []))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _command_line(arguments: argparse.Namespace, point: Mapping[str, str]) -> list[str]:
    """Return the command line of ``tools.bench.train`` for one point."""
    options = {name: getattr(arguments, name) for name in _OPTIONS} | {k: v for k, v in point.items() if k in _OPTIONS}
    options["ranks"] = options["ranks"] or 1
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    return [*given, *arguments.overrides, *(f"{key}={value}" for key, value in point.items() if key not in _OPTIONS)]


def _plot(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> None:
    """Plot tokens per second and rank of each point: a bar to the median, a tick at the slowest tenth."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    measured = [row for row in rows if "result" in row]
    labels = ["  ".join(f"{key.rpartition('.')[2]} {row['facts'].get(key, '–')}" for key in keys) for row in measured]
    speeds = [row["result"]["ours"]["tokens_per_second_per_rank"] for row in measured]
    slowest = [row["result"]["ours"]["tokens_per_second_p90_slowest"] / row["result"]["ranks"] for row in measured]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(measured)), layout="constrained")
    axes.barh(labels, speeds, color="#4477aa")
    axes.plot(slowest, labels, "|", color="black", markersize=12, label="slowest tenth of the steps")
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second and rank")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
