"""Rows that fit nowhere are found before the first iteration, and no other row is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize

from prism_megatron.config import apply_overrides
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr, read_sft
from prism_megatron.data.lengths import LengthLimit, fit_lengths, largest_image_tokens, overlong_rows
from prism_megatron.data.rows import ReadOptions
from prism_megatron.errors import UserError
from prism_megatron.stages.rollouts import fit_prompts
from prism_megatron.stages.sft import demonstrations, fit_demonstrations, length_limit
from prism_megatron.types import Example, Message
from recipes import tiny

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
    return not overlong_rows([row], processor, LengthLimit(room, "raise it", demonstrations=True))


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
    limit = LengthLimit(2048, "raise it", demonstrations=True)
    assert overlong_rows([rows[0], rows[2]], processor, limit) == {}
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: \d+ tokens do not fit 2048; raise it"):
        fit_lengths(rows, processor, limit, drop=False)
    with pytest.raises(
        UserError,
        match=r"line 2: a sequence of \d+ positions does not fit the model's max_position_embeddings \(2048\)",
    ):
        fit_lengths(rows, processor, LengthLimit(10**6, "raise it"), drop=False)
    for drop in (False, True):
        with pytest.raises(UserError, match=r"^3 of 3 rows cannot be used"):
            fit_lengths(rows, processor, LengthLimit(20, "raise it", demonstrations=True), drop=drop)


@pytest.mark.parametrize("known", [True, False])
def test_long_rows_are_dropped_and_listed(made: Any, processor: ChatProcessor, known: bool) -> None:
    long = "count the red shapes and the blue ones " * 1200
    turns = [{"from": "human", "value": f"<image>{long}"}, {"from": "gpt", "value": made.response}]
    path = made.jsonl(*[made.sft(id=i, **({"conversations": turns} if i in (1, 2) else {})) for i in range(4)])
    options = ReadOptions(skip_bad_rows=True, check_images_max_rows=10 * known)
    rows = fit_lengths(read_sft(path, options), processor, LengthLimit(2048, "raise it", True), drop=True)
    assert [row.id for row in rows] == (["0", "3"] if known else ["0", "3", "3", "3"])
    report = made.folder / "skipped_rows.jsonl"
    rows.report_skipped(report, known=True, new=True)
    listed = [json.loads(line) for line in report.read_text().splitlines()]
    assert [entry["source"].rpartition(" ")[2] for entry in listed] == ["2", "3"]
    assert all("tokens do not fit 2048; raise it" in entry["fault"] for entry in listed)
    with pytest.raises(UserError, match=r"line 2: .* tokens do not fit"):
        list(fit_lengths(read_sft(path, options), processor, LengthLimit(2048, "raise it", True), drop=False))


def test_a_demonstration_is_truncated_where_its_prompt_fits(made: Any, processor: ChatProcessor) -> None:
    prompt = [{"from": "human", "value": "<image>How many?"}]
    texts = ("4", "one two three four five six " * 40)
    rows = read_sft(made.jsonl(*[made.sft(conversations=[*prompt, {"from": "gpt", "value": text}]) for text in texts]))
    whole = [len(sequence) for sequence in demonstrations(rows, processor)]
    config = apply_overrides(tiny.tiny_sft(), ["dataset.overlong=truncate", "max_tokens_per_microbatch=60"])
    rows = fit_demonstrations(rows, processor, config)
    short, cut = demonstrations(rows, processor, length_limit(config))
    assert (len(short), len(cut)) == (whole[0], 60)
    assert cut.response_ids == processor.encode_text(texts[1])[: len(cut.response_ids)], "no terminator where it is cut"
    config = replace(config, max_tokens_per_microbatch=len(short.prompt.token_ids))
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        fit_demonstrations(rows, processor, config)


def test_prompts_that_the_engine_would_refuse(made: Any, processor: ChatProcessor) -> None:
    prompt = [{"role": "user", "content": "<image><image>How many?"}]
    images = [{"bytes": made.picture(), "path": None}] * 2
    rows = read_rlvr(made.parquet(made.rlvr(), made.rlvr(prompt=prompt, images=images)))
    config = apply_overrides(
        tiny.tiny_rlvr(),
        ["rollout.max_model_len=256", "rollout.max_response_tokens=200", "rollout.images_per_prompt=2"],
    )
    assert len(fit_prompts(rows, processor, config)) == 2
    config.dataset.overlong = "error"
    config.rollout.images_per_prompt = 1
    with pytest.raises(UserError, match=r"row 1: 2 images, rollout\.images_per_prompt is 1"):
        fit_prompts(rows, processor, config)
    config.rollout.images_per_prompt, config.rollout.max_response_tokens = 2, 250
    with pytest.raises(
        UserError, match=r"2 of 2 rows cannot be used(.|\n)*row 1: \d+ tokens do not fit 6; raise rollout"
    ):
        fit_prompts(rows, processor, config)
    config.dataset.overlong, config.rollout.images_per_prompt, config.rollout.max_response_tokens = "drop", 1, 200
    assert [row.images for row in fit_prompts(rows, processor, config)] == [(made.picture(),)]


@pytest.mark.parametrize("limits", [(0, 0), (0, 16384), (40_000, 65_536)])
def test_images_are_scaled_as_qwens_own_tool_does(made: Any, tiny_checkpoint: Path, limits: tuple[int, int]) -> None:
    processor = ChatProcessor(tiny_checkpoint, *limits)
    low, high = limits
    assert processor.max_pixels == (high or ChatProcessor(tiny_checkpoint).max_pixels)
    for width, height in itertools.product((5, 31, 64, 200, 1000), repeat=2):
        if max(width, height) > 200 * min(width, height):
            continue
        row = replace(example(made, "", None), images=(made.encoded(Image.new("1", (width, height))),))
        (prompt,) = processor.encode_prompts([replace(row, messages=(Message("user", "<image>"),))])
        (visual,) = prompt.visuals
        rows, columns = (side * processor.cell // processor.input_spec.merge_size for side in visual.grid[1:])
        if low and high:
            assert (rows, columns) == smart_resize(height, width, processor.cell, low, high)
        assert processor.image_tokens(width, height) == prompt.token_ids.count(processor.input_spec.image_token_id)


def test_pixel_limits_that_contradict_each_other(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.min_pixels \(9000\) must be at most dataset\.max_pixels \(8000;"):
        ChatProcessor(tiny_checkpoint, 9000, 8000)
