"""Rows too long for a micro-batch, the engine or the model, found before anything is computed.

A token of a byte-level tokenizer stands for a byte at least, so that bytes bound a text's tokens from above. Only what
is longer by that bound is tokenised, and only where the largest pictures would not fit are their sizes used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.images import MAX_ASPECT_RATIO, image_size
from prism_megatron.data.index import normal_bytes
from prism_megatron.data.lazy import Rows
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.data.rows import raise_faults
from prism_megatron.errors import UserError
from prism_megatron.types import Example, Message, PreferencePair

type PromptRow = Example | PreferencePair


def check_lengths[R: (Example, PreferencePair)](
    rows: Sequence[R],
    processor: ChatProcessor,
    room: int,
    remedy: str,
    *,
    demonstrations: bool = False,
    train_answers: bool = False,
) -> None:
    """Raise UserError, naming the rows, for prompts of more than ``room`` tokens, or positions than the model has.

    Rows whose pictures are not looked at before they are used are checked then.

    Args:
        rows: What is checked.
        processor: Gives the lengths.
        room: The most tokens that fit.
        remedy: Ends the message.
        demonstrations: Whether prompts are counted with their demonstration and its terminator.
        train_answers: Whether the answers in a prompt are tokenised on their own, for the loss.
    """
    lengths = _Lengths(processor, room, remedy, demonstrations, train_answers)
    if not isinstance(rows, Rows):
        raise_faults([fault for row in rows if (fault := lengths.fault(row))], len(rows))
        return
    suspects, is_unknown = lengths.suspects(rows)
    raise_faults([fault for i in suspects if (fault := lengths.fault(rows[i]))], len(rows))
    if is_unknown:
        rows.check_when_read(lengths.check)


def check_image_counts[R: (Example, PreferencePair)](rows: Sequence[R], most: int) -> None:
    """Raise UserError, naming the rows, for prompts of more images than the engine takes."""
    if isinstance(rows, Rows):
        counts = rows.row_index.entries["images"][rows.numbers]
        beyond = [(rows.row_index.source(rows.numbers[i]), counts[i]) for i in np.flatnonzero(counts > most)]
    else:
        beyond = [(row.source, len(row.images)) for row in rows if len(row.images) > most]
    raise_faults(
        [
            f"{source}: {n} images, rollout.images_per_prompt is {most}; raise it, or drop the row"
            for source, n in beyond
        ],
        len(rows),
    )


class _Lengths:
    """Lengths of rows in tokens, bounded or exact."""

    def __init__(
        self, processor: ChatProcessor, room: int, remedy: str, demonstrations: bool, train_answers: bool
    ) -> None:
        self._processor = processor
        self._room = room
        self._remedy = remedy
        self._demonstrations, self._train_answers = demonstrations, train_answers
        self._limit = min(room, processor.input_spec.max_positions)
        self._templates: dict[tuple[str, ...], int] = {}
        self._image_tokens = functools.cache(processor.image_tokens)
        self._largest_image = largest_image_tokens(processor.max_pixels, processor.cell)

    def check(self, row: PromptRow) -> None:
        """Raise UserError for a row that is too long."""
        if fault := self.fault(row):
            raise UserError(fault)

    def fault(self, row: PromptRow) -> str | None:
        """What is wrong with the length of a row."""
        response = row.response if self._demonstrations and isinstance(row, Example) else None
        text = self._text_bound(row, response)
        if text + len(row.images) * self._largest_image <= self._limit or text + self._of_images(row) <= self._limit:
            return None
        tokens = self._exact(row, response)
        if tokens > self._room:
            return f"{row.source}: {tokens} tokens do not fit {self._room}; {self._remedy}"
        if tokens > self._limit and (fault := self._position_fault(row, response)):
            return f"{row.source}: {fault}"
        return None

    def suspects[R: (Example, PreferencePair)](self, rows: Rows[R]) -> tuple[list[int], bool]:
        """Positions of rows that may be too long, and whether there are some of which that is not known."""
        entries = rows.row_index.entries[rows.numbers]
        around = np.array([self._around(roles) for roles in rows.row_index.roles] or [0])
        bound = around[entries["roles"]] + entries["prompt_bytes"] + 1
        if self._demonstrations:
            bound = bound + entries["response_bytes"]
        long = np.flatnonzero(bound + entries["images"].astype(np.int64) * self._largest_image > self._limit)
        suspects = []
        for i in long:
            first, count = int(entries["sizes"][i]), int(entries["images"][i])
            sizes = rows.row_index.image_sizes[first : first + 2 * count].tolist() if first >= 0 else []
            tokens = sum(map(self._image_tokens, sizes[::2], sizes[1::2]))
            if first >= 0 and bound[i] + tokens > self._limit:
                suspects.append(int(i))
        return suspects, bool((entries["sizes"][long] < 0).any())

    def _text_bound(self, row: PromptRow, response: str | None) -> int:
        """No fewer tokens than the row has without those that stand for its pictures."""
        texts = [message.content for message in row.messages] + ([] if response is None else [response])
        return self._around(tuple(message.role for message in row.messages)) + sum(map(normal_bytes, texts)) + 1

    def _of_images(self, row: PromptRow) -> int:
        return sum(self._image_tokens(*image_size(image)) for image in row.images)

    def _exact(self, row: PromptRow, response: str | None) -> int:
        ids = self._processor.prompt_ids(row.messages)
        if self._train_answers:
            ids, _ = self._processor.answered_prompt_ids(row.messages)
        return len(ids) - len(row.images) + self._of_images(row) + len(self._response_ids(response))

    def _position_fault(self, row: PromptRow, response: str | None) -> str | None:
        """What is wrong with the positions of a row, of which it has fewer than tokens. Its pictures are decoded."""
        (prompt,) = self._processor.encode_prompts([row])
        try:
            pack([TrainingSequence(prompt, self._response_ids(response))], self._processor.input_spec)
        except UserError as fault:
            return str(fault)
        return None

    def _response_ids(self, response: str | None) -> tuple[int, ...]:
        return () if response is None else (*self._processor.encode_text(response), self._processor.terminator_id)

    def _around(self, roles: Iterable[str]) -> int:
        """Bytes that the template puts around turns of these roles, its special tokens spelled out."""
        roles = tuple(roles)
        if roles not in self._templates:
            empty = [Message(role, "") for role in roles]
            self._templates[roles] = len(self._processor.rendered(empty).encode())
        return self._templates[roles]


def largest_image_tokens(max_pixels: int, cell: int) -> int:
    """Tokens of the largest picture a processor makes: of ``max_pixels``, or one cell high and as long as allowed."""
    return max(max_pixels // cell**2, math.isqrt(MAX_ASPECT_RATIO * max_pixels) // cell) + 1
