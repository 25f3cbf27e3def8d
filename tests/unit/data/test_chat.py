"""Text and tokens: what somebody spelled is never a special token."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.pack import pack
from prism_megatron.types import EncodedPrompt

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


def test_a_spelled_special_token_is_text(processor: ChatProcessor) -> None:
    text = "see " + " and ".join(SPECIAL)
    ids = processor.encode_text(text)
    assert processor.has_text(ids)
    assert processor.decode(ids) == text


def test_prompts_keep_theirs_afterwards(processor: ChatProcessor) -> None:
    """How a text is read is a state of the tokenizer."""
    processor.encode_text("x")
    assert processor.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [processor.terminator_id]


def test_a_response_that_spells_them_can_be_packed_and_ends_once(processor: ChatProcessor) -> None:
    spelled = " ".join(SPECIAL)
    caption, reasoning = f"<caption>{spelled}</caption>", f"<think>{spelled}</think><answer>1</answer>"
    sequences = branch_sequences(processor, EncodedPrompt(processor.encode_text("see")), caption, reasoning)
    pack(sequences, processor.input_spec)
    for sequence, text in zip(sequences, (caption, reasoning), strict=True):
        assert sequence.response_ids.index(processor.terminator_id) == len(sequence.response_ids) - 1
        assert processor.decode(sequence.response_ids) == text


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_have_no_text(processor: ChatProcessor, token: str) -> None:
    special = processor.tokenizer.convert_tokens_to_ids(token)
    assert not processor.has_text((*processor.encode_text("a"), special))


def test_a_prompt_takes_only_its_own_pictures_along(processor: ChatProcessor, tiny_data: Path) -> None:
    """However many prompts were encoded with it: as bytes, it goes to other ranks."""
    rows = read_rlvr(tiny_data / "heldout.parquet")
    (alone,), together = processor.encode_prompts(rows[:1]), processor.encode_prompts(rows)
    assert len(pickle.dumps(together[0])) == len(pickle.dumps(alone))


def test_neither_have_rows_of_the_embedding_that_are_no_token(processor: ChatProcessor) -> None:
    assert processor.decode([len(processor.tokenizer)]) == ""
    assert not processor.has_text([len(processor.tokenizer)])
    assert processor.has_text([])
