"""Pairs fit a micro-batch for any prompt and response lengths."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from prism_megatron import config as cfg
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair, branch_pairs, group_pairs
from prism_megatron.stages.warmup import preference_pairs
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, Message, PreferencePair
from recipes.qwen3_vl import RECIPES
from recipes.train import load


def pairs_of_lengths(prompt: int, teacher: int, student: int, config: cfg.WarmupConfig | cfg.AlignConfig) -> list[Pair]:
    """Return both branches' pairs with prompts and responses of the given numbers of tokens."""
    encoded = EncodedPrompt((1,) * prompt)
    sides = [
        tuple(TrainingSequence(encoded, (2,) * length, branch) for branch in (PERCEPTION, REASONING))
        for length in (teacher, student)
    ]
    return branch_pairs(sides[0], sides[1], "row", config)  # type: ignore[arg-type]


def discriminator_config(recipe: str, *overrides: str) -> cfg.WarmupConfig | cfg.AlignConfig:
    config = load(recipe, overrides)
    assert isinstance(config, cfg.WarmupConfig | cfg.AlignConfig)
    return config


@pytest.mark.parametrize("name", [name for name in sorted(RECIPES) if name.startswith(("warmup", "align"))])
def test_no_production_pair_is_too_long(name: str) -> None:
    config = discriminator_config(name)
    rollout, room = config.rollout, config.max_tokens_per_microbatch
    longest_prompt = rollout.max_model_len - rollout.max_response_tokens
    for prompt in (300, longest_prompt, longest_prompt + 500):
        for teacher in (30, rollout.max_response_tokens, 20_000):
            for student in (30, rollout.max_response_tokens):
                pairs = pairs_of_lengths(prompt, teacher, student, config)
                assert [len(group) for group in group_pairs(pairs[:1], room, 1)] == [1]
                fits = max(teacher, student) <= room // 2 - prompt
                assert [pair.cut for pair in pairs] == [not fits] * 2
                if fits:
                    assert [len(s.response_ids) for s in (pairs[0].teacher, pairs[0].student)] == [teacher, student]


def test_max_branch_tokens_and_teachers_packed_twice() -> None:
    limited = discriminator_config("tiny_align", "discriminator.max_branch_tokens=50")
    assert [pair.cut for pair in pairs_of_lengths(10, 50, 50, limited)] == [False, False]
    (cut, _) = pairs_of_lengths(10, 60, 51, limited)
    assert cut.cut
    assert len(cut.teacher.response_ids) == len(cut.student.response_ids) == 50

    penalised = discriminator_config(
        "tiny_align", "gradient_penalty=1", "gradient_penalty_std=1", "max_tokens_per_microbatch=600"
    )
    assert not pairs_of_lengths(100, 100, 100, penalised)[0].cut
    assert pairs_of_lengths(100, 101, 100, penalised)[0].cut
    with pytest.raises(ValueError, match=r"row: a prompt of 199 tokens leaves no room .* raise it, or drop the row"):
        pairs_of_lengths(199, 3, 3, penalised)


def test_warmup_pairs_are_truncated_on_both_sides(tiny_checkpoint: Path) -> None:
    processor = ChatProcessor(tiny_checkpoint)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    teacher = ("<caption>a</caption>", f"<think>{'so ' * 400}</think><answer>1</answer>")
    student = ("<caption>a</caption>", "<think>so</think><answer>1</answer>")
    row = PreferencePair("row", (Message("user", "<image>?"),), (picture.getvalue(),), "", *teacher, *student)
    config = discriminator_config("tiny_warmup", "max_tokens_per_microbatch=400")
    assert isinstance(config, cfg.WarmupConfig)
    caption, reasoning = preference_pairs([row], processor, config)
    assert not caption.cut
    assert reasoning.cut
    ends = [side.response_ids for side in (reasoning.teacher, reasoning.student)]
    assert len(ends[0]) == len(ends[1])
    for ids, text in zip(ends, (teacher[1], student[1]), strict=True):
        assert ids[-1] == processor.terminator_id
        assert text.startswith(processor.decode(ids))
        assert text != processor.decode(ids)
