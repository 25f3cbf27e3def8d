"""The discriminator's two inputs from a response: perception (the caption) and reasoning (think and answer).

Teacher and student text is tokenised in the same way, is complete or truncated on both sides, and ends with the same
terminator, at which the score is read: only the content can tell them apart (spec 9.1, D1-D4).
"""

from __future__ import annotations

from dataclasses import replace

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt

BranchSequences = tuple[TrainingSequence, TrainingSequence]  # perception, reasoning


def branch_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, caption_block: str, reasoning_block: str
) -> BranchSequences:
    """Return [prompt | caption] and [prompt | think, answer]; the reasoning branch has no caption (spec 4.3)."""
    caption, reasoning = (
        (*processor.encode_text(text), processor.terminator_id) for text in (caption_block, reasoning_block)
    )
    return TrainingSequence(prompt, caption, PERCEPTION), TrainingSequence(prompt, reasoning, REASONING)


def cut_alike(
    teacher: TrainingSequence, student: TrainingSequence, max_tokens: int
) -> tuple[TrainingSequence, TrainingSequence]:
    """Truncate both sides of a branch to the same length, before the end of either, and append their terminators.

    At most ``max_tokens`` response tokens are left. If only one side were truncated, its ending would tell the sides
    apart (D1).
    """
    shorter = min(len(teacher.response_ids), len(student.response_ids))
    length = min(max_tokens, shorter - 1) - 1
    cut = (replace(s, response_ids=(*s.response_ids[:length], s.response_ids[-1])) for s in (teacher, student))
    return next(cut), next(cut)
