"""Rotary angles of every supported setting equal those of transformers for the same config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism_megatron.model.rotary import mrope_cos_sin
from prism_megatron.model.sizes import HFSizes

SECTION = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
YARN = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 32768, **SECTION}
SETTINGS: dict[str, dict[str, Any]] = {
    "as transformers 5 writes it": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, **SECTION}},
    "as transformers 4 writes it": {"rope_scaling": {"rope_type": "default", **SECTION}, "rope_theta": 5e6},
    "as before rope_type": {"rope_scaling": {"type": "default", **SECTION}, "rope_theta": 1e6},
    "left out": {},
    "section left out": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "base left out": {"rope_parameters": {"rope_type": "default", **SECTION}},
    "another section": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}},
    "yarn": {"rope_parameters": YARN},
    "yarn, transformers 4": {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}, "rope_theta": 1e6},
    "yarn, original length left out": {
        "rope_parameters": {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    },
    "yarn, attention factor": {"rope_parameters": YARN | {"attention_factor": 0.7}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "yarn, short original": {"rope_parameters": YARN | {"original_max_position_embeddings": 64}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_angles_are_those_of_transformers(settings: dict[str, Any]) -> None:
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    text = {"head_dim": 128, "max_position_embeddings": 131072, **settings}
    module = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**text))
    positions = torch.stack((torch.arange(0, 900, 3), torch.arange(300) + 7, torch.arange(300).flip(0)))
    hf_angles = module(torch.zeros(1), positions[:, None].clone())
    rotary = HFSizes(text, {}, False).rotary
    for ours, reference in zip(mrope_cos_sin(positions, 128, rotary), hf_angles, strict=True):
        # Both round angles of up to 900 radians to float32.
        torch.testing.assert_close(ours[:, 0], reference[0], atol=2e-4, rtol=0)
    again = HFSizes(text | {"rope_scaling": None, "rope_parameters": rotary.rope_parameters()}, {}, False).rotary
    assert again == rotary, "the settings that the engine gets are the same"


def test_settings_differ() -> None:
    """Settings of the table differ in their angles, so that no comparison above repeats another."""
    text = {"max_position_embeddings": 131072}
    distinct = {HFSizes(text | settings, {}, False).rotary for settings in SETTINGS.values()}
    same = {"as transformers 4 writes it", "section left out", "left out"}  # pairs with another entry
    assert len(distinct) >= len(SETTINGS) - len(same)
