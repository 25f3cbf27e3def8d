"""The training benchmark counts each stage's operations as torch does, on made-up responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prism_megatron.config import AlignConfig, RLVRConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.observe import metrics as names
from prism_megatron.parallel import groups
from prism_megatron.stages.rlvr import verified_advantages
from recipes.tiny_model import TEXT_CONFIG
from tools.bench.inputs import Settings, model_sizes, read_config
from tools.bench.passes import Pass, operations
from tools.bench.synthetic_rollouts import sampled_groups
from tools.bench.train import prepare

PROMPT, RESPONSE = 32 + 4, 60  # text, and an image of 64 x 64 pixels
ROLLOUTS = ("prompts_per_iteration=2", "rollout.samples_per_prompt=2")
REPLAYED = ("replay.prompts=2", "replay.responses_per_iteration=3", "replay.responses_per_prompt=2")
STEPS = {
    "tiny_sft": ("global_batch_size=4",),
    "tiny_warmup": ("global_batch_size=2", "model.recompute=true"),
    "tiny_align": (*ROLLOUTS, "gradient_penalty=0.1", "gradient_penalty_std=0.1", "discriminator_steps=2"),
    "tiny_rlvr": (*ROLLOUTS, "mini_batches_per_iteration=2", "epochs_per_iteration=2", "kl_coeff=0.1"),
}


def mock(recipe: str, *overrides: str, tokens: int = RESPONSE) -> Settings:
    return Settings(recipe, images="mock", resolutions=((64, 64),), response_tokens=tokens, overrides=overrides)


def unseen(done: Pass, recompute: bool) -> float:
    """Operations of the half of each attention square that a causal mask hides, which torch does compute."""
    width = TEXT_CONFIG["num_attention_heads"] * TEXT_CONFIG["head_dim"]
    lengths = [len(sequence) for sequence in done.sequences]
    if done.model == "discriminator" and not done.trained:  # prompts and responses apart, the one seen whole
        prompts = {(id(s.prompt), s.branch): len(s.prompt.token_ids) for s in done.sequences}
        lengths = [*prompts.values(), *(len(s.response_ids) for s in done.sequences)]
    once = 4 * TEXT_CONFIG["num_hidden_layers"] * width * sum(n * (n - 1) // 2 for n in lengths)
    return once * (1 if not done.trained else 3 + recompute)


@pytest.mark.parametrize("recipe", STEPS)
def test_operations_of_a_step_are_those_torch_counts(recipe: str, tmp_path: Path) -> None:
    prepared = prepare(mock(recipe, *STEPS[recipe]), tmp_path)
    training, config = prepared.training, prepared.config
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        done = training.step(0)
    groups.shutdown()
    sizes = {name: model.sizes for name, model in training.models.items()}
    model, hardware = operations(done.passes, config, sizes)
    hidden = sum(unseen(each, config.model.recompute) for each in done.passes)
    assert counter.get_total_flops() == pytest.approx(hardware + hidden, rel=2e-4)
    assert model < hardware, "logits are made twice, or layers in the warm-up"
    each_once = sum(map(len, done.passes[0].sequences)) if recipe == "tiny_warmup" else 4 * (PROMPT + RESPONSE)
    assert training.tokens[0] == each_once


def test_made_up_responses_are_as_long_as_asked_and_differ(tiny_checkpoint: Path) -> None:
    processor = ChatProcessor(tiny_checkpoint)
    settings = mock("tiny_rlvr", f"model.hf_checkpoint={tiny_checkpoint}", tokens=45)
    config = read_config(settings, tiny_checkpoint.parent)
    assert isinstance(config, RLVRConfig)
    found = sampled_groups(settings, config, processor, 3)
    samples = [sample for group in found for sample in group]
    assert [len(group) for group in found] == [config.rollout.samples_per_prompt] * 3
    assert {len(sample.rollout.token_ids) for sample in samples} == {45}
    assert len({sample.rollout.text for sample in samples}) == len(samples)
    assert all(sample.response is not None for sample in samples)
    assert all(len({sample.correct for sample in group}) == 2 for group in found)
    assert all(verified_advantages(samples, config))
    with pytest.raises(ValueError, match=r"--response-tokens must be at least \d+, got 5"):
        sampled_groups(mock("tiny_rlvr", tokens=5), config, processor, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("tiny_collect"), "recipe tiny_collect is of stage collect, which trains nothing"),
        (Settings("tiny_align", vs_hf=True), "--vs hf is for SFT: HF transformers has no training step of stage align"),
        (
            Settings("tiny_rlvr", discriminator_size="tiny"),
            "--discriminator-size is for stages that have one; rlvr has",
        ),
        (
            Settings("tiny_align", "tiny_moe"),
            "tiny_moe has 4 experts, and the discriminator is made from a model without",
        ),
        (
            mock("tiny_align", *REPLAYED),
            "replay.prompts .2. encodes past images again, which --images mock does not have",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(settings, tmp_path)


def test_a_discriminator_of_its_own_size(tmp_path: Path) -> None:
    """The discriminator, as in production, is made from a small dense model, whatever the policy is."""
    small = {"text_config": TEXT_CONFIG | {"num_hidden_layers": 3}, "vision_config": {}}
    (tmp_path / "small.json").write_text(json.dumps(small))
    settings = Settings(
        "tiny_align", "tiny_moe", "mock", overrides=ROLLOUTS, discriminator_size=f"{tmp_path}/small.json"
    )
    training = prepare(settings, tmp_path).training
    groups.shutdown()
    assert training.models["policy"].sizes.num_experts == model_sizes("tiny_moe").num_experts
    assert training.models["discriminator"].sizes.text["num_hidden_layers"] == 3


def test_replay_is_full_from_the_first_step(tmp_path: Path) -> None:
    prepared = prepare(Settings("tiny_align", overrides=(*ROLLOUTS, *REPLAYED)), tmp_path)
    done = prepared.training.step(0)
    groups.shutdown()
    assert isinstance(prepared.config, AlignConfig)
    assert done.metrics[names.REPLAYED_PAIRS] == 2 * prepared.config.replay.responses_per_iteration
