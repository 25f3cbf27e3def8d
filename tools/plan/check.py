"""Fit unit costs of a machine to its benchmarks, and compare predictions with its other runs and syncs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_megatron.config import ParallelConfig, SFTConfig
from prism_megatron.data.shapes import ShapesConfig, write_shapes_data
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import Workload
from recipes.estimate.memory import Memory, estimate
from recipes.estimate.step_time import Costs, Rows, StepTime, predict
from recipes.tiny import tiny_rlvr
from recipes.tiny_model import make_tiny_model
from tools.bench import harness, sync
from tools.bench.inputs import Settings, mock_shape, model_sizes, read_sft_config, sizes_of, training_sequences

_FREE = Costs(
    peak_flops=math.inf,
    achieved=1.0,
    layer_seconds=0.0,
    memory_bytes_per_second=math.inf,
    memory_bytes=math.inf,
    host_seconds_per_token=0.0,
    ranks_per_node=1 << 30,
    intra_latency=0.0,
    intra_bytes_per_second=math.inf,
    inter_latency=0.0,
    inter_bytes_per_second=math.inf,
    sync_bytes_per_second=math.inf,
)
_CALIBRATION = 3  # unit costs of compute to fit, and so the number of single-rank runs that are needed


def check(paths: Sequence[Path]) -> str:
    """Return a table of measured and predicted step times. Raises UserError if there are too few runs to fit."""
    results = {path.stem: harness.read_baseline(path) for path in paths}
    runs = training_runs(results)
    collectives = next((r for r in results.values() if r["benchmark"] == "collectives"), None)
    fitted = [name for name in runs if name.startswith("train_calibrate")]
    if len(fitted) < _CALIBRATION or collectives is None:
        raise UserError(
            f"a check needs {_CALIBRATION} runs of tools.bench.train on one rank with --images mock, in files named "
            f"train_calibrate*.json, and one of tools.bench.collectives; got {', '.join(results)}"
        )
    costs = calibrate([runs[name] for name in fitted], collectives)
    head = f"{'measured ms':>12s} {'predicted':>10s} {'error':>7s}"
    lines = [
        f"{costs.peak_flops / 1e9:.1f} GFLOP/s, {costs.memory_bytes_per_second / 1e9:.2f} GB/s, "
        f"{1e3 * costs.layer_seconds:.2f} ms a layer; exchange {1e3 * costs.intra_latency:.2f} ms and "
        f"{costs.intra_bytes_per_second / 1e9:.2f} GB/s",
        f"{'run':32s} {head}",
    ]
    for name, error in errors(runs, costs).items():
        measured = runs[name]["ours"]["step_seconds"]["median"]
        lines.append(_line(name, measured, error, name in fitted))
    syncs = {name: result for name, result in results.items() if result["benchmark"] == "sync"}
    lines += [f"{'weight sync to the engine':32s} {head}"] if syncs else []
    for name, error in sync_errors(syncs, costs).items():
        lines.append(_line(name, syncs[name]["push"]["seconds"]["median"], error, syncs[name]["ranks"] == 1))
    return "\n".join(lines)


def training_runs(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the runs of tools.bench.train that are of SFT and whose rows can be made again."""
    return {
        name: result
        for name, result in results.items()
        if result["benchmark"] == "train"
        and result.get("stage", "sft") == "sft"
        and result["config"]["images"] in ("mock", "shapes")
    }


def _line(name: str, measured: float, error: float, fitted: bool) -> str:
    line = f"{name:32s} {1e3 * measured:12.0f} {1e3 * measured * (1 + error):10.0f} {error:+7.0%}"
    return line + " (fitted)" * fitted


def errors(runs: Mapping[str, Mapping[str, Any]], costs: Costs) -> dict[str, float]:
    """Return (predicted - measured) / measured of each run's step."""
    return {
        name: predicted(result, costs).total / result["ours"]["step_seconds"]["median"] - 1
        for name, result in runs.items()
    }


def predicted(result: Mapping[str, Any], costs: Costs) -> StepTime:
    """Predict the step time of a measured run."""
    config, sizes, rows, memory = _run(result)
    return predict(config, sizes, rows, result["ranks"], costs, memory)


def sync_errors(syncs: Mapping[str, Mapping[str, Any]], costs: Costs) -> dict[str, float]:
    """Return (predicted - measured) / measured of the push of each run of tools.bench.sync.

    Raises UserError if none is of one rank, to which the cost of loading is fitted.
    """
    if not syncs:
        return {}
    single_rank = [result for result in syncs.values() if result["ranks"] == 1]
    if not single_rank:
        raise UserError(
            f"the cost of loading is fitted to a run of tools.bench.sync on one rank; got only {', '.join(syncs)}"
        )
    seconds = sum(result["push"]["seconds"]["median"] for result in single_rank)
    costs = replace(costs, sync_bytes_per_second=sum(result["weight_bytes"] for result in single_rank) / seconds)
    return {
        name: _sync_seconds(result, costs) / result["push"]["seconds"]["median"] - 1 for name, result in syncs.items()
    }


def _sync_seconds(result: Mapping[str, Any], costs: Costs) -> float:
    """Predict the seconds of a measured push."""
    sizes = sizes_of(sync.model_overrides(result["config"]["hidden"], result["config"]["layers"]))
    config = replace(tiny_rlvr(), parallel=ParallelConfig(tensor_model_parallel_size=result["ranks"]))
    row = Rows(1, Workload([1], [0], 1))  # a push does not depend on rows
    return predict(config, sizes, row, result["ranks"], costs, Memory()).weight_sync


def calibrate(runs: Sequence[Mapping[str, Any]], collectives: Mapping[str, Any]) -> Costs:
    """Fit unit costs to single-rank runs and measured collectives."""
    rows, seconds = [], []
    for result in runs:
        if result["ranks"] != 1:
            raise UserError(f"unit costs are fitted to runs of one rank, not of {result['ranks']}")
        # A step's time is linear in these three costs: predict it with each at 1 and all others at 0.
        each = (
            replace(_FREE, peak_flops=1.0),
            replace(_FREE, memory_bytes_per_second=1.0),
            replace(_FREE, layer_seconds=1.0),
        )
        rows.append([predicted(result, costs).total for costs in each])
        split = result["ours"]["split"]
        outside = (split["layout"] + split["other"]) / split["step"]
        seconds.append(result["ours"]["step_seconds"]["median"] * (1 - outside))
    per_flop, per_byte, per_layer = non_negative(rows, seconds)
    outside_seconds = sum(r["ours"]["split"]["layout"] + r["ours"]["split"]["other"] for r in runs)
    link = collectives["all_reduce"]
    return replace(
        _FREE,
        peak_flops=1 / per_flop if per_flop else math.inf,
        memory_bytes_per_second=1 / per_byte if per_byte else math.inf,
        layer_seconds=per_layer,
        host_seconds_per_token=outside_seconds / sum(r["tokens_per_step"] for r in runs),
        intra_latency=link["latency_seconds"],
        intra_bytes_per_second=link["bytes_per_second"],
    )


def non_negative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return c >= 0 with rows @ c near ``seconds``, by least squares of relative errors; negative costs become 0."""
    import torch

    matrix = torch.tensor(rows, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = matrix.abs().amax(0).clamp(min=1e-300)
    columns = list(range(matrix.shape[1]))
    while columns:
        found = torch.linalg.lstsq(matrix[:, columns] / scale[columns], torch.ones(len(rows), 1, dtype=torch.float64))
        costs = (found.solution[:, 0] / scale[columns]).tolist()
        if min(costs) >= 0:
            return [costs[columns.index(i)] if i in columns else 0.0 for i in range(matrix.shape[1])]
        columns.pop(costs.index(min(costs)))
    raise UserError("the calibrating runs fit no positive cost; measure them again on a quiet machine")


def _run(result: Mapping[str, Any]) -> tuple[SFTConfig, HFSizes, Rows, Memory]:
    """Return configuration, sizes, rows and estimated memory of a run."""
    options = dict(result["config"])
    options |= {"resolutions": tuple(map(tuple, options["resolutions"])), "overrides": tuple(options["overrides"])}
    settings = Settings(**options)
    config, sizes = read_sft_config(settings, Path("nowhere")), model_sizes(settings.size)
    count = config.global_batch_size
    if settings.images == "shapes":
        work = _built_in(settings, count)
    else:
        shapes = [mock_shape(settings, sizes, number) for number in range(count)]
        trained = settings.response_tokens * count
        work = Workload([length for length, _ in shapes], [patches for _, patches in shapes], trained)
    memory = estimate(config, result["ranks"], sizes, sizes)
    return config, sizes, Rows(count, work), memory


def _built_in(settings: Settings, count: int) -> Workload:
    """Return the work of the built-in task's first global batch, made and encoded again."""
    from prism_megatron.stages.batcher import workload
    from prism_megatron.stages.setup import load_processor

    with tempfile.TemporaryDirectory() as folder:
        config = read_sft_config(settings, Path(folder))
        make_tiny_model(Path(config.model.hf_checkpoint), seed=1)  # for its processor, which all sizes share
        data = ShapesConfig(sft_rows=count, alignment_rows=1, rlvr_rows=1, heldout_rows=1)
        write_shapes_data(Path(config.data).parent, data)
        return workload(training_sequences(settings, config, load_processor(config), count))
