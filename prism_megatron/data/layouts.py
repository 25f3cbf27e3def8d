"""Chats and answers in the columns of common data sets, as the turns and texts that readers expect.

A row is a chat (``conversations``, ``messages`` or verl's ``prompt``), or, as in LLaMA-Factory's alpaca files,
ms-swift's queries, geometry3k, MMK12, ViRL39K or R1-V, a question with its answer in columns of their own. There a
question that does not say where its images are has them before its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prism_megatron.data.fields import answer_text, optional_text, struct_field, text_field
from prism_megatron.data.response import render_response
from prism_megatron.data.rows import from_json, required
from prism_megatron.errors import UserError
from prism_megatron.types import IMAGE_PLACEHOLDER

CHATS = ("conversations", "messages")
QUESTIONS = ("instruction", "query", "problem", "question")
ANSWERS = ("output", "response", "solution", "answer")
CAPTIONS, REASONINGS = ("caption", "visual_description"), ("think", "reasoning")
SFT_COLUMNS = (*CHATS, *QUESTIONS)
SFT_OTHERS = ("input", "history", "system", *ANSWERS, *CAPTIONS, *REASONINGS)
PROMPTS = ("prompt", *CHATS, *QUESTIONS)
TRUTHS = ("reward_model", "answer", "solution", "ground_truth")

_TAGGED = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def demonstration_turns(fields: Mapping[str, Any], images: int, source: str) -> Any:
    """The turns of a demonstration, the last one the assistant's."""
    if _first(fields, CHATS) is not None:
        return _first(fields, CHATS)
    turns = _asked(fields, images, source)
    caption, reasoning, answer = (_text(fields, names, source) for names in (CAPTIONS, REASONINGS, ("answer",)))
    if caption and reasoning and answer:
        return [*turns, {"role": "assistant", "content": render_response(caption, reasoning, answer)}]
    content = text_field(required(fields, ANSWERS, source), "the answer", source)
    return [*turns, {"role": "assistant", "content": content}]


def prompt_turns(fields: Mapping[str, Any], images: int, source: str) -> Any:
    """The turns of a prompt. A demonstration after it is left out."""
    turns = from_json(_first(fields, ("prompt", *CHATS)))
    if turns is None or isinstance(turns, str):
        system = optional_text(fields, "system", source)
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *_asked(fields if turns is None else {"question": turns}, images, source)]
    if fields.get("prompt") is None and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return turns[:-1] if _first(turns[-1], ("role", "from")) in ("assistant", "gpt") else turns
    return turns


def ground_truth(fields: Mapping[str, Any], source: str) -> str | None:
    """The right answer: ``reward_model.ground_truth``, else a column of its own, without ``<answer>`` tags."""
    reward_model = struct_field(fields.get("reward_model"), "reward_model", source)
    for value, column in (
        (reward_model.get("ground_truth"), "reward_model.ground_truth"),
        *((fields.get(name), name) for name in TRUTHS[1:]),
    ):
        if (text := answer_text(value, column, source)) is not None:
            tagged = _TAGGED.fullmatch(text)
            return tagged[1].strip() if tagged else text
    return None


def _asked(fields: Mapping[str, Any], images: int, source: str) -> list[dict[str, str]]:
    """The turns up to a question, its own."""
    question = text_field(required(fields, QUESTIONS, source), "the question", source)
    if more := optional_text(fields, "input", source):
        question = f"{question}\n{more}"
    turns = _history(fields, source)
    if not any(IMAGE_PLACEHOLDER in text for text in (question, *(turn["content"] for turn in turns))):
        question = IMAGE_PLACEHOLDER * images + question
    return [*turns, {"role": "user", "content": question}]


def _history(fields: Mapping[str, Any], source: str) -> list[dict[str, str]]:
    """Earlier turns: pairs of a question and an answer."""
    history = from_json(fields.get("history")) or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise UserError(f"{source}: history must be a list of [question, answer]; correct or drop the row")
    return [
        {"role": role, "content": text_field(text, "history", source)}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(fields: Mapping[str, Any], names: tuple[str, ...], source: str) -> str | None:
    return next((text for name in names if (text := optional_text(fields, name, source))), None)
