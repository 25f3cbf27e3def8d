"""M-RoPE positions of a sequence with images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_positions(token_ids: Sequence[int], grids: Tensor, image_token_id: int, merge_size: int) -> Tensor:
    """Positions (time, height, width) of every token, [3, L] int64.

    Text advances all three axes together. An image's tokens share one time step and spread over height and width from
    the position where the image starts; text goes on after the image's longer side. ``grids`` is [images, 3] in
    patches. Raises ValueError when the image tokens in the sequence are not those the grids describe.
    """
    pieces: list[Tensor] = []
    index, start, image = 0, 0, 0
    while index < len(token_ids):
        if token_ids[index] != image_token_id:
            run = index
            while run < len(token_ids) and token_ids[run] != image_token_id:
                run += 1
            length = run - index
            pieces.append(torch.arange(start, start + length).expand(3, length))
            start += length
            index = run
            continue
        if image >= len(grids):
            raise ValueError(f"sequence shows more images than the {len(grids)} it came with")
        t, h, w = (int(v) for v in grids[image])
        h, w = h // merge_size, w // merge_size
        length = t * h * w
        if any(token != image_token_id for token in token_ids[index : index + length]):
            raise ValueError(f"image {image} needs {length} image tokens, the sequence has fewer")
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        pieces.append(torch.stack([axis.flatten() for axis in axes]) + start)
        start += max(h, w)
        index += length
        image += 1
    if image != len(grids):
        raise ValueError(f"sequence shows {image} images but came with {len(grids)}")
    return torch.cat(pieces, dim=1) if pieces else torch.zeros(3, 0, dtype=torch.long)
