"""Rows too long for a micro-batch, the engine or the model, found before anything is computed.

A token of a byte-level tokenizer stands for a byte at least, so that bytes bound a text's tokens from above. Only what
is longer by that bound is tokenised, and only where the largest pictures would not fit are their sizes used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.images import MAX_ASPECT_RATIO, image_size
from prism_megatron.data.index import normal_bytes
from prism_megatron.data.lazy import OverlongRow, Rows
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.data.rows import raise_faults
from prism_megatron.errors import UserError
from prism_megatron.types import Example, Message, PreferencePair

type PromptRow = Example | PreferencePair


@dataclass(frozen=True)
class LengthLimit:
    """The most that a row may be long: ``room`` tokens for its prompt, and never more positions than the model has.

    With ``demonstrations`` its demonstration and the terminator count, too; with ``train_answers`` the answers in the
    prompt are tokenised on their own, for the loss. ``remedy`` ends the message.
    """

    room: int
    remedy: str
    demonstrations: bool = False
    train_answers: bool = False


def overlong_rows[R: (Example, PreferencePair)](
    rows: Sequence[R], processor: ChatProcessor, limit: LengthLimit
) -> dict[int, str]:
    """Faults of rows that are too long, by position; rows of unknown image sizes are left out."""
    lengths = _Lengths(processor, limit)
    suspects = lengths.suspects(rows) if isinstance(rows, Rows) else range(len(rows))
    return {i: fault for i in suspects if (fault := lengths.fault(rows[i]))}


def row_lengths[R: (Example, PreferencePair)](
    rows: Sequence[R], processor: ChatProcessor, limit: LengthLimit
) -> list[int]:
    """Tokens of each row, of what ``limit`` counts."""
    lengths = _Lengths(processor, limit)
    return [lengths.exact(row) for row in rows]


def fit_lengths[R: (Example, PreferencePair)](
    rows: Rows[R], processor: ChatProcessor, limit: LengthLimit, *, drop: bool
) -> Rows[R]:
    """The rows that are not too long. Rows of unknown image sizes are checked when they are read.

    Raises UserError that names the others, unless they are to be dropped, and some are left.
    """
    faults = overlong_rows(rows, processor, limit)
    if not drop or len(faults) == len(rows):
        raise_faults(list(faults.values()), len(rows))
    fitting = rows.without(faults)
    fitting.check_when_read(_Lengths(processor, limit).check if drop else _Lengths(processor, limit).refuse)
    return fitting


def fit_image_counts[R: (Example, PreferencePair)](rows: Rows[R], most: int, *, drop: bool) -> Rows[R]:
    """The rows of no more images than the engine takes. Raises UserError as :func:`fit_lengths` does."""
    counts = rows.row_index.entries["images"][rows.numbers]
    faults = {
        int(i): f"{rows.row_index.source(rows.numbers[i])}: {counts[i]} images, rollout.images_per_prompt is {most}; "
        "raise it, or drop the row"
        for i in np.flatnonzero(counts > most)
    }
    if not drop or len(faults) == len(rows):
        raise_faults(list(faults.values()), len(rows))
    return rows.without(faults)


class _Lengths:
    """Lengths of rows in tokens, bounded or exact."""

    def __init__(self, processor: ChatProcessor, limit: LengthLimit) -> None:
        self._processor = processor
        self._limit = limit
        self._most = min(limit.room, processor.input_spec.max_positions)
        self._templates: dict[tuple[str, ...], int] = {}
        self._image_tokens = functools.cache(processor.image_tokens)
        self._largest_image = largest_image_tokens(processor.max_pixels, processor.cell)

    def check(self, row: PromptRow) -> None:
        """Raise OverlongRow for a row that is too long, which is dropped."""
        if fault := self.fault(row):
            raise OverlongRow(fault)

    def refuse(self, row: PromptRow) -> None:
        """Raise UserError for a row that is too long, which counts as a bad one."""
        if fault := self.fault(row):
            raise UserError(fault)

    def fault(self, row: PromptRow) -> str | None:
        """The fault of a row that is too long."""
        response = self._response(row)
        text = self._text_bound(row, response)
        if text + len(row.images) * self._largest_image <= self._most or text + self._of_images(row) <= self._most:
            return None
        tokens = self.exact(row)
        if tokens > self._limit.room:
            return f"{row.source}: {tokens} tokens do not fit {self._limit.room}; {self._limit.remedy}"
        if tokens > self._most and (fault := self._position_fault(row, response)):
            return f"{row.source}: {fault}"
        return None

    def suspects[R: (Example, PreferencePair)](self, rows: Rows[R]) -> list[int]:
        """Positions of rows that may be too long, of those whose image sizes are known."""
        entries = rows.row_index.entries[rows.numbers]
        around = np.array([self._around(roles) for roles in rows.row_index.roles] or [0])
        bound = around[entries["roles"]] + entries["prompt_bytes"] + 1
        if self._limit.demonstrations:
            bound = bound + entries["response_bytes"]
        suspects = []
        for i in np.flatnonzero(bound + entries["images"].astype(np.int64) * self._largest_image > self._most):
            first, count = int(entries["sizes"][i]), int(entries["images"][i])
            if first >= 0:
                sizes = rows.row_index.image_sizes[first : first + 2 * count].tolist()
                if bound[i] + sum(map(self._image_tokens, sizes[::2], sizes[1::2])) > self._most:
                    suspects.append(int(i))
        return suspects

    def _text_bound(self, row: PromptRow, response: str | None) -> int:
        """No fewer tokens than the row has without those that stand for its pictures."""
        texts = [message.content for message in row.messages] + ([] if response is None else [response])
        return self._around(tuple(message.role for message in row.messages)) + sum(map(normal_bytes, texts)) + 1

    def _of_images(self, row: PromptRow) -> int:
        return sum(self._image_tokens(*image_size(image)) for image in row.images)

    def _response(self, row: PromptRow) -> str | None:
        return row.response if self._limit.demonstrations and isinstance(row, Example) else None

    def exact(self, row: PromptRow) -> int:
        """Tokens of a row, those that stand for its pictures included."""
        ids = self._processor.prompt_ids(row.messages)
        if self._limit.train_answers:
            ids, _ = self._processor.answered_prompt_ids(row.messages)
        return len(ids) - len(row.images) + self._of_images(row) + len(self._response_ids(self._response(row)))

    def _position_fault(self, row: PromptRow, response: str | None) -> str | None:
        """The fault of a row with too many positions, of which it has fewer than tokens. Its pictures are decoded."""
        (prompt,) = self._processor.encode_prompts([row])
        try:
            pack([TrainingSequence(prompt, self._response_ids(response))], self._processor.input_spec)
        except UserError as fault:
            return str(fault)
        return None

    def _response_ids(self, response: str | None) -> tuple[int, ...]:
        return () if response is None else self._processor.response_ids(response)

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
