"""Requirements of FP8 on the machine and on model sizes are checked before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.config import FP8Config, ModelConfig, ParallelConfig
from prism_megatron.model.fp8 import check_hardware, check_sizes, megatron_settings

CONFIGS = Path(__file__).parents[3] / "recipes" / "published"


def fp8(recipe: str = "tensorwise", first: int = 0, last: int = 0) -> ModelConfig:
    return ModelConfig("", precision="fp8", fp8=FP8Config(recipe, first, last))


def sizes(name: str = "4b", **text: Any) -> Any:
    from prism_megatron.model.sizes import HFSizes

    config = json.loads((CONFIGS / f"{name}.json").read_text())
    return HFSizes(config["text_config"] | text, config["vision_config"], True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 may run on this machine")
def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.precision fp8 needs Transformer Engine on a GPU; use bf16 or fp32"):
        check_hardware(fp8())
    check_hardware(ModelConfig("", precision="bf16"))


@pytest.mark.parametrize("name", ["2b", "4b", "8b", "32b", "30b_a3b", "235b_a22b"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_published_sizes_run_up_to_four_tensor_parallel_ranks(name: str, recipe: str) -> None:
    for degree in (1, 2, 4):
        check_sizes(fp8(recipe), ParallelConfig(tensor_model_parallel_size=degree), sizes(name))


@pytest.mark.parametrize(
    ("model", "parallel", "text", "upcycled", "message"),
    [
        (
            fp8(),
            {"tensor_model_parallel_size": 2},
            {},
            False,
            "linear_fc2's input (4304, over 2 tensor-parallel ranks)",
        ),
        (fp8("mxfp8"), {}, {}, False, "(4304, over 1 tensor-parallel ranks) must be a multiple of 32 on each"),
        (fp8(), {"expert_tensor_parallel_size": 2}, {}, True, "the experts' linear_fc2 input (4304, over 2"),
        (fp8(), {}, {"hidden_size": 2568}, False, "hidden_size of every layer (2568, over 1"),
        (fp8(), {}, {"head_dim": 129, "num_key_value_heads": 9}, False, "linear_qkv's output (6450, over 1"),
        (fp8(first=37), {}, {}, False, "model.fp8.first_layers_bf16 (37) must be at most the 36 layers"),
        (fp8(last=10), {"pipeline_model_parallel_size": 4}, {}, False, "last_layers_bf16 (10) must be at most the 9"),
    ],
)
def test_layer_and_size_are_named(
    model: ModelConfig, parallel: dict[str, int], text: dict[str, int], upcycled: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sizes(model, ParallelConfig(**parallel), sizes(**{"intermediate_size": 4304} | text), upcycled)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_takes_the_settings_for_the_decoder_only(recipe: str) -> None:
    from prism_megatron.model.build import text_config, vision_config

    model = fp8(recipe, 0 if recipe == "delayed" else 2, 0)
    config = text_config(model, ParallelConfig(), sizes(), {}, torch.device("cpu"))
    assert (config.fp8_recipe, config.params_dtype) == (recipe, torch.bfloat16)
    assert config.fp8 == ("e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid")
    assert config.first_last_layers_bf16 == (recipe != "delayed")
    vision = vision_config(model, ParallelConfig(), sizes(), torch.device("cpu"))
    assert vision.fp8 is None
    assert vision.params_dtype == torch.bfloat16
    assert megatron_settings(ModelConfig("", precision="bf16")) == {}
