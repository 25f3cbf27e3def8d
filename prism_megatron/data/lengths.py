"""Rows too long for a micro-batch, the engine or the model, found before anything is computed.

A token of a byte-level tokenizer stands for a byte at least, so that bytes bound a text's tokens from above. Only what
is longer by that bound is tokenised, and only where the largest pictures would not fit are their sizes read.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.images import MAX_ASPECT_RATIO, image_size
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.data.rows import raise_faults
from prism_megatron.errors import UserError
from prism_megatron.types import Example, Message, PreferencePair

type PromptRow = Example | PreferencePair


def check_lengths(
    rows: Sequence[PromptRow], processor: ChatProcessor, room: int, remedy: str, *, demonstrations: bool = False
) -> None:
    """Raise UserError, naming the rows, for prompts of more than ``room`` tokens, or positions than the model has.

    With ``demonstrations`` for prompts with their demonstration and its terminator. ``remedy`` ends the message.
    """
    lengths = _Lengths(processor)
    most = processor.input_spec.max_positions
    faults = []
    for row in rows:
        response = row.response if demonstrations and isinstance(row, Example) else None
        text, limit = lengths.text_bound(row, response), min(room, most)
        if text + len(row.images) * lengths.largest_image <= limit or text + lengths.of_images(row) <= limit:
            continue
        tokens = lengths.exact(row, response)
        if tokens > room:
            faults.append(f"{row.source}: {tokens} tokens do not fit {room}; {remedy}")
        elif tokens > most and (fault := lengths.position_fault(row, response)):
            faults.append(f"{row.source}: {fault}")
    raise_faults(faults, len(rows))


class _Lengths:
    """Lengths of rows in tokens, bounded or exact."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self._templates: dict[tuple[str, ...], int] = {}
        self._images: dict[tuple[int, int], int] = {}
        self.largest_image = largest_image_tokens(processor.max_pixels, processor.cell)

    def text_bound(self, row: PromptRow, response: str | None) -> int:
        """No fewer tokens than the row has without those that stand for its pictures."""
        texts = [message.content for message in row.messages] + ([] if response is None else [response])
        return self._around(row.messages) + sum(map(_normal_bytes, texts)) + 1

    def of_images(self, row: PromptRow) -> int:
        return sum(map(self._of_image, row.images))

    def exact(self, row: PromptRow, response: str | None) -> int:
        prompt = len(self._processor.prompt_ids(row.messages)) - len(row.images)
        return prompt + self.of_images(row) + len(self._response_ids(response))

    def position_fault(self, row: PromptRow, response: str | None) -> str | None:
        """What is wrong with the positions of a row, of which it has fewer than tokens. Its pictures are decoded."""
        (prompt,) = self._processor.encode_prompts([row])
        try:
            pack([TrainingSequence(prompt, self._response_ids(response))], self._processor.input_spec)
        except UserError as fault:
            return str(fault)
        return None

    def _response_ids(self, response: str | None) -> tuple[int, ...]:
        return () if response is None else (*self._processor.encode_text(response), self._processor.terminator_id)

    def _around(self, messages: Iterable[Message]) -> int:
        """Bytes that the template puts around turns of these roles, its special tokens spelled out."""
        roles = tuple(message.role for message in messages)
        if roles not in self._templates:
            empty = [Message(role, "") for role in roles]
            self._templates[roles] = len(self._processor.rendered(empty).encode())
        return self._templates[roles]

    def _of_image(self, image: bytes) -> int:
        size = image_size(image)
        if size not in self._images:
            self._images[size] = self._processor.image_tokens(*size)
        return self._images[size]


def largest_image_tokens(max_pixels: int, cell: int) -> int:
    """Tokens of the largest picture a processor makes: of ``max_pixels``, or one cell high and as long as allowed."""
    return max(max_pixels // cell**2, math.isqrt(MAX_ASPECT_RATIO * max_pixels) // cell) + 1


def _normal_bytes(text: str) -> int:
    """Bytes of a text as the tokenizer normalises it, which may lengthen it."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return len(text.encode())
    return len(unicodedata.normalize("NFC", text).encode())
