"""Benchmark the memory of training ranks, and compare it with ``recipes/estimate/memory.py``.

    python -m tools.bench.memory --ranks 2 [--out NEW.json] [model.recompute=true ...]

Each case is a layout or a setting. Weights, gradients and optimizer are the resident tensors; ``activations`` is the
peak of further allocations in the second step, as counted by torch's profiler on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.config import SFTConfig
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.errors import UserError
from recipes.estimate.activations import Load
from recipes.estimate.memory import stage_estimates
from tools.bench import harness
from tools.bench.inputs import Settings, make_model, model_sizes, training_sequences

if TYPE_CHECKING:
    from prism_megatron.data.pack import TrainingSequence

PARTS = ("weights", "gradients", "optimizer", "activations")
CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "recompute": ("model.recompute=true",),
    "frozen vision": ("model.freeze=[vision,merger]",),
    "distributed optimizer": ("optimizer.use_distributed_optimizer=true",),
    "bf16": ("model.precision=bf16", "optimizer.use_distributed_optimizer=true"),
    "tensor parallel": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "pipeline parallel": ("parallel.pipeline_model_parallel_size=2", "max_tokens_per_microbatch=1024"),
    "context parallel": ("parallel.context_parallel_size=2",),
    "expert parallel": ("parallel.expert_model_parallel_size=2",),  # of the model with experts
    "expert-tensor parallel": ("parallel.expert_tensor_parallel_size=2",),  # of the same model
}
_MARK = "prism_second_step"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start on this machine; the cases need 2")
    parser.add_argument("--cases", default=",".join(CASES), help="names of cases, separated by commas")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe in every case")
    arguments = parser.parse_intermixed_args()
    import torch

    if torch.cuda.is_available():
        print("error: allocations are counted on a CPU only; set CUDA_VISIBLE_DEVICES to nothing", file=sys.stderr)
        return 2
    try:
        if unknown := set(arguments.cases.split(",")) - CASES.keys():
            raise UserError(f"--cases has {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
        if "RANK" not in os.environ:
            return harness.start_ranks(arguments.ranks, "tools.bench.memory")
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments.cases.split(","), arguments.overrides, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result:
        harness.write(result, arguments.out)
    return 0


def measure(cases: Sequence[str], overrides: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """Return measured and estimated bytes of every rank by case; None on all ranks but the first."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from prism_megatron.parallel import groups
    from prism_megatron.parallel.collectives import gather_over_ranks

    rows = {}
    for case in cases:
        size = "mid_moe" if case.startswith("expert") else "mid"
        settings = Settings(
            size=size,
            images="mock",
            resolutions=((256, 256),),
            response_tokens=416,
            overrides=("global_batch_size=8", *CASES[case], *overrides),
        )
        local_result = measure_case(settings, folder / size)
        of_ranks = gather_over_ranks(local_result)
        keys = ("stage", "measured", "estimated")
        rows[case] = [dict(zip(keys, result, strict=True)) for result in of_ranks]
        dist.barrier()
        parallel_state.destroy_model_parallel()
    is_main, ranks = groups.is_main_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if not is_main:
        return None
    return {
        "benchmark": "memory",
        "config": {"overrides": list(overrides)},
        "ranks": ranks,
        "cases": rows,
    } | harness.provenance()


def measure_case(settings: Settings, folder: Path) -> tuple[int, dict[str, int], dict[str, float]]:
    """Return pipeline stage, measured bytes and estimated bytes of this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.profiler import ProfilerActivity, profile, record_function

    from prism_megatron.parallel import groups
    from prism_megatron.stages.setup import load_policy, load_processor
    from tools.bench.stages import sft_training

    config = make_model(settings, folder, batches=1)
    assert isinstance(config, SFTConfig)
    processor = load_processor(config)
    rows = training_sequences(settings, config, processor, config.global_batch_size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        policy = load_policy(config)
        step = sft_training(policy, config, processor)
        step(rows)
        with record_function(_MARK):
            step(rows)
    found = resident(policy) | {"activations": _peak_over_mark(profiler)}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    sizes = model_sizes(settings.size)
    local_rows = shard_for_rank(list(range(len(rows))), groups.data_parallel_rank(), groups.data_parallel_size())
    load = load_of([rows[i] for i in local_rows], config)
    estimated = stage_estimates(config, dist.get_world_size(), sizes, sizes, load)[stage]
    return stage, found, {part: getattr(estimated, part) for part in PARTS}


def load_of(rows: Sequence[TrainingSequence], config: SFTConfig) -> Load:
    """Return the largest micro-batch of a rank, and their number."""
    from prism_megatron.data.pack import split_by_tokens
    from prism_megatron.stages.batcher import workload

    works = [workload([rows[i] for i in group]) for group in split_by_tokens(rows, config.max_tokens_per_microbatch)]
    largest = max(works, key=lambda work: sum(work.sequence_lengths))
    return Load(
        sum(largest.sequence_lengths), sum(largest.frame_patches), largest.scored_tokens, len(works), imbalance=1.0
    )


def resident(policy: Any) -> dict[str, int]:
    """Return the bytes of the tensors that outlive a step."""
    import torch

    weights = {p.untyped_storage().data_ptr(): p for chunk in policy.chunks for p in chunk.parameters()}
    buffers = [b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    inner = [optimizer.optimizer for optimizer in optimizers if optimizer.optimizer is not None]
    states = [t for o in inner for state in o.state.values() for t in state.values() if torch.is_tensor(t)]
    trained = [p for o in inner for group in o.param_groups for p in group["params"]]
    copies = [p for p in trained if p.untyped_storage().data_ptr() not in weights]
    return {
        "weights": sum(p.untyped_storage().nbytes() for p in weights.values()),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": sum(t.nbytes for t in (*states, *copies)),
    }


def _peak_over_mark(profiler: Any) -> int:
    """Return the peak of the bytes in use after the mark, beyond those in use at it."""
    events = profiler.profiler.kineto_results.events()
    start_time = next(event.start_ns() for event in events if event.name() == _MARK)
    total = at_mark = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        if event.start_ns() < start_time:
            at_mark = peak = total
        peak = max(peak, total)
    return peak - at_mark


if __name__ == "__main__":
    sys.exit(main())
