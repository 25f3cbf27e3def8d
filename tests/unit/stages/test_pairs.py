"""Pairs that fit a micro-batch, whatever their prompts and responses are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from prism_megatron.parallel import cpu

cpu.install()

from prism_megatron import config as cfg  # noqa: E402
from prism_megatron.data.chat import ChatProcessor  # noqa: E402
from prism_megatron.data.pack import TrainingSequence  # noqa: E402
from prism_megatron.data.pairs import Pair, branch_pairs, group_pairs  # noqa: E402
from prism_megatron.stages.warmup import preference_pairs  # noqa: E402
from prism_megatron.train import load  # noqa: E402
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, Message, PreferencePair  # noqa: E402
from recipes.qwen3_vl import RECIPES  # noqa: E402


def of_lengths(prompt: int, teacher: int, student: int, config: cfg.WarmupConfig | cfg.AlignConfig) -> list[Pair]:
    """Pairs of branches of so many tokens."""
    shown = EncodedPrompt((1,) * prompt)
    sides = [
        tuple(TrainingSequence(shown, (2,) * length, branch) for branch in (PERCEPTION, REASONING))
        for length in (teacher, student)
    ]
    return branch_pairs(sides[0], sides[1], "row", config)  # type: ignore[arg-type]


def discriminating(recipe: str, *overrides: str) -> cfg.WarmupConfig | cfg.AlignConfig:
    config = load(recipe, overrides)
    assert isinstance(config, cfg.WarmupConfig | cfg.AlignConfig)
    return config


@pytest.mark.parametrize("name", [name for name in sorted(RECIPES) if name.startswith(("warmup", "align"))])
def test_no_production_pair_is_too_long(name: str) -> None:
    config = discriminating(name)
    rollout, room = config.rollout, config.max_tokens_per_microbatch
    longest_prompt = rollout.max_model_len - rollout.max_response_tokens
    for prompt in (300, longest_prompt, longest_prompt + 500):
        for teacher in (30, rollout.max_response_tokens, 20_000):
            for student in (30, rollout.max_response_tokens):
                pairs = of_lengths(prompt, teacher, student, config)
                assert [len(group) for group in group_pairs(pairs[:1], room, 1)] == [1]
                fits = max(teacher, student) <= room // 2 - prompt
                assert [pair.cut for pair in pairs] == [not fits] * 2
                if fits:
                    assert [len(s.response_ids) for s in (pairs[0].teacher, pairs[0].student)] == [teacher, student]


def test_a_limit_of_ones_own_and_a_demonstration_laid_down_twice() -> None:
    limited = discriminating("tiny_align", "discriminator.max_branch_tokens=50")
    assert [pair.cut for pair in of_lengths(10, 50, 50, limited)] == [False, False]
    (cut, _) = of_lengths(10, 60, 51, limited)
    assert cut.cut
    assert len(cut.teacher.response_ids) == len(cut.student.response_ids) == 50

    penalised = discriminating(
        "tiny_align", "gradient_penalty=1", "gradient_penalty_std=1", "max_tokens_per_microbatch=600"
    )
    assert not of_lengths(100, 100, 100, penalised)[0].cut
    assert of_lengths(100, 101, 100, penalised)[0].cut
    with pytest.raises(ValueError, match=r"row: a prompt of 199 tokens leaves no room .* raise it, or drop the row"):
        of_lengths(199, 3, 3, penalised)


def test_warm_up_pairs_are_cut_on_both_sides(tiny_checkpoint: Path) -> None:
    processor = ChatProcessor(tiny_checkpoint)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    told = ("<caption>a</caption>", f"<think>{'so ' * 400}</think><answer>1</answer>")
    brief = ("<caption>a</caption>", "<think>so</think><answer>1</answer>")
    row = PreferencePair("row", (Message("user", "<image>?"),), (picture.getvalue(),), "", *told, *brief)
    config = discriminating("tiny_warmup", "max_tokens_per_microbatch=400")
    assert isinstance(config, cfg.WarmupConfig)
    caption, reasoning = preference_pairs([row], processor, config)
    assert not caption.cut
    assert reasoning.cut
    ends = [side.response_ids for side in (reasoning.teacher, reasoning.student)]
    assert len(ends[0]) == len(ends[1])
    for ids, text in zip(ends, (told[1], brief[1]), strict=True):
        assert ids[-1] == processor.terminator_id
        assert text.startswith(processor.decode(ids))
        assert text != processor.decode(ids)
