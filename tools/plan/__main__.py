"""Predict the time and memory of an SFT step for every parallel layout, fastest first.

    python -m tools.plan --model 8b --nodes 2 [--costs recipes/estimate/costs/h100.json] [--image 1024x768] [--json]
    python -m tools.plan --check tools/bench/baselines/*.json

``recipes/estimate/memory.py`` and ``recipes/estimate/step_time.py`` state their assumptions; each unit cost is printed
with its source. ``--check`` fits the unit costs of the machine that wrote the results to the single-rank runs named
``train_calibrate*``, and prints the error of the predictions of all other runs and of the weight syncs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_megatron.config import SFTConfig, apply_overrides
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import Workload
from recipes import qwen3_vl
from recipes.estimate.memory import published_sizes
from recipes.estimate.step_time import COSTS, Rows, read_costs
from recipes.layouts import SIZES
from tools.bench import harness
from tools.plan.layouts import ranked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--costs", type=Path, default=COSTS / "h100.json", help="unit costs, each with its source")
    parser.add_argument("--rows", type=int, help="of the global batch (default: the recipe's)")
    parser.add_argument("--image", default="1024x768", help="WIDTHxHEIGHT of each row's image")
    parser.add_argument("--text-tokens", type=int, default=128, help="of each row's prompt, without its image")
    parser.add_argument("--response-tokens", type=int, default=1024, help="of each row")
    parser.add_argument("--top", type=int, default=10, help="number of layouts to print")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", nargs="+", type=Path, help="results on one machine; predict these only")
    parser.add_argument("overrides", nargs="*", help="of the SFT recipe, for example max_tokens_per_microbatch=16384")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.check:
            from tools.plan.check import check

            print(check(arguments.check))
            return 0
        return plan(arguments)
    except UserError as error:
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
    table = [found.row() for found in plans[: arguments.top]]
    if arguments.json:
        print(json.dumps({"assumed": json.loads(arguments.costs.read_text()), "layouts": table}))
        return 0
    print(f"{arguments.model}, {world_size} GPUs, {rows.count} rows of {rows.tokens // rows.count} tokens a step;")
    print(f"{len(plans)} layouts fit, {len(reasons)} do not. Predicted with these costs:")
    for name, cost in json.loads(arguments.costs.read_text()).items():
        print(f"  {name} {cost['value']:g}: {cost['source']}")
    print(as_table(table))
    return 0


def equal_rows(arguments: argparse.Namespace, config: SFTConfig, sizes: HFSizes) -> Rows:
    """Return the global batch: every row has an image, a prompt and a response of the requested sizes."""
    ((width, height),) = harness.resolutions(arguments.image)
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


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    sys.exit(main())
