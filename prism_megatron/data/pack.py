"""Sequences laid end to end into one packed batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_megatron.data.positions import mrope_positions
from prism_megatron.errors import UserError
from prism_megatron.types import EncodedPrompt, InputSpec, PackedBatch, Visual


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """A prompt and the tokens after it, which the loss is on, as on the ``loss_spans`` of the prompt.

    ``branch`` is for the discriminator only.
    """

    prompt: EncodedPrompt
    response_ids: tuple[int, ...]
    branch: int | None = None

    def __len__(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def num_loss_tokens(self) -> int:
        return sum(end - start for start, end in self.prompt.loss_spans) + len(self.response_ids)


@dataclass(frozen=True)
class Padding:
    """Multiples that each sequence and the whole batch are padded to, for context and sequence parallelism."""

    sequence_multiple: int = 1
    batch_multiple: int = 1


NO_PADDING = Padding()


def pack(sequences: Sequence[TrainingSequence], spec: InputSpec, padding: Padding = NO_PADDING) -> PackedBatch:
    """Lay ``sequences`` end to end; with none, a batch of padding that trains nothing.

    Images that several sequences show are kept, and encoded, once. Padding comes after a sequence's last token, where
    no real token sees it, and may be a last sequence of its own.
    """
    tokens: list[int] = []
    targets: list[int] = []
    mask: list[float] = []
    lengths: list[int] = []
    last: list[int] = []
    positions: list[Tensor] = []
    visual: list[Tensor] = []
    images = _Images(spec)
    of_prompt: dict[int, tuple[Tensor, Tensor]] = {}
    for sequence in sequences:
        prompt = sequence.prompt
        if id(prompt) not in of_prompt:
            of_prompt[id(prompt)] = (mrope_positions(prompt.token_ids, prompt.visuals, spec), images.rows(prompt))
        prompt_positions, prompt_rows = of_prompt[id(prompt)]
        extra = -len(sequence) % padding.sequence_multiple
        ids = prompt.token_ids + sequence.response_ids
        last.append(len(tokens) + len(ids) - 1)
        tokens += [*ids, *[0] * extra]
        targets += [*ids[1:], *[0] * (extra + 1)]
        mask += (_prompt_mask(prompt) + [1.0] * len(sequence.response_ids))[1:] + [0.0] * (extra + 1)
        lengths.append(len(ids) + extra)
        positions += [prompt_positions, _response_positions(prompt_positions, sequence.response_ids, spec, extra)]
        visual += [prompt_rows, torch.full((len(sequence.response_ids) + extra,), -1)]
    rest = -len(tokens) % padding.batch_multiple if tokens else max(padding.sequence_multiple, padding.batch_multiple)
    if rest:
        tokens += [0] * rest
        targets += [0] * rest
        mask += [0.0] * rest
        positions.append(torch.arange(rest).expand(3, rest))
        visual.append(torch.full((rest,), -1))
        lengths.append(rest)
    pixel_values, grid_thw = images.all()
    branches = [s.branch for s in sequences]
    return PackedBatch(
        tokens=torch.tensor(tokens),
        targets=torch.tensor(targets),
        loss_mask=torch.tensor(mask),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        pixel_values=pixel_values,
        grid_thw=grid_thw,
        visual_index=torch.cat(visual),
        sequence_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        last_tokens=torch.tensor(last, dtype=torch.long),
        branch_ids=None if None in branches else torch.tensor(branches, dtype=torch.long),
    )


def pack_shared(sequences: Sequence[TrainingSequence], spec: InputSpec, padding: Padding = NO_PADDING) -> PackedBatch:
    """Pack as :func:`pack` does, but a prompt that several sequences of a branch share only once, so computed once.

    Every such prompt is a sequence of its own, and so is every response, whose ``prefix`` is its prompt. What stands
    there for training (targets, mask) is of no use. Sequences must not be padded one by one.
    """
    heads: dict[tuple[int, int | None], int] = {}
    segments: list[TrainingSequence] = []
    prefix: list[int] = []
    nothing = EncodedPrompt(())
    for sequence in sequences:
        key = _prompt_of(sequence)
        if key not in heads:
            heads[key] = len(segments)
            segments.append(TrainingSequence(sequence.prompt, (), sequence.branch))
            prefix.append(-1)
        segments.append(TrainingSequence(nothing, sequence.response_ids, sequence.branch))
        prefix.append(heads[key])
    batch = pack(segments, spec, padding)
    bounds = batch.cu_seqlens.tolist()
    prefix += [-1] * (len(bounds) - 1 - len(prefix))
    ends = [int(batch.position_ids[:, low:high].max()) + 1 for low, high in itertools.pairwise(bounds)]
    moved = torch.tensor([0 if before < 0 else ends[before] for before in prefix])
    positions = batch.position_ids + moved[batch.sequence_ids]
    if int(positions.max()) >= spec.max_positions:
        raise UserError(
            f"a sequence of {int(positions.max()) + 1} positions does not fit the model's max_position_embeddings "
            f"({spec.max_positions}); shorten its text or its images"
        )
    return replace(batch, prefix=torch.tensor(prefix), position_ids=positions)


def split_by_tokens(
    sequences: Sequence[TrainingSequence], max_tokens: int, *, share_prompts: bool = False
) -> list[list[int]]:
    """Indices of ``sequences`` in groups of at most ``max_tokens``, order kept.

    With ``share_prompts`` a prompt counts once for all of a group's branch, as :func:`pack_shared` lays it down.
    Raises UserError for a sequence longer than that on its own.
    """
    groups: list[list[int]] = []
    room = 0
    prompts: set[tuple[int, int | None]] = set()
    for index, sequence in enumerate(sequences):
        if len(sequence) > max_tokens:
            raise UserError(
                f"a sequence of {len(sequence)} tokens does not fit max_tokens_per_microbatch ({max_tokens}); raise it"
            )
        prompt = _prompt_of(sequence)
        new = len(sequence.response_ids) if share_prompts and prompt in prompts else len(sequence)
        if not groups or new > room:
            groups.append([])
            prompts.clear()
            room, new = max_tokens, len(sequence)
        groups[-1].append(index)
        prompts.add(prompt)
        room -= new
    return groups


def _prompt_of(sequence: TrainingSequence) -> tuple[int, int | None]:
    """A key that is the same for sequences of a branch that start from the same prompt."""
    return id(sequence.prompt), sequence.branch


def _prompt_mask(prompt: EncodedPrompt) -> list[float]:
    """1 for the tokens of a prompt that are trained on."""
    mask = [0.0] * len(prompt.token_ids)
    for start, end in prompt.loss_spans:
        mask[start:end] = [1.0] * (end - start)
    return mask


class _Images:
    """The distinct images of a batch, in the order they are first shown."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec = spec
        self._visuals: list[Visual] = []
        self._first_row: dict[int, int] = {}
        self._count = 0

    def rows(self, prompt: EncodedPrompt) -> Tensor:
        """Row of the merged visual features behind each token of ``prompt``, -1 for text, [L] int64."""
        rows: list[Tensor] = []
        for visual in prompt.visuals:
            count = len(visual.patches) // self._spec.merge_size**2
            if id(visual) not in self._first_row:
                self._first_row[id(visual)] = self._count
                self._visuals.append(visual)
                self._count += count
            rows.append(torch.arange(count) + self._first_row[id(visual)])
        ids = torch.tensor(prompt.token_ids, dtype=torch.long)
        is_visual = (ids == self._spec.image_token_id) | (ids == self._spec.video_token_id)
        index = torch.full_like(ids, -1)
        index[is_visual] = torch.cat(rows) if rows else index.new_empty(0)
        return index

    def all(self) -> tuple[Tensor, Tensor]:
        """Patches [P, patch_dim] and grids [images, 3]: of one blank image where there is none.

        The vision tower then runs on every rank whatever its rows show, so that no rank waits for another's gradient.
        """
        merge = self._spec.merge_size
        visuals = self._visuals or [Visual(torch.zeros(merge**2, self._spec.patch_dim), (1, merge, merge))]
        return torch.cat([v.patches for v in visuals]), torch.tensor([v.grid for v in visuals])


def _response_positions(prompt_positions: Tensor, response: Sequence[int], spec: InputSpec, extra: int) -> Tensor:
    """Positions of the text after a prompt and of ``extra`` padding, [3, R + extra]."""
    if not {spec.image_token_id, spec.video_token_id}.isdisjoint(response):
        raise UserError("a response contains an image or video token, which has no picture behind it; drop the row")
    start = int(prompt_positions.max()) + 1 if prompt_positions.numel() else 0
    if start + len(response) > spec.max_positions:
        raise UserError(
            f"a sequence of {start + len(response)} positions does not fit the model's max_position_embeddings "
            f"({spec.max_positions}); shorten its text or its images"
        )
    return torch.arange(start, start + len(response) + extra).expand(3, -1)
