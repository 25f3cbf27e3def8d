"""Benchmark a pipeline: time by stage and timer, and the share of the rollout engine.

    python -m tools.bench.pipeline runs/quickstart [--out NEW.json] [--compare OLD.json]      # from a run's logs
    python -m tools.bench.pipeline runs/bench --launch [sft.run.train_iters=20 ...]           # run the pipeline first

``setup`` is from a stage's start to its first iteration, ``finish`` from the last one to its end (evaluation, export).
Both are left out for a resumed stage, which has several starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_megatron.config import FINISHED
from prism_megatron.errors import UserError
from prism_megatron.observe import metrics as names
from prism_megatron.observe.logger import METRICS
from prism_megatron.observe.report import STAGES
from tools.bench import harness

_ENGINE = "rollout"  # timer of the engine's sampling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME")
    parser.add_argument("--launch", action="store_true", help="run the tiny pipeline there first")
    harness.add_output_options(parser)
    parser.add_argument("overrides", nargs="*", help="with --launch: stage.key=value")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.launch:
            _launch(arguments.run, arguments.overrides)
        result = measure(arguments.run)
        return harness.finish(result, arguments, rates(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(run: Path) -> dict[str, Any]:
    """Return the times of a run by stage. Raises UserError if no stage has logged anything."""
    found = {name: stage_times(run / name) for name in STAGES if (run / name / METRICS).is_file()}
    stages = {name: times for name, times in found.items() if times is not None}
    if not stages:
        raise UserError(f"{run} holds no stage with a line in {METRICS}; give a run, for example runs/quickstart")
    total = sum(times["seconds"] for times in stages.values())
    engine = sum(times["parts"].get(_ENGINE, 0.0) for times in stages.values())
    return {
        "benchmark": "pipeline",
        "config": {name: times.pop("config") for name, times in stages.items()},
        **harness.provenance(),
        "commit": ", ".join(
            sorted({str(times.pop("commit")) for times in stages.values()})
        ),  # of the run, not of this command
        "uncommitted_changes": None,
        "seconds": total,
        "share_of_stages": {name: times["seconds"] / total for name, times in stages.items()},
        "share_of_engine": engine / total,
        "stages": stages,
    }


def stage_times(directory: Path) -> dict[str, Any] | None:
    """Return one stage's seconds by timer; None if it has neither logged an iteration nor finished."""
    rows = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    config, finished = OmegaConf.load(directory / "config.yaml"), directory / FINISHED
    found: dict[str, Any] = {"config": {"train_iters": config.run.get("train_iters", 1)}, "commit": _commit(directory)}
    if not rows:  # a stage without iterations, such as collect
        if not finished.is_file():
            return None
        whole = finished.stat().st_mtime - (directory / "config.yaml").stat().st_mtime
        return found | {"seconds": whole, "parts": {"whole": whole}}
    parts: dict[str, float] = {}
    for row in rows:
        for name, value in _timers(row).items():
            parts[name] = parts.get(name, 0.0) + value
    of_iteration = [sum(_timers(row).values()) for row in rows]
    ends = _ends(directory, rows, of_iteration[0])
    median = statistics.median(of_iteration)
    found |= {
        "seconds": sum((parts | ends).values()),
        "parts": parts | ends,
        "iterations": len(rows),
        "iteration_seconds": {"median": median, "p90": _p90(of_iteration)},
        "iterations_per_second": 1 / median,
    }
    if sampled := [row for row in rows if names.RESPONSE_TOKENS in row and f"seconds_{_ENGINE}" in row]:
        responses = config.prompts_per_iteration * config.rollout.samples_per_prompt
        tokens = sum(row[names.RESPONSE_TOKENS] * responses for row in sampled)
        found["engine_tokens_per_second"] = tokens / parts[_ENGINE]
        found["share_of_engine"] = parts[_ENGINE] / found["seconds"]
    if trained := [row[names.TOKENS_PER_SECOND] for row in rows if names.TOKENS_PER_SECOND in row]:
        found["tokens_per_second"] = statistics.median(trained)
    return found


def rates(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the figures to compare with a baseline."""
    stages = result["stages"].items()
    return [f"stages.{name}.iterations_per_second" for name, times in stages if "iterations_per_second" in times]


def _timers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key.removeprefix("seconds_"): value for key, value in row.items() if key.startswith("seconds_")}


def _ends(directory: Path, rows: Sequence[Mapping[str, Any]], first: float) -> dict[str, float]:
    """Return the seconds before the first iteration and after the last, from the times of the stage's files."""
    finished = directory / FINISHED
    setup = rows[0]["time"] - first - (directory / "config.yaml").stat().st_mtime
    if not finished.is_file() or setup < 0:  # a resumed stage writes its configuration again
        return {}
    return {"setup": setup, "finish": max(finished.stat().st_mtime - rows[-1]["time"], 0.0)}


def _commit(directory: Path) -> str | None:
    path = directory / "versions.json"
    return json.loads(path.read_text()).get("commit") if path.is_file() else None


def _p90(values: Sequence[float]) -> float:
    return harness.median_and_p90(values)["p90"] if len(values) > 1 else values[0]


def _launch(run: Path, overrides: Sequence[str]) -> None:
    if run.parent.resolve() != Path("runs").resolve():
        raise UserError(f"--launch runs in runs/, not in {run}; give runs/NAME")
    command = [sys.executable, "-m", "recipes.launch", "tiny_pipeline", "--name", run.name, *overrides]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"the pipeline in {run} did not finish; its last lines say why")


if __name__ == "__main__":
    sys.exit(main())
