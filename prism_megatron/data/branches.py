"""The discriminator's two views of a response: perception (the caption) and reasoning (think and answer).

Teacher and student text is tokenised the same way, is whole or cut on both sides, and ends with the same terminator,
where the score is read: nothing but the content can tell them apart (spec 9.1, D1-D4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prism_megatron.config import REFERENCE_TEACHER_TOKENS
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.response import Response
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt

BranchSequences = tuple[TrainingSequence, TrainingSequence]


def branch_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, caption_block: str, reasoning_block: str
) -> BranchSequences:
    """[prompt | caption] and [prompt | think, answer]; the reasoning branch does not see the caption (spec 4.3)."""
    return _sequences(
        prompt, *((*processor.encode_text(text), processor.terminator_id) for text in (caption_block, reasoning_block))
    )


def cut_alike(
    teacher: TrainingSequence, student: TrainingSequence, max_tokens: int
) -> tuple[TrainingSequence, TrainingSequence]:
    """Both sides of a branch up to the same token, which is the end of neither, and their terminator.

    At most ``max_tokens`` of a response are left. Cut on one side only, the sides are told apart by how they end (D1).
    """
    shorter = min(len(teacher.response_ids), len(student.response_ids))
    kept = min(max_tokens, shorter - 1) - 1
    cut = (replace(s, response_ids=(*s.response_ids[:kept], s.response_ids[-1])) for s in (teacher, student))
    return next(cut), next(cut)


def reference_teacher_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, caption_block: str, reasoning_block: str
) -> BranchSequences:
    """A demonstration as the paper's code shows it (spec 1.3, 4.3): cut, or read at the first token of its padding."""

    def shown(text: str) -> tuple[int, ...]:
        tokens = processor.encode_text(text)[:REFERENCE_TEACHER_TOKENS]
        return tokens if len(tokens) == REFERENCE_TEACHER_TOKENS else (*tokens, int(processor.tokenizer.pad_token_id))

    return _sequences(prompt, shown(caption_block), shown(reasoning_block))


def reference_student_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, token_ids: Sequence[int], response: Response | None
) -> BranchSequences:
    """A response as the paper's code shows it (spec 4.3): its own tokens, cut where the caption ends, never terminated.

    Outside the grammar it is cut in half.
    """
    cut = max(1, len(token_ids) // 2)
    if response is not None:
        # The shortest prefix that holds the caption; a longer prefix holds it, too.
        low, high = 1, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if response.caption_block in processor.decode(token_ids[:middle]):
                high = middle
            else:
                low = middle + 1
        cut = low
    return _sequences(prompt, tuple(token_ids[:cut]), tuple(token_ids[cut:]))


def _sequences(prompt: EncodedPrompt, caption: tuple[int, ...], reasoning: tuple[int, ...]) -> BranchSequences:
    return TrainingSequence(prompt, caption, PERCEPTION), TrainingSequence(prompt, reasoning, REASONING)
