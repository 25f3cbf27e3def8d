"""From rollouts to samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.parallel import cpu

cpu.install()

from prism_megatron.data.chat import ChatProcessor  # noqa: E402
from prism_megatron.data.samples import Sample  # noqa: E402
from prism_megatron.method import METHODS  # noqa: E402
from prism_megatron.stages.rollouts import as_sample  # noqa: E402
from prism_megatron.types import EncodedPrompt, Example, Message, Rollout  # noqa: E402

TEXT = "<caption>c</caption><think>t</think><answer>1</answer>"
EXAMPLE = Example("row", (Message("user", "How many?"),), (), "row 0", answer="1")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


def sample(processor: ChatProcessor, inserted: tuple[int, ...], compat: str = "fixed") -> Sample:
    """What becomes of a rollout with these tokens within its text, which the engine does not show."""
    ids = processor.encode_text(TEXT)
    ids = (*ids[:3], *inserted, *ids[3:], processor.terminator_id)
    rollout = Rollout(ids, (0.0,) * len(ids), processor.decode(ids), finished=True, policy_version=0)
    assert rollout.text == TEXT
    return as_sample(processor, EXAMPLE, EncodedPrompt((1,)), rollout, 0, METHODS[compat].judge)


def test_the_terminator_at_its_end_is_no_fault(processor: ChatProcessor) -> None:
    whole = sample(processor, ())
    assert whole.response is not None
    assert whole.correct


def test_a_token_without_text_inside_is_outside_the_grammar(processor: ChatProcessor) -> None:
    """Nobody who reads the text could judge it."""
    special, unused = processor.tokenizer.pad_token_id, len(processor.tokenizer)
    for inserted in (special, processor.terminator_id, unused):
        found = sample(processor, (inserted,))
        assert found.response is None
        assert not found.correct


def test_the_papers_code_lets_it_pass(processor: ChatProcessor) -> None:
    assert sample(processor, (processor.tokenizer.pad_token_id,), "reference").response is not None


def test_a_rollout_that_was_cut_is_outside_the_grammar(processor: ChatProcessor) -> None:
    whole = sample(processor, ())
    cut = replace(whole.rollout, finished=False)
    assert as_sample(processor, EXAMPLE, whole.prompt, cut, 0).response is None
