"""Packing, by hand."""

from __future__ import annotations

import random

import pytest
import torch

from prism_megatron.data.pack import Padding, TrainingSequence, pack, pack_shared, split_by_tokens
from prism_megatron.types import EncodedPrompt, InputSpec, Visual

IMAGE = 9
SPEC = InputSpec(image_token_id=IMAGE, video_token_id=8, merge_size=2, patch_dim=2, max_positions=12)


def picture() -> Visual:
    return Visual(torch.ones(4, 2), (1, 2, 2))


def prompt(*tokens: int) -> EncodedPrompt:
    return EncodedPrompt(tokens, (picture(),))


def test_two_answers_to_one_prompt_and_padding() -> None:
    shared = prompt(5, IMAGE)
    batch = pack([TrainingSequence(shared, (6, 7)), TrainingSequence(shared, (7,))], SPEC, Padding(batch_multiple=4))
    assert batch.tokens.tolist() == [5, IMAGE, 6, 7, 5, IMAGE, 7, 0]
    assert batch.targets.tolist() == [IMAGE, 6, 7, 0, IMAGE, 7, 0, 0]
    assert batch.loss_mask.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert batch.visual_index.tolist() == [-1, 0, -1, -1, -1, 0, -1, -1]
    assert batch.grid_thw.tolist() == [[1, 2, 2]], "the shared image is there once"
    assert batch.max_seqlen == 4
    assert batch.last_tokens.tolist() == [3, 6]


def test_each_sequence_padded_where_it_ends() -> None:
    batch = pack(
        [TrainingSequence(prompt(5, IMAGE), (6,)), TrainingSequence(EncodedPrompt((1,)), (2, 3))], SPEC, Padding(4, 8)
    )
    assert batch.tokens.tolist() == [5, IMAGE, 6, 0, 1, 2, 3, 0]
    assert batch.targets.tolist() == [IMAGE, 6, 0, 0, 2, 3, 0, 0]
    assert batch.loss_mask.tolist() == [0, 1, 0, 0, 1, 1, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.last_tokens.tolist() == [2, 6]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_other_prompts_bring_their_own_image_and_share_a_common_one() -> None:
    common = picture()
    batch = pack(
        [
            TrainingSequence(EncodedPrompt((IMAGE,), (common,)), (1,)),
            TrainingSequence(prompt(IMAGE), (2,)),
            TrainingSequence(EncodedPrompt((IMAGE, 3), (common,)), (2,)),
        ],
        SPEC,
    )
    assert batch.visual_index.tolist() == [0, -1, 1, -1, 0, -1, -1]
    assert len(batch.pixel_values) == 8


def test_text_alone_and_nothing_at_all_carry_a_blank_image() -> None:
    text = pack([TrainingSequence(EncodedPrompt((1, 2)), (3,))], SPEC)
    nothing = pack([], SPEC, Padding(2, 4))
    for batch in (text, nothing):
        assert batch.pixel_values.tolist() == [[0, 0]] * 4
        assert batch.grid_thw.tolist() == [[1, 2, 2]]
        assert batch.visual_index.max() == -1
    assert nothing.tokens.tolist() == [0, 0, 0, 0]
    assert nothing.loss_mask.sum() == 0
    assert nothing.last_tokens.tolist() == []


def test_a_prompt_is_packed_once_a_branch_for_all_that_go_on_from_it() -> None:
    shared = prompt(5, IMAGE)
    recorded = [((6, 7), 0), ((6,), 1), ((7,), 0)]
    batch = pack_shared([TrainingSequence(shared, ids, branch) for ids, branch in recorded], SPEC, Padding(1, 4))
    assert batch.tokens.tolist() == [5, IMAGE, 6, 7, 5, IMAGE, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 6, 7, 8]
    assert batch.prefix is not None
    assert batch.prefix.tolist() == [-1, 0, -1, 2, 0]
    assert batch.branch_ids is not None
    assert batch.branch_ids.tolist() == [0, 0, 1, 1, 0]
    assert batch.last_tokens.tolist() == [1, 3, 5, 6, 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 2]] * 3
    assert batch.visual_index.tolist() == [-1, 0, -1, -1, -1, 0, -1, -1]
    with pytest.raises(ValueError, match="a sequence of 13 positions"):
        pack_shared([TrainingSequence(shared, (6,) * 11, 0)], SPEC)


@pytest.mark.parametrize(
    ("response", "message"),
    [((1, IMAGE), "a response contains an image or video token"), ((1,) * 12, "a sequence of 13 positions")],
)
def test_responses_that_cannot_be_run_are_refused(response: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([TrainingSequence(EncodedPrompt((1,)), response)], SPEC)


def test_split_keeps_order_and_budget() -> None:
    sequences = [TrainingSequence(prompt(IMAGE), (1,) * n) for n in (3, 3, 5, 1)]  # 4, 4, 6, 2 tokens
    assert split_by_tokens(sequences, 8) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"a sequence of 6 tokens does not fit max_tokens_per_microbatch \(5\)"):
        split_by_tokens(sequences, 5)


def test_a_prompt_that_is_packed_once_takes_its_room_once() -> None:
    shared, other = EncodedPrompt((1,) * 5), EncodedPrompt((1,) * 5)
    sequences = [TrainingSequence(shared, (6,) * 2, branch) for branch in (0, 1) * 4]
    assert split_by_tokens(sequences, 26) == [[0, 1, 2], [3, 4, 5], [6, 7]]  # three times seven
    assert split_by_tokens(sequences, 26, share_prompts=True) == [[*range(8)]]  # twice five, eight times two
    assert len(pack_shared(sequences, SPEC).tokens) == 26
    assert split_by_tokens(sequences, 25, share_prompts=True) == [[*range(7)], [7]]
    mixed = [sequences[0], TrainingSequence(other, (6,) * 2, 0), sequences[2]]
    assert split_by_tokens(mixed, 16, share_prompts=True) == [[0, 1, 2]]
    assert split_by_tokens(mixed, 15, share_prompts=True) == [[0, 1], [2]]


def test_what_is_split_with_shared_prompts_is_packed_within_the_budget() -> None:
    draw = random.Random(3)
    for _ in range(50):
        prompts = [EncodedPrompt((1,) * draw.randint(1, 4)) for _ in range(3)]
        sequences = [
            TrainingSequence(draw.choice(prompts), (6,) * draw.randint(1, 4), draw.randint(0, 1)) for _ in range(9)
        ]
        for group in split_by_tokens(sequences, 12, share_prompts=True):
            assert len(pack_shared([sequences[i] for i in group], SPEC).tokens) <= 12


def test_a_long_prompt_does_not_separate_its_answers() -> None:
    shared = EncodedPrompt((1,) * 2000)
    sequences = [TrainingSequence(shared, (6,) * 100, 0) for _ in range(122)]
    assert [len(group) for group in split_by_tokens(sequences, 8192, share_prompts=True)] == [61, 61]
