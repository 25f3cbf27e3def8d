"""Router statistics: counts by hand, recorded once per layer with and without recomputation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prism_megatron.config import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, InputSpec
from recipes.tiny_model import TEXT_CONFIG, VISION_CONFIG

TEXT = TEXT_CONFIG | {"vocab_size": 400, "rms_norm_eps": 1e-6}
VISION = VISION_CONFIG | {"in_channels": 3, "out_hidden_size": TEXT["hidden_size"]}
SPEC = InputSpec(image_token_id=9, video_token_id=8, merge_size=2, patch_dim=3 * 2 * 16 * 16, max_positions=2048)
LAYERS, SHARE = TEXT["num_hidden_layers"], 0.25
# A perception sequence of 7 tokens and two reasoning sequences of 5 and 6.
BATCH = [(7, PERCEPTION), (5, REASONING), (6, REASONING)]


def discriminator(recompute: bool) -> Any:
    from prism_megatron.model.build import build_discriminator
    from prism_megatron.model.sizes import HFSizes

    settings = DiscriminatorConfig("", num_experts=8, topk=2, upcycle_noise=0.0, load_balance_coeff=0.0)
    sizes = HFSizes(TEXT, VISION, True)
    (model,) = build_discriminator(ModelConfig("", recompute=recompute), ParallelConfig(), settings, sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model


def record(model: Any) -> tuple[float, torch.Tensor]:
    from prism_megatron.model.router_stats import RouterStats

    stats = RouterStats()
    prompt = EncodedPrompt((5, 6))
    sequences = [TrainingSequence(prompt, tuple(range(20, 20 + length - 2)), branch) for length, branch in BATCH]
    model(pack(sequences, SPEC), SHARE, stats).sum().backward()
    return stats.over_all_ranks()


@pytest.mark.parametrize("recompute", [False, True])
def test_uniform_routers_by_hand(recompute: bool) -> None:
    model = discriminator(recompute)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.zero_()
    loss, routing = record(model)
    # E sum_e f_e P_e over a branch's 4 experts, each with P_e = 1/4 and top 2: 2 for both branches, mean over layers.
    assert loss == pytest.approx(2 * SHARE)
    for branch, tokens in ((PERCEPTION, 7), (REASONING, 11)):
        *loads, entropy, count = routing[branch].tolist()
        assert count == tokens * LAYERS
        assert sum(loads[4 * branch : 4 * branch + 4]) == sum(loads) == 2 * tokens * LAYERS
        assert entropy == pytest.approx(tokens * LAYERS * math.log(4))


def test_recomputation_records_the_same() -> None:
    (loss, routing), (again, repeated) = (record(discriminator(recompute)) for recompute in (False, True))
    assert again == pytest.approx(loss, abs=0, rel=1e-6)
    torch.testing.assert_close(repeated, routing, rtol=1e-6, atol=0)
    assert routing[PERCEPTION, :4].std() > 0, "random routers have equal loads"
