"""The discriminator's two views of a response: perception (the caption) and reasoning (think and answer).

Teacher and student text is tokenised the same way, whole, and ends with the same terminator, where the score is read:
nothing but the content can tell them apart (spec 9.1, D1-D4).
"""

from __future__ import annotations

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt


def branch_sequences(
    processor: ChatProcessor, prompt: EncodedPrompt, caption_block: str, reasoning_block: str
) -> tuple[TrainingSequence, TrainingSequence]:
    """[prompt | caption] and [prompt | think, answer]; the reasoning branch does not see the caption (spec 4.3)."""
    perception, reasoning = (
        TrainingSequence(prompt, (*processor.encode_text(text), processor.terminator_id), branch)
        for branch, text in ((PERCEPTION, caption_block), (REASONING, reasoning_block))
    )
    return perception, reasoning
