"""The six published sizes, built on the meta device: our parameters correspond one to one to HF's."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from prism_megatron.config import ModelConfig, ParallelConfig

CONFIGS = Path(__file__).parents[3] / "recipes" / "published"
# Number of parameters in the published checkpoints' indexes, where known.
PUBLISHED = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}


@pytest.mark.parametrize("size", ["2b", "4b", "8b", "32b", "30b_a3b", "235b_a22b"])
def test_same_parameters_as_hf(size: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import named_parameters
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import read_sizes

    shutil.copy(CONFIGS / f"{size}.json", tmp_path / "config.json")
    sizes = read_sizes(tmp_path)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
        ours = named_parameters(build_policy(ModelConfig(str(tmp_path)), ParallelConfig(), sizes))
    rules = {rule.megatron: rule for rule in policy_table(sizes) if not rule.tied}
    assert ours.keys() == rules.keys()
    for name, parameter in ours.items():
        assert parameter.numel() == rules[name].numel, name
    hf_sizes = {name: parameter.numel() for name, parameter in hf.named_parameters()}
    converted: dict[str, int] = {}
    for rule in rules.values():
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            converted[name] = math.prod(shape)
    assert converted == hf_sizes
    total = sum(parameter.numel() for parameter in ours.values())
    assert total == sum(hf_sizes.values())
    if size in PUBLISHED:
        assert total == PUBLISHED[size]


@pytest.mark.parametrize("size", ["8b", "30b_a3b"])
def test_freezing_names_every_tensor_of_a_part(size: str, tmp_path: Path) -> None:
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import read_sizes

    shutil.copy(CONFIGS / f"{size}.json", tmp_path / "config.json")
    sizes = read_sizes(tmp_path)
    trained: dict[str, set[str]] = {}
    for part in ("vision", "merger", "language_model"):
        with torch.device("meta"):
            (policy,) = build_policy(ModelConfig(str(tmp_path), freeze=[part]), ParallelConfig(), sizes)
        trained[part] = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    everything = {name for name, _ in policy.named_parameters()}
    assert set().union(*trained.values()) == everything
    assert sum(map(len, trained.values())) == len(everything), "a tensor belongs to two parts"
    assert all(re.match(r"vision\.(merger|deepstack_mergers)\.", name) for name in trained["merger"])
    assert {"vision.pos_embed.weight", "vision.patch_embed.bias"} <= trained["vision"]
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= trained["language_model"]
