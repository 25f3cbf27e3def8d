"""Each defect of the paper's code (spec 3.3, 9.1, 9.3) by its number: gone here, and there under compat=reference.

Those of the networks themselves (W1, W2, W4, together D5) are in tests/integration/test_network_defects.py, what D2
gives away, and D3, in tests/integration/test_discriminator_controls.py; those of the verifier
(9.2) in tests/unit/reward/test_reference_answer.py; that clips act (9.3) in tests/integration/test_algorithms.py.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from prism_megatron.advantage import alignment_advantage
from prism_megatron.config import REFERENCE_TEACHER_TOKENS, GatingConfig
from prism_megatron.data.branches import (
    branch_sequences,
    reference_student_sequences,
    reference_teacher_sequences,
)
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_pairs, write_pairs
from prism_megatron.data.loader import batch_indices
from prism_megatron.data.pack import pack
from prism_megatron.data.response import parse_response
from prism_megatron.loss.discriminator import bradley_terry_loss, reference_branch_loss
from prism_megatron.loss.reduce import token_weights
from prism_megatron.types import EncodedPrompt, Message, PreferencePair, Visual

CAPTION = "<caption>\n- a red circle\n</caption>"
REASONING = "<think>\nOne circle is red.\n</think>\n<answer>\n1\n</answer>"


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


@pytest.fixture
def prompt(processor: ChatProcessor) -> EncodedPrompt:
    spec = processor.input_spec
    picture = Visual(torch.zeros(16, spec.patch_dim), (1, 4, 4))
    return EncodedPrompt((*processor.encode_text("see"), *[spec.image_token_id] * 4), (picture,))


def test_d1_a_long_demonstration_is_kept_whole(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    long = f"<think>{'red circle ' * 600}</think>\n<answer>1</answer>"
    _, kept = branch_sequences(processor, prompt, CAPTION, long)
    _, cut = reference_teacher_sequences(processor, prompt, CAPTION, long)
    assert processor.decode(kept.response_ids) == long
    assert len(cut.response_ids) == REFERENCE_TEACHER_TOKENS < len(kept.response_ids)


def test_d2_the_token_the_score_is_read_at_says_nothing(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    fixed = branch_sequences(processor, prompt, CAPTION, REASONING)
    assert {s.response_ids[-1] for s in fixed} == {processor.terminator_id}

    sampled = (*processor.encode_text(f"{CAPTION}\n{REASONING}"), processor.terminator_id)
    student = reference_student_sequences(processor, prompt, sampled, parse_response(f"{CAPTION}\n{REASONING}"))
    teacher = reference_teacher_sequences(processor, prompt, CAPTION, REASONING)
    assert {s.response_ids[-1] for s in teacher} == {processor.tokenizer.pad_token_id}
    assert student[1].response_ids[-1] == processor.terminator_id
    assert student[0].response_ids[-1] not in (processor.terminator_id, processor.tokenizer.pad_token_id)
    assert processor.decode(student[0].response_ids).rstrip() == CAPTION
    assert processor.decode(student[1].response_ids).lstrip() == REASONING


def test_d2_outside_the_grammar_the_reference_cuts_in_half(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    first, second = reference_student_sequences(processor, prompt, (1, 2, 3, 4, 5), None)
    assert (first.response_ids, second.response_ids) == ((1, 2), (3, 4, 5))


def test_d4_a_segment_keeps_its_mrope_positions(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    """Three axes in warm-up and alignment alike: an image of 2 x 2 merged patches takes 2 positions, not 4."""
    sequence, _ = branch_sequences(processor, prompt, CAPTION, REASONING)
    batch = pack([sequence], processor.input_spec)
    text = len(prompt.token_ids) - 4
    assert batch.position_ids[:, text : text + 4].tolist() == [
        [text] * 4,
        [text, text, text + 1, text + 1],
        [text, text + 1] * 2,
    ]
    assert batch.position_ids[:, text + 4].tolist() == [text + 2] * 3


def test_d6_gradients_survive_at_any_score() -> None:
    scores = torch.tensor([-20.0, -20.0], requires_grad=True)
    bradley_terry_loss(scores[:1], torch.tensor([20.0]), torch.ones(1)).backward()
    reference_branch_loss(scores[1:], torch.tensor([20.0]), torch.tensor([True]), regularizer=0.0).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "<caption></caption><think>t</think><answer>1</answer>",
        "<caption>c</caption><think>t <answer>2</answer></think><answer>1</answer>",
        "<caption>c</caption><think>t</think><answer>1</answer><answer>2</answer>",
        "<caption>c <caption>d</caption><think>t</think><answer>1</answer>",
    ],
)
def test_d7_one_reading_or_none(text: str) -> None:
    assert parse_response(text) is None
    assert parse_response(text, compat="reference") is not None


@pytest.mark.parametrize(("compat", "expected"), [("fixed", [0.0, 0.0]), ("reference", [-1.5, -1.5])])
def test_d8_a_group_of_broken_responses_teaches_nothing(compat: str, expected: list[float]) -> None:
    advantage = alignment_advantage(
        torch.zeros(2),
        torch.zeros(2),
        torch.tensor([False, False]),
        torch.tensor([0, 0]),
        perception_weight=0.5,
        format_penalty=1.5,
        combine="per_branch",
        eps=1e-6,
        compat=compat,
        correct=torch.tensor([False, False]),
        gating=GatingConfig(),
    )
    assert advantage.tolist() == expected


def test_d9_sparse_micro_batches_are_not_over_weighted() -> None:
    """Gaps 0 (valid), 0 (broken) | ln 3, ln 3: the mean over the three valid pairs, or the mean of the means."""
    teacher, student = torch.tensor([0.0, 0.0, math.log(3), math.log(3)]), torch.zeros(4)
    valid = torch.tensor([True, False, True, True])
    halves = (slice(0, 2), slice(2, 4))
    fixed = sum(
        bradley_terry_loss(
            teacher[half][valid[half]], student[half][valid[half]], torch.full((int(valid[half].sum()),), 1 / 3)
        )
        for half in halves
    )
    reference = sum(reference_branch_loss(teacher[h], student[h], valid[h], regularizer=0.0) / 2 for h in halves)
    assert float(fixed) == pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3)
    assert float(reference) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_d9_the_policy_loss_neither() -> None:
    """Sequences of 1 and 3 tokens, each its own micro-batch: 1/4 a token, or 1/2 and 1/6."""
    parts = [(torch.ones(1), torch.zeros(1).long()), (torch.ones(3), torch.zeros(3).long())]
    totals = {"total_tokens": 4.0, "total_sequences": 2.0}
    weights = [
        [w for mask, ids in parts for w in token_weights(mask, ids, aggregation=how, **totals).tolist()]  # type: ignore[arg-type]
        for how in ("token_mean", "reference")
    ]
    assert weights[0] == [0.25] * 4
    assert weights[1] == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_d10_the_branches_weigh_in_the_loss_what_they_weigh_in_the_reward() -> None:
    from prism_megatron.parallel import cpu

    cpu.install()
    from prism_megatron.stages.align import discriminator_objective
    from recipes.train import load

    skewed = ["perception_weight=0.75"]
    fixed, reference = (load("tiny_align", [*skewed, f"compat={compat}"]) for compat in ("fixed", "reference"))
    assert discriminator_objective(fixed).branch_weights == (1.5, 0.5)  # type: ignore[arg-type]
    assert discriminator_objective(reference).branch_weights == (1.0, 1.0)  # type: ignore[arg-type]


def test_w3_a_picture_that_cannot_be_read_is_named_and_no_neighbour_takes_its_place(tmp_path: Path) -> None:
    pairs = []
    for side in (32, 64):
        picture = io.BytesIO()
        Image.new("RGB", (side, side)).save(picture, "PNG")
        messages = (Message("system", "Look."), Message("user", "<image>How many?"))
        pairs.append(
            PreferencePair(str(side), messages, (picture.getvalue(),), "", CAPTION, REASONING, CAPTION, REASONING)
        )
    place = tmp_path / "pairs.jsonl"
    write_pairs(place, pairs)
    assert [pair.id for pair in read_pairs(place)] == ["32", "64"]
    torn = tmp_path / json.loads(place.read_text().splitlines()[1])["image"]
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"line 2, image .*: not a readable image"):
        read_pairs(place)


def test_9_3_the_step_count_does_not_depend_on_epochs() -> None:
    """Ten rows last for any number of iterations; every epoch shows each of them once."""
    shown = [row for iteration in range(500) for row in batch_indices(10, 4, iteration, seed=1)]
    assert all(sorted(shown[i : i + 10]) == list(range(10)) for i in range(0, 2000, 10))
