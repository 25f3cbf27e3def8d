"""Operation counts compared with those that torch counts in forward and backward passes of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prism_megatron.config import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.observe.flops import Workload, forward_flops, peak_flops, training_flops
from prism_megatron.types import EncodedPrompt, InputSpec, Visual
from recipes.tiny_model import MOE_CONFIG, TEXT_CONFIG, VISION_CONFIG

TEXT = TEXT_CONFIG | {"vocab_size": 400, "rms_norm_eps": 1e-6}
VISION = VISION_CONFIG | {"in_channels": 3, "out_hidden_size": TEXT["hidden_size"]}
SPEC = InputSpec(image_token_id=9, video_token_id=8, merge_size=2, patch_dim=3 * 2 * 16 * 16, max_positions=2048)
PATCHES, PROMPT, RESPONSE = 64, 20, 44


def sequence(branch: int | None = None) -> TrainingSequence:
    picture = Visual(torch.rand(PATCHES, SPEC.patch_dim), (1, 8, 8))
    prompt = EncodedPrompt((5,) * (PROMPT - PATCHES // 4) + (9,) * (PATCHES // 4), (picture,))
    return TrainingSequence(prompt, (7,) * RESPONSE, branch)


def counted(model: Any, sequences: list[TrainingSequence]) -> int:
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(pack(sequences, SPEC))
        scores = output if isinstance(output, torch.Tensor) else output.logprobs
        scores.sum().backward()
    return counter.get_total_flops()


def expected(text: dict[str, Any], work: Workload, freeze: list[str], recompute: bool) -> float:
    """Return our count plus the masked half of causal attention, which torch's math kernel computes."""
    flops = training_flops(text, VISION, work, freeze, recompute)
    layers, width = text["num_hidden_layers"], text["num_attention_heads"] * text["head_dim"]
    hidden_half = 4 * layers * width * sum(n * (n - 1) // 2 for n in work.sequence_lengths)
    return flops.hardware + hidden_half * (flops.parts["attention"] / _attention(text, work) + recompute)


def _attention(text: dict[str, Any], work: Workload) -> float:
    frozen = training_flops(text, VISION, work, ["vision", "merger", "language_model"])
    return frozen.parts["attention"]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    ("freeze", "recompute"),
    [
        ([], False),
        ([], True),
        (["vision"], False),
        (["vision", "merger"], False),
        (["merger"], False),
        (["language_model", "vision"], True),
    ],
)
def test_policy_count_is_torchs(moe: bool, freeze: list[str], recompute: bool) -> None:
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import HFSizes

    text = TEXT | (MOE_CONFIG if moe else {})
    (model,) = build_policy(
        ModelConfig("", freeze=freeze, recompute=recompute), ParallelConfig(), HFSizes(text, VISION, True)
    )
    work = Workload([PROMPT + RESPONSE] * 2, [PATCHES] * 2, scored_tokens=2 * RESPONSE)
    assert counted(model, [sequence(), sequence()]) == pytest.approx(expected(text, work, freeze, recompute), rel=0.01)


def test_discriminator_count_is_torchs() -> None:
    from prism_megatron.model.build import build_discriminator
    from prism_megatron.model.sizes import HFSizes

    settings = DiscriminatorConfig("", num_experts=4, topk=2, upcycle_noise=0.0, load_balance_coeff=0)
    (model,) = build_discriminator(ModelConfig(""), ParallelConfig(), settings, HFSizes(TEXT, VISION, True))
    text = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": TEXT["intermediate_size"]}
    work = Workload([PROMPT + RESPONSE] * 2, [PATCHES] * 2, scored_sequences=2, score_heads=2)
    assert counted(model, [sequence(0), sequence(1)]) == pytest.approx(expected(text, work, [], False), rel=0.01)


def test_attention_counts_visible_tokens_only() -> None:
    separate, joined = (training_flops(TEXT, VISION, Workload(lengths, [])) for lengths in ([50, 50], [100]))
    assert separate.parts["language"] == joined.parts["language"]
    assert joined.parts["attention"] / separate.parts["attention"] == pytest.approx(100 * 101 / (2 * 50 * 51))


def test_shared_prefixes_and_unread_tokens_are_not_counted() -> None:
    text = TEXT | MOE_CONFIG
    full = training_flops(text, VISION, Workload([50, 50], []))
    shared = training_flops(text, VISION, Workload([50, 50], [], known_prefixes=[20]))
    assert shared.parts["language"] / full.parts["language"] == pytest.approx(80 / 100)
    assert shared.parts["attention"] / full.parts["attention"] == pytest.approx((2 * 50 * 51 - 20 * 21) / (2 * 50 * 51))
    unread, one = (forward_flops(text, VISION, Workload([100], [], read_tokens=read)) for read in (0, 1))
    expert = 3 * text["hidden_size"] * text["moe_intermediate_size"]
    router = text["hidden_size"] * text["num_experts"]
    mlp = 2 * (text["num_experts_per_tok"] * expert + router)
    assert one.model - unread.model == mlp
    assert 3 * (unread.model + 100 * mlp) == pytest.approx(
        full.model - full.parts["attention"] + 3 * unread.parts["attention"]
    )


def test_peak_of_a_known_card_only() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("CPU x86_64") is None
