"""Sequences laid end to end into one packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.data.positions import mrope_positions
from prism_megatron.types import EncodedPrompt, PackedBatch


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt and the tokens after it, which the loss is on. ``branch`` is for the discriminator only."""

    prompt: EncodedPrompt
    response_ids: tuple[int, ...]
    branch: int | None = None

    def __len__(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)


def pack(
    sequences: Sequence[TrainingSequence], *, image_token_id: int, merge_size: int, pad_to_multiple: int = 1
) -> PackedBatch:
    """Lay ``sequences`` end to end. Images of a prompt shared by several sequences are kept, and encoded, once.

    ``pad_to_multiple`` (sequence parallelism) adds a last sequence of padding that no real token sees.
    """
    assert sequences, "nothing to pack"
    tokens: list[int] = []
    targets: list[int] = []
    mask: list[float] = []
    lengths: list[int] = []
    positions: list[Tensor] = []
    visual: list[Tensor] = []
    pixels: list[Tensor] = []
    grids: list[Tensor] = []
    first_row: dict[int, int] = {}
    rows = 0
    for sequence in sequences:
        prompt = sequence.prompt
        ids = prompt.token_ids + sequence.response_ids
        if id(prompt) not in first_row:
            first_row[id(prompt)] = rows
            rows += int(prompt.image_grid_thw.prod(1).sum()) // merge_size**2
            pixels.append(prompt.pixel_values)
            grids.append(prompt.image_grid_thw)
        tokens += ids
        targets += [*ids[1:], 0]
        mask += [0.0] * (len(prompt.token_ids) - 1) + [1.0] * len(sequence.response_ids) + [0.0]
        lengths.append(len(ids))
        positions.append(mrope_positions(ids, prompt.image_grid_thw, image_token_id, merge_size))
        is_visual = torch.tensor(ids) == image_token_id
        visual.append(torch.where(is_visual, is_visual.cumsum(0) - 1 + first_row[id(prompt)], -1))
    sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if padding := -len(tokens) % pad_to_multiple:
        tokens += [0] * padding
        targets += [0] * padding
        mask += [0.0] * padding
        positions.append(torch.arange(padding).expand(3, padding))
        visual.append(torch.full((padding,), -1))
        sequence_ids = torch.cat((sequence_ids, torch.full((padding,), len(lengths))))
        lengths.append(padding)
    branches = [s.branch for s in sequences if s.branch is not None]
    return PackedBatch(
        tokens=torch.tensor(tokens),
        targets=torch.tensor(targets),
        loss_mask=torch.tensor(mask),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        pixel_values=torch.cat(pixels),
        image_grid_thw=torch.cat(grids),
        visual_index=torch.cat(visual),
        sequence_ids=sequence_ids,
        branch_ids=torch.tensor(branches) if branches else None,
    )


def split_by_tokens(sequences: Sequence[TrainingSequence], max_tokens: int) -> list[list[int]]:
    """Indices of ``sequences`` in groups of at most ``max_tokens``, order kept.

    Raises ValueError for a sequence longer than that on its own.
    """
    groups: list[list[int]] = []
    room = 0
    for index, sequence in enumerate(sequences):
        if len(sequence) > max_tokens:
            raise ValueError(
                f"a sequence of {len(sequence)} tokens does not fit max_tokens_per_microbatch ({max_tokens}); raise it"
            )
        if not groups or len(sequence) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= len(sequence)
    return groups
