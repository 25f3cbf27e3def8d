"""Parallel layouts of an SFT step, and the predicted time and memory of each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prism_megatron.config import ParallelConfig, SFTConfig, TrainingConfig
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import training_flops
from recipes.estimate.memory import Memory, estimate
from recipes.estimate.step_time import Costs, Rows, StepTime, predict

_DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """Layout with its predicted memory, step time, speed and MFU."""

    config: TrainingConfig
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
            "weight sync s": round(step.weight_sync, 2),
            "GB": round(self.memory.total / 1e9, 1),
        }


def ranked(
    config: SFTConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs
) -> tuple[list[Plan], list[str]]:
    """Return the layouts that fit, fastest first, and the reasons why others do not."""
    plans, reasons = [], []
    for candidate in layouts(config, sizes):
        try:
            memory = estimate(candidate, world_size, sizes, sizes)
        except UserError as error:
            reasons.append(str(error))
            continue
        if memory.total > costs.memory_bytes:
            reasons.append(f"{memory.total / 1e9:.0f} GB a GPU, of {costs.memory_bytes / 1e9:.0f}")
            continue
        plans.append(of_layout(candidate, sizes, rows, world_size, costs, memory))
    return sorted(plans, key=lambda found: found.step.total), reasons


def of_layout(
    config: TrainingConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs, memory: Memory
) -> Plan:
    step = predict(config, sizes, rows, world_size, costs, memory)
    flops = training_flops(sizes.text, sizes.vision, rows.work, config.model.freeze).model
    seconds = step.total * world_size
    return Plan(config, memory, step, rows.tokens / seconds, flops / seconds / costs.peak_flops)


def layouts(config: SFTConfig, sizes: HFSizes) -> Iterator[SFTConfig]:
    """Yield every product of degrees, with and without recomputation; most do not fit.

    Experts are unsharded or sharded like the rest of a layer. Pipeline stages are equal if the layers divide.
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
    """Return layers of the first and last pipeline stage, which also have vision tower and output layer; 0: equal."""
    if layers % stages == 0:
        return 0, 0
    left = layers - math.ceil(layers / stages) * (stages - 2)
    return left // 2, left - left // 2


def _layers(parallel: ParallelConfig) -> str:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    return f"{first}..{last}" if first else "even"
