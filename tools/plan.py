"""What a step would take on a cluster, layout by layout, fastest first: on paper.

    python tools/plan.py --model 8b --nodes 2 [--costs recipes/costs/h100.json] [--image 1024x768] [--json]
    python tools/plan.py --check tools/baselines/*.json

Memory is ``recipes/memory.py``'s, time ``recipes/step_time.py``'s, whose texts say what they assume; each unit cost is
printed with its source. ``--check`` fits the unit costs of this machine to the single-rank runs marked as calibration,
and prints how far the predictions of all other runs are off: steps on made-up or the built-in task's images, and new
weights on their way to the engine, whose unit cost is fitted to the syncs of one rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prism_megatron.config import ParallelConfig, SFTConfig, StageConfig, apply_overrides
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import Workload, training_flops
from recipes import qwen3_vl
from recipes.layouts import SIZES
from recipes.memory import Memory, estimate, published_sizes
from recipes.step_time import Costs, Rows, StepTime, predict, read_costs
from tools import bench

_COSTS = Path(__file__).resolve().parents[1] / "recipes" / "costs" / "h100.json"
_DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """A layout and what it is predicted to take."""

    config: StageConfig
    memory: Memory
    step: StepTime
    tokens_per_second_per_gpu: float
    mfu: float

    def row(self) -> dict[str, Any]:
        parallel, step = self.config.parallel, self.step
        return {
            "tp": parallel.tensor_model_parallel_size,
            "pp": parallel.pipeline_model_parallel_size,
            "cp": parallel.context_parallel_size,
            "ep": parallel.expert_model_parallel_size,
            "etp": parallel.expert_tensor_parallel_size,
            "layers": _layers(parallel),
            "recompute": self.config.model.recompute,
            "tokens/s/GPU": round(self.tokens_per_second_per_gpu),
            "MFU": round(self.mfu, 3),
            "step s": round(step.total, 2),
            "compute s": round(step.compute, 2),
            "bubble s": round(step.bubble, 2),
            "communication s": round(step.communication, 2),
            "optimizer s": round(step.optimizer, 3),
            "refit s": round(step.refit, 2),
            "GB": round(self.memory.total / 1e9, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--costs", type=Path, default=_COSTS, help="unit costs, each with its source")
    parser.add_argument("--rows", type=int, help="of the global batch (the recipe's)")
    parser.add_argument("--image", default="1024x768", help="of each row, WIDTHxHEIGHT")
    parser.add_argument("--text-tokens", type=int, default=128, help="of each row's prompt, beside its image")
    parser.add_argument("--response-tokens", type=int, default=1024, help="of each row")
    parser.add_argument("--top", type=int, default=10, help="layouts shown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", nargs="+", type=Path, help="results of benchmarks on one machine; plan nothing")
    parser.add_argument("overrides", nargs="*", help="of the SFT recipe, for example max_tokens_per_microbatch=16384")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.check:
            from tools.plan_check import check

            print(check(arguments.check))
            return 0
        return plan(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(arguments: argparse.Namespace) -> int:
    costs = read_costs(arguments.costs)
    if arguments.nodes < 1:
        raise UserError(f"--nodes must be at least 1, got {arguments.nodes}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = published_sizes(arguments.model, Path(folder))
    config = apply_overrides(qwen3_vl.sft(arguments.model, "bf16"), arguments.overrides)
    config.global_batch_size = arguments.rows or config.global_batch_size
    rows = equal_rows(arguments, config, sizes)
    world_size = arguments.nodes * costs.ranks_per_node
    plans, reasons = ranked(config, sizes, rows, world_size, costs)
    if not plans:
        raise UserError(f"no layout of {world_size} GPUs can train {arguments.model}: {reasons[-1]}")
    shown = [found.row() for found in plans[: arguments.top]]
    if arguments.json:
        print(json.dumps({"assumed": json.loads(arguments.costs.read_text()), "layouts": shown}))
        return 0
    print(f"{arguments.model}, {world_size} GPUs, {rows.count} rows of {rows.tokens // rows.count} tokens a step;")
    print(f"{len(plans)} layouts fit, {len(reasons)} do not. On paper; assumed:")
    for name, cost in json.loads(arguments.costs.read_text()).items():
        print(f"  {name} {cost['value']:g}: {cost['source']}")
    print(as_table(shown))
    return 0


def equal_rows(arguments: argparse.Namespace, config: SFTConfig, sizes: HFSizes) -> Rows:
    """The global batch: every row an image, a prompt and a response of the sizes asked for."""
    ((width, height),) = bench.resolutions(arguments.image)
    merge = sizes.vision["spatial_merge_size"]
    unit = sizes.vision["patch_size"] * merge
    patches = max(round(width / unit), 1) * max(round(height / unit), 1) * merge**2
    length = arguments.text_tokens + patches // merge**2 + arguments.response_tokens
    if length > config.max_tokens_per_microbatch:
        raise UserError(
            f"a row of {length} tokens does not fit max_tokens_per_microbatch ({config.max_tokens_per_microbatch}); "
            "raise it"
        )
    count = config.global_batch_size
    return Rows(count, Workload([length] * count, [patches] * count, count * arguments.response_tokens))


def ranked(
    config: SFTConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs
) -> tuple[list[Plan], list[str]]:
    """Layouts that fit, fastest first, and why others do not."""
    plans, reasons = [], []
    for candidate in layouts(config, sizes):
        try:
            memory = estimate(candidate, world_size, sizes, sizes)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if memory.total > costs.memory_bytes:
            reasons.append(f"{memory.total / 1e9:.0f} GB a GPU, of {costs.memory_bytes / 1e9:.0f}")
            continue
        plans.append(of_layout(candidate, sizes, rows, world_size, costs, memory))
    return sorted(plans, key=lambda found: found.step.total), reasons


def of_layout(config: StageConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs, memory: Memory) -> Plan:
    step = predict(config, sizes, rows, world_size, costs, memory)
    flops = training_flops(sizes.text, sizes.vision, rows.work, config.model.freeze).model
    seconds = step.total * world_size
    return Plan(config, memory, step, rows.tokens / seconds, flops / seconds / costs.peak_flops)


def layouts(config: SFTConfig, sizes: HFSizes) -> Iterator[SFTConfig]:
    """Every product of degrees, with and without recomputation; most are refused later.

    Experts are whole or cut as the rest of a layer. Pipeline stages are equal where the layers divide.
    """
    experts = (1, 2, 4, 8, 16) if sizes.num_experts else (1,)
    for tp, pp, cp, ep, recompute in itertools.product(_DEGREES, _DEGREES, (1, 2, 4), experts, (False, True)):
        first, last = ends(sizes.text["num_hidden_layers"], pp)
        for etp in sorted({1, tp}) if sizes.num_experts else (1,):
            parallel = ParallelConfig(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                sequence_parallel=tp > 1,
            )
            yield dataclasses.replace(
                config, parallel=parallel, model=dataclasses.replace(config.model, recompute=recompute)
            )


def ends(layers: int, stages: int) -> tuple[int, int]:
    """Layers of the first and last pipeline stage, which also hold the vision tower and the head; 0: all equal."""
    if layers % stages == 0:
        return 0, 0
    left = layers - math.ceil(layers / stages) * (stages - 2)
    return left // 2, left - left // 2


def _layers(parallel: ParallelConfig) -> str:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    return f"{first}..{last}" if first else "even"


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    sys.exit(main())
