"""Checks of parallel degrees against model sizes. Imports neither torch nor Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.config import ParallelConfig
from prism_megatron.errors import UserError


@dataclass(frozen=True)
class ModelDegrees:
    """Model sizes that parallel degrees must divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    vision_heads: int
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int = 0


def check_degrees(parallel: ParallelConfig, world_size: int, model: ModelDegrees) -> None:
    """Raise UserError for degrees that do not divide the world size or the model's sizes."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    for name, size in vars(parallel).items():
        if name.endswith("_parallel_size") and size < 1:
            raise UserError(f"parallel.{name} must be at least 1, got {size}")
    if world_size % (tp * pp * cp):
        raise UserError(
            f"world size {world_size} is not a multiple of tensor ({tp}) x pipeline ({pp}) x context ({cp}) parallel "
            f"sizes; start a multiple of {tp * pp * cp} ranks or lower a degree"
        )
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups),
        ("vision num_heads", model.vision_heads),
    ):
        _check_divides(name, count, "tensor_model_parallel_size", tp)
    _check_layer_split(parallel, model.num_layers)
    if model.num_moe_experts is None:
        if ep > 1:
            raise UserError(f"parallel.expert_model_parallel_size ({ep}) needs a mixture-of-experts model; use 1")
        return
    _check_divides("num_moe_experts", model.num_moe_experts, "expert_model_parallel_size", ep)
    etp = parallel.expert_tensor_parallel_size
    _check_divides("moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor_parallel_size", etp)
    if world_size % (etp * ep * pp):
        raise UserError(
            f"world size {world_size} is not a multiple of expert tensor ({etp}) x expert model ({ep}) x pipeline "
            f"({pp}) parallel sizes; lower one of them"
        )


def _check_layer_split(parallel: ParallelConfig, num_layers: int) -> None:
    """Raise UserError for a split of the layers that is uneven or leaves a pipeline stage without layers."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1 and (vpp > 1 or first or last):
        raise UserError(
            f"virtual_pipeline_model_parallel_size ({vpp}) and num_layers_in_first/last_pipeline_stage ({first}, "
            f"{last}) need pipeline_model_parallel_size above 1; leave them at 1 and 0"
        )
    middle_stages, middle_layers = pp - bool(first) - bool(last), num_layers - first - last
    if middle_layers < middle_stages or (middle_layers and not middle_stages) or min(first, last) < 0:
        raise UserError(
            f"num_layers ({num_layers}) minus num_layers_in_first_pipeline_stage ({first}) and "
            f"num_layers_in_last_pipeline_stage ({last}) leaves {middle_layers} for {middle_stages} other stages; "
            "each needs at least one and every layer a stage"
        )
    if middle_stages and middle_layers % middle_stages:
        if not first and not last:
            _check_divides("num_layers", num_layers, "pipeline_model_parallel_size", pp)
        raise UserError(
            f"{middle_layers} layers do not divide over {middle_stages} middle pipeline stages; "
            f"move {middle_layers % middle_stages} of them to the first or last stage"
        )
    per_stage = {count for count in (first, last, middle_layers // middle_stages if middle_stages else 0) if count}
    for count in sorted(per_stage):
        _check_divides("layers of a pipeline stage", count, "virtual_pipeline_model_parallel_size", vpp)


def _check_divides(name: str, count: int, degree_name: str, degree: int) -> None:
    if count % degree:
        largest = max(d for d in range(1, min(degree, count) + 1) if count % d == 0)
        raise UserError(f"{name} ({count}) must be divisible by {degree_name} ({degree}); use {largest} or less")


def check_engine_ranks(data_parallel_ranks: Sequence[int], engine_size: int) -> None:
    """Raise UserError if the ranks of a tensor-parallel engine do not have the same rows.

    An engine is split over ``engine_size`` consecutive ranks, which must be of one data-parallel rank.
    ``data_parallel_ranks`` has the data-parallel rank of every rank.
    """
    world_size = len(data_parallel_ranks)
    if world_size % engine_size:
        raise UserError(
            f"world size {world_size} is not a multiple of rollout.tensor_model_parallel_size ({engine_size}); use a "
            "divisor"
        )
    for first in range(0, world_size, engine_size):
        found = sorted(set(data_parallel_ranks[first : first + engine_size]))
        if len(found) > 1:
            raise UserError(
                f"rollout.tensor_model_parallel_size ({engine_size}) would split one engine over ranks {first} to "
                f"{first + engine_size - 1}, which have different rows (data-parallel ranks {found}); use "
                "parallel.tensor_model_parallel_size or a divisor of it"
            )
