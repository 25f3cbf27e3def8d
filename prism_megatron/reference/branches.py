"""The discriminator's inputs in the paper's code (spec 1.3, 4.3).

A demonstration's branch is cut at 512 tokens (D1) or read at the first token of its padding (D2); a response keeps its
sampled tokens, is split where the caption ends and is never terminated (D2); outside the grammar it is split in half.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.config import REFERENCE_TEACHER_TOKENS, AlignConfig
from prism_megatron.data.branches import BranchSequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair
from prism_megatron.data.response import Response
from prism_megatron.data.samples import Sample
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt


def split_samples(
    samples: Sequence[Sample], processor: ChatProcessor, config: AlignConfig
) -> tuple[list[TrainingSequence], list[Pair]]:
    """Split responses into branches, and pair these with the demonstrations'.

    Returns:
        Both branches of every response inside the grammar, and a pair of each branch of every response with its
        prompt's demonstration, valid inside the grammar.
    """
    teachers: dict[int, BranchSequences] = {}
    students: list[TrainingSequence] = []
    pairs: list[Pair] = []
    for sample in samples:
        row, valid = sample.example, sample.response is not None
        if sample.group not in teachers:
            assert row.teacher_caption is not None
            assert row.teacher_reasoning is not None
            teachers[sample.group] = teacher_sequences(
                processor, sample.prompt, row.teacher_caption, row.teacher_reasoning
            )
        student = student_sequences(processor, sample.prompt, sample.rollout.token_ids, sample.response)
        students += student if valid else ()
        pairs += [Pair(t, s, row.id, valid) for t, s in zip(teachers[sample.group], student, strict=True)]
    return students, pairs


def teacher_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, caption_block: str, reasoning_block: str
) -> BranchSequences:
    """Return a demonstration's branches: 512 tokens, or all tokens and one of padding."""

    def encode(text: str) -> tuple[int, ...]:
        tokens = processor.encode_text(text)[:REFERENCE_TEACHER_TOKENS]
        return tokens if len(tokens) == REFERENCE_TEACHER_TOKENS else (*tokens, int(processor.tokenizer.pad_token_id))

    return _branches(prompt, encode(caption_block), encode(reasoning_block))


def student_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, token_ids: Sequence[int], response: Response | None
) -> BranchSequences:
    """Return a response's branches: its sampled tokens up to the end of the caption, and the rest.

    The first branch is the shortest prefix that contains the caption or, without a ``response``, the first half.
    """
    split = max(1, len(token_ids) // 2)
    if response is not None:
        # Every longer prefix contains the caption as well, so the shortest one is found by bisection.
        low, high = 1, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if response.caption_block in processor.decode(token_ids[:middle]):
                high = middle
            else:
                low = middle + 1
        split = low
    return _branches(prompt, tuple(token_ids[:split]), tuple(token_ids[split:]))


def _branches(prompt: EncodedPrompt, caption: tuple[int, ...], reasoning: tuple[int, ...]) -> BranchSequences:
    return TrainingSequence(prompt, caption, PERCEPTION), TrainingSequence(prompt, reasoning, REASONING)
