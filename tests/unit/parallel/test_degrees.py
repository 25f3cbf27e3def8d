"""Parallel degrees that do not fit are refused with a remedy."""

from __future__ import annotations

import pytest

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel.degrees import ModelDegrees, check_degrees, check_engine_ranks

SIZES = {"num_layers": 8, "num_attention_heads": 16, "num_query_groups": 8, "vision_heads": 16}
DENSE = ModelDegrees(**SIZES)
MOE = ModelDegrees(**SIZES, num_moe_experts=4, moe_ffn_hidden_size=30)


@pytest.mark.parametrize(
    ("parallel", "world", "model", "message"),
    [
        (
            {"tensor_model_parallel_size": 16},
            16,
            DENSE,
            "num_query_groups (8) must be divisible by tensor_model_parallel_size (16); use 8 or less",
        ),
        ({"tensor_model_parallel_size": 2}, 3, DENSE, "world size 3 is not a multiple of tensor (2)"),
        ({"tensor_model_parallel_size": 0}, 1, DENSE, "tensor_model_parallel_size must be at least 1, got 0"),
        ({"expert_model_parallel_size": 2}, 2, DENSE, "expert_model_parallel_size (2) needs a mixture-of-experts"),
        (
            {"expert_model_parallel_size": 3},
            3,
            MOE,
            "num_moe_experts (4) must be divisible by expert_model_parallel_size (3); use 2 or less",
        ),
        (
            {"expert_tensor_parallel_size": 4},
            4,
            MOE,
            "moe_ffn_hidden_size (30) must be divisible by expert_tensor_parallel_size (4); use 3 or less",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            3,
            DENSE,
            "num_layers (8) must be divisible by pipeline_model_parallel_size (3); use 2 or less",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            2,
            DENSE,
            "layers of a pipeline stage (4) must be divisible by virtual_pipeline_model_parallel_size (3); use 2",
        ),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 1},
            4,
            DENSE,
            "7 layers do not divide over 3 middle pipeline stages; move 1 of them to the first or last stage",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 3,
                "num_layers_in_last_pipeline_stage": 3,
            },
            2,
            DENSE,
            "leaves 2 for 0 other stages; each needs at least one and every layer a stage",
        ),
        ({"num_layers_in_first_pipeline_stage": 3}, 1, DENSE, "need pipeline_model_parallel_size above 1"),
    ],
)
def test_refused(parallel: dict[str, int], world: int, model: ModelDegrees, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_degrees(ParallelConfig(**parallel), world, model)
    assert message in str(error.value)


def test_accepted() -> None:
    check_degrees(ParallelConfig(tensor_model_parallel_size=8), 16, DENSE)
    check_degrees(ParallelConfig(pipeline_model_parallel_size=8), 8, DENSE)
    uneven = {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2}
    check_degrees(ParallelConfig(pipeline_model_parallel_size=4, **uneven), 4, DENSE)
    check_degrees(ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4, MOE)


def test_an_engine_is_split_over_ranks_with_the_same_rows() -> None:
    tp2, pp2, dp2 = [0, 0, 1, 1], [0, 1, 0, 1], [0, 1]
    check_engine_ranks(tp2, 1)
    check_engine_ranks(tp2, 2)
    check_engine_ranks([0, 0], 2)  # two pipeline stages, one engine
    check_engine_ranks(pp2, 1)
    with pytest.raises(ValueError, match=r"over ranks 0 to 3, which have different rows \(data-parallel ranks \[0, 1"):
        check_engine_ranks(tp2, 4)
    for ranks in (pp2, dp2):
        with pytest.raises(ValueError, match="or a divisor of it"):
            check_engine_ranks(ranks, 2)
    with pytest.raises(ValueError, match=r"world size 4 is not a multiple of .* \(3\); use a divisor"):
        check_engine_ranks(tp2, 3)
