"""Packing, by hand."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.data.pack import TrainingSequence, pack, split_by_tokens
from prism_megatron.types import EncodedPrompt

IMAGE = 9


def prompt(*tokens: int) -> EncodedPrompt:
    return EncodedPrompt(tokens, torch.ones(4, 2), torch.tensor([[1, 2, 2]]))


def test_two_answers_to_one_prompt_and_padding() -> None:
    shared = prompt(5, IMAGE)
    batch = pack(
        [TrainingSequence(shared, (6, 7)), TrainingSequence(shared, (8,))],
        image_token_id=IMAGE,
        merge_size=2,
        pad_to_multiple=4,
    )
    assert batch.tokens.tolist() == [5, IMAGE, 6, 7, 5, IMAGE, 8, 0]
    assert batch.targets.tolist() == [IMAGE, 6, 7, 0, IMAGE, 8, 0, 0]
    assert batch.loss_mask.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert batch.visual_index.tolist() == [-1, 0, -1, -1, -1, 0, -1, -1]
    assert batch.image_grid_thw.tolist() == [[1, 2, 2]], "the shared image is there once"
    assert batch.max_seqlen == 4


def test_other_prompts_bring_their_own_image() -> None:
    batch = pack(
        [TrainingSequence(prompt(IMAGE), (1,)), TrainingSequence(prompt(IMAGE), (2,))],
        image_token_id=IMAGE,
        merge_size=2,
    )
    assert batch.visual_index.tolist() == [0, -1, 1, -1]
    assert len(batch.pixel_values) == 8


def test_split_keeps_order_and_budget() -> None:
    sequences = [TrainingSequence(prompt(IMAGE), (1,) * n) for n in (3, 3, 5, 1)]  # 4, 4, 6, 2 tokens
    assert split_by_tokens(sequences, 8) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"a sequence of 6 tokens does not fit max_tokens_per_microbatch \(5\)"):
        split_by_tokens(sequences, 5)
