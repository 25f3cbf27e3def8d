"""Benchmark the training part of a stage: tokens and operations per second of one iteration, and time by part.

    python -m tools.bench.train --recipe tiny --vs hf [--images mock --resolutions 64x64,128x96] [--compare OLD.json]
    python -m tools.bench.train --recipe tiny_align [prompts_per_iteration=4 rollout.samples_per_prompt=16]
    python -m tools.bench.train --recipe rlvr_dapo_qwen3_vl_2b_1n8g_h100_bf16 --size 2b --images mock --ranks 8
    python -m tools.bench.train --ranks 2 parallel.tensor_model_parallel_size=2
    python -m tools.bench.train --out runs/sweep --sweep ranks=1,2 --sweep model.recompute=false,true

The recipe may be of any stage that trains. ``tools/bench/stages.py`` defines the measured part of its iteration and
its tokens, ``tools/bench/synthetic_rollouts.py`` the responses. An SFT step starts from encoded rows and includes
packing, forward, backward and optimizer. ``--vs hf`` also measures HF transformers with torch's AdamW on the same rows,
padded, in the same run. Steps of both sides alternate, so that a busy machine slows both; medians and their ratio are
printed as one JSON line. Further steps are split by Megatron's timers, and by the stage's own (``phases``) if it has
several phases.

Operations are those of all passes of a step (``tools/bench/passes.py``). MFU, and HFU (with recomputed operations), are
null if the device's peak is unknown. Weights are random: the tiny model's, or of any ``--size``. ``--images`` selects
the images: ``shapes`` for the built-in task, ``mock`` for random pixels of the given sizes, or a directory of PNG and
JPEG files. ``--ranks`` starts processes on this machine; omit it under torchrun or srun.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.config import SFTConfig
from prism_megatron.errors import UserError
from prism_megatron.observe import metrics as names
from prism_megatron.observe.flops import peak_flops
from tools.bench import harness
from tools.bench.inputs import BATCHES, Settings, TrainingConfig, make_model

if TYPE_CHECKING:
    from tools.bench.stages import Done, Training

_METRICS = (  # of the first step; rewards and scores of synthetic responses are meaningless
    *(names.LOSS, names.POLICY_LOSS, names.ENTROPY, names.REFERENCE_KL, names.GRAD_NORM),
    *(names.DISCRIMINATOR_LOSS, names.DISCRIMINATOR_GRAD_NORM),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="of any stage that trains, or a family of SFT recipes")
    parser.add_argument("--size", default="tiny", help="of the random model: tiny, mid, 8b, or a JSON file")
    parser.add_argument("--discriminator-size", help="of the model that is upcycled (default: the policy's)")
    parser.add_argument("--images", default="shapes", help="shapes, mock, or a directory of images")
    parser.add_argument("--resolutions", default="64x64,128x96", help="WIDTHxHEIGHT of mock images, in rotation")
    parser.add_argument("--response-tokens", type=int, default=96, help="of a mock row or a synthetic response")
    parser.add_argument("--vs", choices=["hf"], help="measure HF transformers on the same rows too; SFT only")
    parser.add_argument("--ranks", type=int, help="ranks to start on this machine")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 2")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument(
        "--sweep", action="append", metavar="KEY=V,W", help="one run per combination, in the folder --out"
    )
    harness.add_output_options(parser)
    parser.add_argument("overrides", nargs="*", help="of the recipe, for example global_batch_size=8")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.sweep:
            from tools.bench.sweep import sweep

            return sweep(arguments.sweep, arguments)
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2:
        raise UserError(f"--steps must be at least 2 for a median and a p90, got {arguments.steps}")
    if arguments.ranks is not None and "RANK" not in os.environ:
        return harness.start_ranks(arguments.ranks, "tools.bench.train")
    settings = Settings(
        arguments.recipe,
        arguments.size,
        arguments.images,
        harness.resolutions(arguments.resolutions),
        arguments.response_tokens,
        tuple(arguments.overrides),
        arguments.steps,
        arguments.warmup,
        arguments.vs == "hf",
        arguments.discriminator_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    if result is None:
        return 0
    return harness.finish(result, arguments, ["ours.tokens_per_second", "ours_over_hf"])


@dataclass(frozen=True)
class Prepared:
    """Training part of a stage, and a step of each side. The process groups are open and must be shut down."""

    config: TrainingConfig
    training: Training
    sides: dict[str, Callable[[int], Done]]


def prepare(settings: Settings, folder: Path) -> Prepared:
    """Make models and data in rank 0's ``folder`` and build both sides. Raises UserError for invalid settings."""
    config = make_model(settings, folder, batches=BATCHES)
    from prism_megatron.stages.setup import load_processor
    from tools.bench.stages import Done, load_training

    processor = load_processor(config)
    training = load_training(settings, config, processor)
    sides = {"ours": training.step}
    if settings.vs_hf:
        from tools.bench.hf_step import hf_model, hf_step

        assert isinstance(config, SFTConfig)
        step = hf_step(config, processor.input_spec, hf_model(config))
        sides["hf"] = lambda number: Done({names.LOSS: step(training.rows[number % BATCHES])}, [])
    return Prepared(config, training, sides)


def measure(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """Measure seconds, tokens and operations per second of each side. Returns None on all ranks but the first."""
    import torch.distributed as dist

    from prism_megatron.parallel import groups
    from prism_megatron.parallel.collectives import gather_over_ranks, sum_over_data_parallel
    from tools.bench.passes import operations

    prepared = prepare(settings, folder)
    training, sides = prepared.training, prepared.sides
    done: dict[str, list[Done]] = {name: [] for name in sides}

    def run_one(name: str, number: int) -> None:
        done[name].append(sides[name](number))

    seconds = harness.interleaved({name: partial(run_one, name) for name in sides}, settings.steps, settings.warmup)
    slowest = {
        name: [max(of_step) for of_step in zip(*gather_over_ranks(values), strict=True)]
        for name, values in seconds.items()
    }
    peaks = gather_over_ranks(harness.peak_bytes())
    measured = range(settings.warmup, settings.warmup + settings.steps)
    sizes = {name: model.sizes for name, model in training.models.items()}
    local_flops = [operations(done["ours"][number].passes, prepared.config, sizes) for number in measured]
    flops = [sum_over_data_parallel(*of_step) for of_step in local_flops]
    work = Work([training.tokens[number % BATCHES] for number in measured], *map(list, zip(*flops, strict=True)))
    parts = gather_over_ranks(split(prepared))
    ranks, is_main = dist.get_world_size(), groups.is_main_rank()
    groups.shutdown()
    if not is_main:
        return None
    result: dict[str, Any] = {"benchmark": "train", "stage": prepared.config.stage, "config": _as_json(settings)}
    result |= {"ranks": ranks, **harness.provenance(), "tokens_per_step": statistics.mean(work.tokens)}
    result["encode_seconds_per_row"] = training.encode_seconds
    result["peak_bytes_of_all_sides"] = peaks
    for name, values in slowest.items():
        first = done[name][0].metrics
        metrics = {key: first[key] for key in _METRICS if first.get(key) is not None}
        result[name] = speed(work, values, ranks) | {"first_loss": first[training.loss], "first_step": metrics}
    result["ours"] |= with_recomputed(work, result["ours"]["mfu"]) | _means(parts)
    if settings.vs_hf:
        result["ours_over_hf"] = result["ours"]["tokens_per_second"] / result["hf"]["tokens_per_second"]
    return result


def split(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Return mean seconds of this rank's step by part, and by the stage's own phases, over one step per batch."""
    from tools.bench.step_timers import StepTimers

    timers, training = StepTimers(), prepared.training
    for model in training.models.values():
        timers.attach(model)
    training.timers.pop()
    for number in range(BATCHES):
        timers.begin_step()
        training.step(number)
        timers.end_step()
    phases = training.timers.pop()
    parts = {"split": timers.mean(BATCHES)}
    return parts | (
        {"phases": {name.removeprefix("seconds_"): seconds / BATCHES for name, seconds in phases.items()}}
        if phases
        else {}
    )


@dataclass(frozen=True)
class Work:
    """Work of the measured steps on all ranks: tokens, necessary operations, and operations with recomputed ones."""

    tokens: list[int]
    flops: list[float]
    hardware_flops: list[float]


def speed(work: Work, seconds: Sequence[float], ranks: int) -> dict[str, Any]:
    """Return tokens and operations per second of one side, from its measured steps."""
    per_token = harness.median_and_p90([s / tokens for s, tokens in zip(seconds, work.tokens, strict=True)])
    rate = 1 / statistics.median([s / flops for s, flops in zip(seconds, work.flops, strict=True)])
    peak = peak_flops(harness.hardware())
    return {
        "tokens_per_second": 1 / per_token["median"],
        "tokens_per_second_per_rank": 1 / per_token["median"] / ranks,
        "tokens_per_second_p90_slowest": 1 / per_token["p90"],
        "step_seconds": harness.median_and_p90(seconds),
        "flops_per_step": statistics.mean(work.flops),
        "tflops_per_rank": rate / ranks / 1e12,
        "mfu": rate / ranks / peak if peak else None,
    }


def with_recomputed(work: Work, mfu: float | None) -> dict[str, Any]:
    """Return the operations with recomputed ones (logits, and layers if the recipe says so), and HFU."""
    hardware = statistics.mean(work.hardware_flops)
    hfu = None if mfu is None else mfu * hardware / statistics.mean(work.flops)
    return {"hardware_flops_per_step": hardware, "hfu": hfu}


def _means(of_ranks: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean of each part over ranks; a rank without the part counts as zero."""
    means = {}
    for kind in of_ranks[0]:
        keys = sorted({key for of_rank in of_ranks for key in of_rank[kind]})
        means[kind] = {key: statistics.mean(of_rank[kind].get(key, 0.0) for of_rank in of_ranks) for key in keys}
    return means


def _as_json(settings: Settings) -> dict[str, Any]:
    """Return the settings as JSON, without None, so that older baselines compare equal."""
    lists = {"resolutions": [list(size) for size in settings.resolutions], "overrides": list(settings.overrides)}
    return {key: value for key, value in (asdict(settings) | lists).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
