"""Synthetic rollouts, to measure a stage's training part without an engine.

Responses of the built-in task are other rows' demonstrations. For other images they are random words in the response
format, ``--response-tokens`` long with their terminator. All responses are well-formed, and each prompt has correct and
incorrect ones, labelled at random.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_megatron.config import AlignConfig, RLVRConfig, WarmupConfig
from prism_megatron.data.dataset import read_alignment
from prism_megatron.data.pairs import Pair
from prism_megatron.data.response import parse_response, render_response
from prism_megatron.data.samples import Sample
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import read_sizes
from prism_megatron.stages.warmup import pairs_of_row
from prism_megatron.types import EncodedPrompt, Example, PreferencePair, Rollout
from tools.bench.inputs import Settings, TrainingConfig, image_rows, mock_row

_WORDS = 64  # distinct words
Group = list[Sample]  # the responses to one prompt


def sampled_groups(settings: Settings, config: AlignConfig | RLVRConfig, processor: Any, count: int) -> list[Group]:
    """Return samples of ``count`` prompts, the same on every rank, with uniform log-probabilities of the engine.

    They have no policy version, so that no stage compares its log-probabilities with the engine's.
    """
    logprob = -math.log(read_sizes(Path(config.model.hf_checkpoint)).text["vocab_size"])
    groups = []
    for number, row in enumerate(_answered(settings, config, processor, count, config.rollout.samples_per_prompt)):
        coins, group = random.Random(number), []
        for index, text in enumerate(row.responses):
            ids = (*processor.encode_text(text), processor.terminator_id)
            rollout = Rollout(ids, (logprob,) * len(ids), text, finished=True, policy_version=None)
            response = parse_response(text)
            correct = index == 0 or (index > 1 and coins.random() < 0.5)  # the first is correct, the second is not
            group.append(Sample(row.example, row.prompt, rollout, response, correct, number))
        groups.append(group)
    return groups


def preference_rows(settings: Settings, config: WarmupConfig, processor: Any, count: int) -> list[list[Pair]]:
    """Return the pairs of both branches for ``count`` prompts: the demonstration and one response."""
    rows = []
    for row in _answered(settings, config, processor, count, 1):
        demonstration, response = (parse_response(str(text)) for text in (row.example.response, *row.responses))
        assert demonstration is not None
        assert response is not None
        line = PreferencePair(
            row.example.id,
            row.example.messages,
            row.example.images,
            row.example.source,
            demonstration.caption_block,
            demonstration.reasoning_block,
            response.caption_block,
            response.reasoning_block,
        )
        rows.append(pairs_of_row(line, row.prompt, processor, config))
    return rows


@dataclass(frozen=True)
class _Answered:
    """Row with its demonstration, its encoded prompt, and the texts of responses to it."""

    example: Example
    prompt: EncodedPrompt
    responses: tuple[str, ...]


def _answered(settings: Settings, config: TrainingConfig, processor: Any, count: int, samples: int) -> list[_Answered]:
    if settings.images == "shapes":
        rows = list(read_alignment(Path(config.data))[:count])
        texts = [tuple(str(rows[(n + 1 + j) % count].response) for j in range(samples)) for n in range(count)]
    else:
        source = _RandomTexts(processor, settings.response_tokens)
        texts = [tuple(source.draw(f"{n}/{j}") for j in range(samples)) for n in range(count)]
        rows = [_demonstrated(row, source) for row in _asked(settings, count)]
    if settings.images == "mock":
        prompts = [mock_row(processor.input_spec, settings, n).prompt for n in range(count)]
    else:
        prompts = processor.encode_prompts(rows)
    return [_Answered(*each) for each in zip(rows, prompts, texts, strict=True)]


def _asked(settings: Settings, count: int) -> list[Example]:
    if settings.images == "mock":
        return [Example(f"mock {number}", (), (), "--images mock") for number in range(count)]
    return image_rows(settings, count)


def _demonstrated(row: Example, source: _RandomTexts) -> Example:
    text = source.draw(row.id)
    response = parse_response(text)
    assert response is not None
    return replace(
        row,
        response=text,
        answer=response.answer,
        teacher_caption=response.caption_block,
        teacher_reasoning=response.reasoning_block,
    )


class _RandomTexts:
    """Random well-formed responses of single-token words. Raises UserError if they do not fit the length."""

    def __init__(self, processor: Any, tokens: int) -> None:
        bare = len(processor.encode_text(render_response(" x", " x", " x"))) - 3 * len(processor.encode_text(" x"))
        tags = bare + 1  # the terminator
        if tokens < tags + 3:
            raise UserError(
                f"--response-tokens must be at least {tags + 3}, got {tokens}: tags and terminator take {tags}, and "
                "each of the three blocks has a word"
            )
        vocabulary = sorted(processor.tokenizer.get_vocab())
        known = (
            f" {token[1:]}" for token in vocabulary if re.fullmatch("Ġ[a-z]+", token)
        )  # Ġ is a space in the vocabulary
        self._words = [word for word in known if len(processor.encode_text(word)) == 1][:_WORDS]
        words = tokens - tags
        caption = max((words - 1) * 2 // 5, 1)
        self._lengths = (caption, words - 1 - caption, 1)

    def draw(self, seed: str) -> str:
        generator = random.Random(seed)
        return render_response(*("".join(generator.choices(self._words, k=length)) for length in self._lengths))
