"""Rows that fit nowhere are found before the first iteration, and no other row is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.config import RolloutConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr, read_sft
from prism_megatron.data.lengths import check_lengths, largest_image_tokens
from prism_megatron.errors import UserError
from prism_megatron.stages.rollouts import check_prompts
from prism_megatron.stages.sft import demonstrations
from prism_megatron.types import Example, Message

# NFC makes four bytes of U+1D160 into twelve, and three of U+0958 into six.
TEXTS = (
    "",
    "How many?",
    "数えて",
    "e\u0301" * 40,
    "\U0001d160" * 40,
    "\u0958" * 40,
    "<|im_end|>" * 9,
    "\n" * 50,
    "\x00\ue000",
)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


def example(made: Any, text: str, size: tuple[int, int] | None = (40, 30)) -> Example:
    images = () if size is None else (made.encoded(Image.new("RGB", size)),)
    turns = (Message("system", text), Message("user", "<image>" * len(images) + text))
    return Example("x", turns, images, "file, row 1", response=f"{text} {made.response}")


def length(row: Example, processor: ChatProcessor) -> int:
    (sequence,) = demonstrations([row], processor)
    return len(sequence)


def fits(row: Example, processor: ChatProcessor, room: int) -> bool:
    try:
        check_lengths([row], processor, room, "raise it", demonstrations=True)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("size", [None, (40, 30), (1, 1), (900, 700), (8, 1600)])
def test_the_longest_that_fits_is_known_to_the_token(made: Any, processor: ChatProcessor, size: Any) -> None:
    for text in TEXTS:
        row = example(made, text, size)
        tokens = length(row, processor)
        assert fits(row, processor, tokens), (text, size)
        assert not fits(row, processor, tokens - 1), (text, size)


def test_tokens_of_an_image_from_its_size(made: Any, processor: ChatProcessor) -> None:
    largest = largest_image_tokens(processor.max_pixels, processor.cell)
    for width, height in itertools.product((1, 5, 31, 64, 200, 1000), repeat=2):
        if max(width, height) <= 200 * min(width, height):
            row = replace(example(made, "", None), images=(made.encoded(Image.new("1", (width, height))),))
            row = replace(row, messages=(Message("user", "<image>"),))
            (prompt,) = processor.encode_prompts([row])
            found = prompt.token_ids.count(processor.input_spec.image_token_id)
            assert processor.image_tokens(width, height) == found <= largest


def test_long_rows_are_named_and_counted(made: Any, processor: ChatProcessor) -> None:
    long = "count the red shapes and the blue ones " * 1200
    turns = [{"from": "human", "value": f"<image>{long}"}, {"from": "gpt", "value": made.response}]
    rows = read_sft(made.jsonl(made.sft(), made.sft(conversations=turns), made.sft()))
    check_lengths([rows[0], rows[2]], processor, 2048, "raise it", demonstrations=True)
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: \d+ tokens do not fit 2048; raise it"):
        check_lengths(rows, processor, 2048, "raise it", demonstrations=True)
    with pytest.raises(
        UserError,
        match=r"line 2: a sequence of \d+ positions does not fit the model's max_position_embeddings \(2048\)",
    ):
        check_lengths(rows, processor, 10**6, "raise it")
    with pytest.raises(UserError, match=r"^3 of 3 rows cannot be used"):
        check_lengths(rows, processor, 20, "raise it", demonstrations=True)


def test_prompts_that_the_engine_would_refuse(made: Any, processor: ChatProcessor) -> None:
    prompt = [{"role": "user", "content": "<image><image>How many?"}]
    images = [{"bytes": made.picture(), "path": None}] * 2
    rows = read_rlvr(made.parquet(made.rlvr(), made.rlvr(prompt=prompt, images=images)))
    room = RolloutConfig(max_model_len=256, max_response_tokens=200, images_per_prompt=2)
    check_prompts(rows, processor, room)
    with pytest.raises(UserError, match=r"row 1: 2 images, rollout\.images_per_prompt is 1"):
        check_prompts(rows, processor, replace(room, images_per_prompt=1))
    with pytest.raises(
        UserError, match=r"2 of 2 rows cannot be used(.|\n)*row 1: \d+ tokens do not fit 6; raise rollout"
    ):
        check_prompts(rows, processor, replace(room, max_response_tokens=250))
