"""Parallel degrees that cannot work are refused with the remedy."""

from __future__ import annotations

import pytest

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel.groups import ModelDegrees, check_degrees

DENSE = ModelDegrees(num_layers=4, num_attention_heads=16, num_query_groups=8, vision_heads=16)
MOE = ModelDegrees(num_layers=4, num_attention_heads=16, num_query_groups=8, vision_heads=16, num_moe_experts=4)


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
        ({"pipeline_model_parallel_size": 2}, 2, DENSE, "pipeline_model_parallel_size (2) is not supported yet"),
    ],
)
def test_refused(parallel: dict[str, int], world: int, model: ModelDegrees, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_degrees(ParallelConfig(**parallel), world, model)
    assert message in str(error.value)


def test_accepted() -> None:
    check_degrees(ParallelConfig(tensor_model_parallel_size=8), 16, DENSE)
    check_degrees(ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4, MOE)
