"""How fast a training step is, beside HF transformers with torch's AdamW on the very same rows, in one run.

    python tools/bench_train.py --recipe tiny --vs hf [--images mock --resolutions 64x64,128x96] [--compare OLD.json]
    python tools/bench_train.py --ranks 2 parallel.tensor_model_parallel_size=2
    python tools/bench_train.py --out runs/sweep --sweep ranks=1,2 --sweep model.recompute=false,true

Each step starts from encoded rows: laying them out (packed here, padded there), forward, backward, optimizer. Steps of
both sides alternate, so that a busy machine slows both; medians and their ratio are printed as one JSON line. Further
steps are then split by Megatron's timers. MFU, and HFU (ours with what is computed twice), are null where the device's
peak is unknown. Weights are random: the tiny model's, or of any ``--size``. ``--images`` says what the rows show:
``shapes`` the built-in task, ``mock`` random pixels of the given sizes in turn, or a directory of PNG and JPEG files.
``--ranks`` starts as many processes here; under torchrun or srun it is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

from prism_megatron.config import SFTConfig
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.observe.flops import peak_flops, training_flops
from tools import bench
from tools.bench_inputs import Settings, make_model, resolutions, training_sequences
from tools.step_timers import StepTimers

_BATCHES = 4  # distinct ones, taken in turn
Step = Callable[[Sequence[TrainingSequence]], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="an SFT recipe, or the family of one")
    parser.add_argument("--size", default="tiny", help="of the random model: tiny, mid, 8b, or a JSON file")
    parser.add_argument("--images", default="shapes", help="shapes, mock, or a directory of images")
    parser.add_argument("--resolutions", default="64x64,128x96", help="of mock images, WIDTHxHEIGHT, taken in turn")
    parser.add_argument("--response-tokens", type=int, default=96, help="of a mock row")
    parser.add_argument("--vs", choices=["hf"], help="measure HF transformers on the same rows too")
    parser.add_argument("--ranks", type=int, help="processes to start here")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 2")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--sweep", action="append", metavar="KEY=V,W", help="several runs into the folder --out")
    bench.add_output_options(parser)
    parser.add_argument("overrides", nargs="*", help="of the recipe, for example global_batch_size=8")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.sweep:
            from tools.bench_sweep import sweep

            return sweep(arguments.sweep, arguments)
        return run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2:
        raise ValueError(f"--steps must be at least 2 for a median and a p90, got {arguments.steps}")
    if arguments.ranks is not None and "RANK" not in os.environ:
        return bench.start_ranks(arguments.ranks, ["tools/bench_train.py", *sys.argv[1:]])
    settings = Settings(
        arguments.recipe,
        arguments.size,
        arguments.images,
        resolutions(arguments.resolutions),
        arguments.response_tokens,
        tuple(arguments.overrides),
        arguments.steps,
        arguments.warmup,
        arguments.vs == "hf",
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    if result is None:
        return 0
    return bench.finish(result, arguments, ["ours.tokens_per_second", "ours_over_hf"])


@dataclass(frozen=True)
class Prepared:
    """Each side's training step, and the global batches it takes. Megatron's groups are open: shut them down at last.

    ``encode_seconds`` is what turning a row into tokens and patches took, before any step.
    """

    config: SFTConfig
    batches: list[list[TrainingSequence]]
    sides: dict[str, Step]
    policy: Any
    encode_seconds: float


def prepare(settings: Settings, folder: Path) -> Prepared:
    """Make model and data in rank 0's ``folder`` and build both sides. Raises ValueError for what cannot be run."""
    from prism_megatron.stages.setup import load_policy, load_processor

    config = make_model(settings, folder, batches=_BATCHES)
    size = config.global_batch_size
    processor = load_processor(config)
    began = time.perf_counter()
    sequences = training_sequences(settings, config, processor, size * _BATCHES)
    encode_seconds = (time.perf_counter() - began) / len(sequences)
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    policy = load_policy(config)
    sides = {"ours": our_step(policy, config, processor)}
    if settings.vs_hf:
        from tools.bench_hf import hf_model, hf_step

        sides["hf"] = hf_step(config, processor.input_spec, hf_model(config))
    return Prepared(config, batches, sides, policy, encode_seconds)


def our_step(policy: Any, config: SFTConfig, processor: Any) -> Step:
    """A step on this data-parallel rank's rows, the recipe's learning rate held."""
    from prism_megatron.data.loader import rank_share
    from prism_megatron.observe import metrics as names
    from prism_megatron.parallel import groups
    from prism_megatron.stages.policy import sft_step

    def step(batch: Sequence[TrainingSequence]) -> float:
        mine = rank_share(list(range(len(batch))), groups.data_parallel_rank(), groups.data_parallel_size())
        owners = [f"row {number}" for number in mine]
        loss = sft_step(policy, [batch[i] for i in mine], owners, processor, config, config.optimizer.lr)[names.LOSS]
        assert loss is not None
        return loss

    return step


def measure(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """Seconds, tokens and operations a second of each side; None on ranks but the first."""
    from prism_megatron.parallel import groups
    from prism_megatron.parallel.collectives import gather_over_ranks

    prepared = prepare(settings, folder)
    batches, sides = prepared.batches, prepared.sides
    losses: dict[str, float] = {}

    def counted(name: str) -> Callable[[int], None]:
        def run_one(number: int) -> None:
            loss = sides[name](batches[number % len(batches)])
            losses.setdefault(name, loss)

        return run_one

    seconds = bench.interleaved({name: counted(name) for name in sides}, settings.steps, settings.warmup)
    slowest = {
        name: [max(of_step) for of_step in zip(*gather_over_ranks(values), strict=True)]
        for name, values in seconds.items()
    }
    peaks = gather_over_ranks(bench.peak_bytes())
    parts = gather_over_ranks(split(prepared))
    ranks, is_main = dist.get_world_size(), groups.is_main_rank()
    groups.shutdown()
    if not is_main:
        return None
    result: dict[str, Any] = {"benchmark": "train", "config": _as_json(settings), "ranks": ranks, **bench.provenance()}
    result["tokens_per_step"] = statistics.mean(sum(map(len, batch)) for batch in batches)
    result["encode_seconds_per_row"] = prepared.encode_seconds
    result["peak_bytes_of_all_sides"] = peaks
    for name, values in slowest.items():
        result[name] = _speed(prepared, settings, values, ranks) | {"first_loss": losses[name]}
    result["ours"] |= with_recomputed(prepared, result["ours"]["mfu"])
    keys = {key for of_rank in parts for key in of_rank}
    result["ours"]["split"] = {key: statistics.mean(of_rank.get(key, 0.0) for of_rank in parts) for key in sorted(keys)}
    if settings.vs_hf:
        result["ours_over_hf"] = result["ours"]["tokens_per_second"] / result["hf"]["tokens_per_second"]
    return result


def split(prepared: Prepared) -> dict[str, float]:
    """Seconds of this rank's step by part: a mean over one step on each batch."""
    timers = StepTimers()
    timers.attach(prepared.policy)
    for batch in prepared.batches:
        timers.begin_step()
        prepared.sides["ours"](batch)
        timers.end_step()
    return timers.mean(len(prepared.batches))


def _speed(prepared: Prepared, settings: Settings, seconds: list[float], ranks: int) -> dict[str, Any]:
    """Tokens and operations a second of one side, from its measured steps."""
    from prism_megatron.stages.microbatch import workload

    sizes, batches = prepared.policy.sizes, prepared.batches
    freeze = prepared.config.model.freeze
    flops = [training_flops(sizes.text, sizes.vision, workload(batch), freeze).model for batch in batches]
    tokens = [sum(map(len, batch)) for batch in batches]
    measured = [number % len(batches) for number in range(settings.warmup, settings.warmup + settings.steps)]
    per_token = bench.median_and_p90([s / tokens[i] for s, i in zip(seconds, measured, strict=True)])
    rate = 1 / statistics.median([s / flops[i] for s, i in zip(seconds, measured, strict=True)])
    peak = peak_flops(bench.hardware())
    return {
        "tokens_per_second": 1 / per_token["median"],
        "tokens_per_second_per_rank": 1 / per_token["median"] / ranks,
        "tokens_per_second_p90_slowest": 1 / per_token["p90"],
        "step_seconds": bench.median_and_p90(seconds),
        "flops_per_step": statistics.mean(flops),
        "tflops_per_rank": rate / ranks / 1e12,
        "mfu": rate / ranks / peak if peak else None,
    }


def with_recomputed(prepared: Prepared, mfu: float | None) -> dict[str, Any]:
    """Operations of our step with those done twice (logits, and layers where the recipe says so), and HFU by them."""
    from prism_megatron.stages.microbatch import workload

    sizes, model = prepared.policy.sizes, prepared.config.model
    flops = [
        training_flops(sizes.text, sizes.vision, workload(batch), model.freeze, model.recompute)
        for batch in prepared.batches
    ]
    hardware = statistics.mean(step.hardware for step in flops)
    hfu = None if mfu is None else mfu * hardware / statistics.mean(step.model for step in flops)
    return {"hardware_flops_per_step": hardware, "hfu": hfu}


def _as_json(settings: Settings) -> dict[str, Any]:
    """As JSON reads it back: lists for tuples."""
    lists = {"resolutions": [list(size) for size in settings.resolutions], "overrides": list(settings.overrides)}
    return asdict(settings) | lists


if __name__ == "__main__":
    sys.exit(main())
