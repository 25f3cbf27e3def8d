"""Verdicts on rollouts: which are inside the grammar and right."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.response import Response
from prism_megatron.method import METHODS
from prism_megatron.types import Example, Message, Rollout

TEXT = "<caption>c</caption><think>t</think><answer>1</answer>"
EXAMPLE = Example("row", (Message("user", "How many?"),), (), "row 0", answer="1")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


def rollout(processor: ChatProcessor, inserted: tuple[int, ...] = (), *, finished: bool = True) -> Rollout:
    """Return a rollout with ``inserted`` tokens inside its text that the engine's text does not contain."""
    ids = processor.encode_text(TEXT)
    ids = (*ids[:3], *inserted, *ids[3:], processor.terminator_id)
    made = Rollout(ids, (0.0,) * len(ids), processor.decode(ids), finished, policy_version=0)
    assert made.text == TEXT
    return made


def judged(processor: ChatProcessor, sampled: Rollout, compat: str = "fixed") -> tuple[Response | None, bool]:
    return METHODS[compat].judge(sampled, EXAMPLE, processor)


def test_the_terminator_at_its_end_is_no_fault(processor: ChatProcessor) -> None:
    response, correct = judged(processor, rollout(processor))
    assert response is not None
    assert correct


def test_a_token_without_text_inside_is_outside_the_grammar(processor: ChatProcessor) -> None:
    """A reader of the text could not judge it."""
    special, unused = processor.tokenizer.pad_token_id, len(processor.tokenizer)
    for inserted in (special, processor.terminator_id, unused):
        assert judged(processor, rollout(processor, (inserted,))) == (None, False)


def test_the_papers_code_accepts_it(processor: ChatProcessor) -> None:
    response, _ = judged(processor, rollout(processor, (processor.tokenizer.pad_token_id,)), "reference")
    assert response is not None


def test_a_truncated_rollout_is_outside_the_grammar(processor: ChatProcessor) -> None:
    assert judged(processor, rollout(processor, finished=False)) == (None, False)
