"""The defects of the paper's code by number (spec 3.3, 9.1, 9.3): absent by default, present in compat=reference.

The networks' defects (W1, W2, W4, together D5) are in tests/integration/test_network_defects.py, the effects of D2 and
D3 in tests/integration/test_discriminator_controls.py, the verifier's (9.2) in tests/unit/reference/test_answer.py, and
the inactive clips (9.3) in tests/integration/test_algorithms.py.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from prism_megatron.advantage import AdvantageConfig, ScoredResponses
from prism_megatron.config import REFERENCE_TEACHER_TOKENS, AlignConfig
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_pairs, write_pairs
from prism_megatron.data.loader import batch_indices
from prism_megatron.data.pack import pack
from prism_megatron.data.response import parse_response
from prism_megatron.loss.discriminator import PairLossConfig, PairScores
from prism_megatron.loss.reduce import BatchTotals
from prism_megatron.method import FIXED, METHODS, REFERENCE
from prism_megatron.reference import verifiable
from prism_megatron.reference.branches import student_sequences, teacher_sequences
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


def test_d1_a_long_demonstration_is_complete(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    long = f"<think>{'red circle ' * 600}</think>\n<answer>1</answer>"
    _, complete = branch_sequences(processor, prompt, CAPTION, long)
    _, cut = teacher_sequences(processor, prompt, CAPTION, long)
    assert processor.decode(complete.response_ids) == long
    assert len(cut.response_ids) == REFERENCE_TEACHER_TOKENS < len(complete.response_ids)


def test_d2_the_token_the_score_is_read_at_says_nothing(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    fixed = branch_sequences(processor, prompt, CAPTION, REASONING)
    assert {s.response_ids[-1] for s in fixed} == {processor.terminator_id}

    sampled = (*processor.encode_text(f"{CAPTION}\n{REASONING}"), processor.terminator_id)
    student = student_sequences(processor, prompt, sampled, parse_response(f"{CAPTION}\n{REASONING}"))
    teacher = teacher_sequences(processor, prompt, CAPTION, REASONING)
    assert {s.response_ids[-1] for s in teacher} == {processor.tokenizer.pad_token_id}
    assert student[1].response_ids[-1] == processor.terminator_id
    assert student[0].response_ids[-1] not in (processor.terminator_id, processor.tokenizer.pad_token_id)
    assert processor.decode(student[0].response_ids).rstrip() == CAPTION
    assert processor.decode(student[1].response_ids).lstrip() == REASONING


def test_d2_outside_the_grammar_the_reference_cuts_in_half(processor: ChatProcessor, prompt: EncodedPrompt) -> None:
    first, second = student_sequences(processor, prompt, (1, 2, 3, 4, 5), None)
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


def pair_scores(teacher: Tensor, student: Tensor, *, weights: float = 1.0, responses: float = 1.0) -> PairScores:
    """Valid pairs of the perception branch."""
    branch, valid = torch.zeros(len(teacher)), torch.ones(len(teacher), dtype=torch.bool)
    return PairScores(teacher, student, branch, valid, torch.full((len(teacher),), weights), responses)


@pytest.mark.parametrize(("compat", "slope"), [("fixed", -1.0), ("reference", 0.0)])
def test_d6_gradients_survive_at_any_score(compat: str, slope: float) -> None:
    teacher = torch.tensor([-20.0], requires_grad=True)
    loss, _ = METHODS[compat].pair_loss(pair_scores(teacher, torch.tensor([20.0])), PairLossConfig())
    loss.backward()
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [slope]


def test_d6_scores_are_clamped_before_they_become_advantages() -> None:
    assert (FIXED.max_score, REFERENCE.max_score) == (math.inf, 10.0)


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
    assert verifiable.parse_response(text) is not None


@pytest.mark.parametrize(("compat", "expected"), [("fixed", [0.0, 0.0]), ("reference", [-1.5, -1.5])])
def test_d8_a_group_of_broken_responses_teaches_nothing(compat: str, expected: list[float]) -> None:
    invalid = torch.tensor([False, False])
    scored = ScoredResponses(torch.zeros(2), torch.zeros(2), invalid, correct=invalid, groups=torch.tensor([0, 0]))
    config = AdvantageConfig(perception_weight=0.5, format_penalty=1.5, combine="per_branch", eps=1e-6)
    assert METHODS[compat].advantage(scored, config).tolist() == expected


@pytest.mark.parametrize(("compat", "expected"), [("fixed", 0.0), ("reference", 9.0)])
def test_a_group_of_one_has_no_advantage(compat: str, expected: float) -> None:
    assert METHODS[compat].normalize(torch.tensor([9.0]), torch.tensor([0]), 0.0, 0.0).tolist() == [expected]


def test_d9_sparse_micro_batches_are_not_over_weighted() -> None:
    """Gaps 0 (valid), 0 (broken) | ln 3, ln 3: the mean over the three valid pairs, or the mean of the means."""
    gaps, valid = torch.tensor([0.0, 0.0, math.log(3), math.log(3)]), torch.tensor([True, False, True, True])
    weights = valid / 3  # no weight for the broken pair, which is in no micro-batch of the fixed method
    microbatches = [
        PairScores(gaps[half], torch.zeros(2), torch.zeros(2), valid[half], weights[half], response_count=4.0)
        for half in (slice(0, 2), slice(2, 4))
    ]
    fixed, reference = (
        sum(float(method.pair_loss(scores, PairLossConfig())[0]) for scores in microbatches)
        for method in (FIXED, REFERENCE)
    )
    assert fixed == pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3)
    assert reference == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_d9_the_policy_loss_neither() -> None:
    """Sequences of 1 and 3 tokens, each its own micro-batch: 1/4 a token, or 1/2 and 1/6."""
    parts = [(torch.ones(1), torch.zeros(1).long()), (torch.ones(3), torch.zeros(3).long())]
    totals = BatchTotals(tokens=4.0, sequences=2.0)
    fixed, reference = (
        [weight for mask, ids in parts for weight in method.token_mean(mask, ids, totals).tolist()]
        for method in (FIXED, REFERENCE)
    )
    assert fixed == [0.25] * 4
    assert reference == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize(("compat", "slopes"), [("fixed", (-0.75, -0.25)), ("reference", (-0.5, -0.5))])
def test_d10_the_branches_weigh_in_the_loss_what_they_weigh_in_the_reward(
    compat: str, slopes: tuple[float, float]
) -> None:
    """One response, alpha = 0.75, gaps of 0: the slope of softplus is 1/2, times 2 alpha and 2 (1 - alpha), or 1."""
    from prism_megatron.stages.align import discriminator_objective
    from recipes.train import load

    config = load("tiny_align", ["perception_weight=0.75", f"compat={compat}"])
    assert isinstance(config, AlignConfig)
    objective = discriminator_objective(METHODS[compat], config)
    teacher, branch, valid = torch.zeros(2, requires_grad=True), torch.tensor([0, 1]), torch.tensor([True, True])
    scores = PairScores(teacher, torch.zeros(2), branch, valid, torch.tensor(objective.branch_weights), 1.0)
    objective.pair_loss(scores, objective.pair_loss_config)[0].backward()
    assert teacher.grad is not None
    assert teacher.grad.tolist() == list(slopes)


def test_w3_an_unreadable_picture_is_an_error_and_not_replaced_by_a_neighbour(tmp_path: Path) -> None:
    pairs = []
    for side in (32, 64):
        picture = io.BytesIO()
        Image.new("RGB", (side, side)).save(picture, "PNG")
        messages = (Message("system", "Look."), Message("user", "<image>How many?"))
        pairs.append(
            PreferencePair(str(side), messages, (picture.getvalue(),), "", CAPTION, REASONING, CAPTION, REASONING)
        )
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, pairs)
    assert [pair.id for pair in read_pairs(path)] == ["32", "64"]
    torn = tmp_path / json.loads(path.read_text().splitlines()[1])["image"]
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"line 2, image .*: not a readable image"):
        read_pairs(path)


def test_9_3_the_step_count_does_not_depend_on_epochs() -> None:
    """Ten rows last for any number of iterations; every epoch shows each of them once."""
    rows = [row for iteration in range(500) for row in batch_indices(10, 4, iteration, seed=1)]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, 2000, 10))
