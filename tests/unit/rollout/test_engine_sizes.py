"""An engine that a model cannot be cut for is refused, by the size that does not fit, before vLLM is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.rollout.interface import EngineConfig

PUBLISHED = Path(__file__).parents[3] / "recipes" / "published"


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            {},
            r"num_attention_heads \(6\) of text_config must be divisible by rollout",
        ),
        ({"intermediate_size": 6}, {}, r"intermediate_size \(6\) of text_config"),
        ({"moe_intermediate_size": 10}, {}, r"moe_intermediate_size \(10\) of text_config"),
        ({}, {"num_heads": 6, "hidden_size": 96}, r"num_heads \(6\) of vision_config"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, {}, r"num_key_value_heads \(6\) must be a multiple of"),
        ({"head_dim": 64}, {}, r"mrope_section \[24, 20, 20\] must add up to half of head_dim \(64\) for vLLM"),
    ],
)
def test_sizes(text: dict[str, int], vision: dict[str, int], message: str, tmp_path: Path) -> None:
    written = json.loads((PUBLISHED / "2b.json").read_text())
    written["text_config"] |= text
    written["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = EngineConfig(
        tensor_parallel_size=4,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=1,
        kv_cache_gib=1,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        seed=1,
    )
    with pytest.raises(ValueError, match=message):
        RolloutEngine(tmp_path, config)
