"""M-RoPE positions of a sequence with images and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.types import InputSpec, Visual


def mrope_positions(token_ids: Sequence[int], visuals: Sequence[Visual], spec: InputSpec) -> Tensor:
    """Positions (time, height, width) of every token, [3, L] int64.

    Text advances all three axes together. The tokens of an image, or of one frame of a video, share a time step and
    spread over height and width from the position where it starts; text goes on after its longer side. (The
    timestamps written between frames distinguish them.) Raises UserError when the visual tokens in the sequence are not
    those that ``visuals`` need, and when a position lies outside the model's table.
    """
    visual_tokens = (spec.image_token_id, spec.video_token_id)
    frames = _frames(visuals, spec)
    pieces: list[Tensor] = []
    index, start = 0, 0
    while index < len(token_ids):
        if token_ids[index] not in visual_tokens:
            run = index
            while run < len(token_ids) and token_ids[run] not in visual_tokens:
                run += 1
            pieces.append(torch.arange(start, start + run - index).expand(3, run - index))
            start += run - index
            index = run
            continue
        what, height, width, token = next(frames, ("", 0, 0, -1))
        if not what:
            raise UserError(f"sequence shows more images than the {len(visuals)} it came with")
        if any(found != token for found in token_ids[index : index + height * width]):
            raise UserError(f"{what} needs {height * width} visual tokens, the sequence has fewer")
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pieces.append(torch.stack((torch.zeros_like(rows), rows, columns)).flatten(1) + start)
        start += max(height, width)
        index += height * width
    if left := next(frames, None):
        raise UserError(f"sequence came with {len(visuals)} images but does not show {left[0]}")
    if start > spec.max_positions:
        raise UserError(
            f"a sequence of {start} positions does not fit the model's max_position_embeddings "
            f"({spec.max_positions}); shorten its text or its images"
        )
    return torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long)


def _frames(visuals: Sequence[Visual], spec: InputSpec) -> Iterator[tuple[str, int, int, int]]:
    """The name of each run of visual tokens, its merged height and width, and its token."""
    merge = spec.merge_size
    for number, visual in enumerate(visuals):
        time, height, width = visual.grid
        if height % merge or width % merge or not time * height * width:
            raise UserError(
                f"image {number} is {time} x {height} x {width} patches; height and width must be multiples of the "
                f"merge size ({merge}): resize it"
            )
        for frame in range(time):
            what = f"frame {frame} of video {number}" if visual.is_video else f"image {number}"
            token = spec.video_token_id if visual.is_video else spec.image_token_id
            yield what, height // merge, width // merge, token
