"""M-RoPE positions, by hand."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.data.positions import mrope_positions

IMAGE = 9


def test_text_image_text() -> None:
    # a 4x6-patch image merges to 2x3 tokens; text resumes after its longer side
    positions = mrope_positions([1, 2, *[IMAGE] * 6, 3], torch.tensor([[1, 4, 6]]), IMAGE, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([1, IMAGE, 2], [[1, 4, 4]], "image 0 needs 4 image tokens, the sequence has fewer"),
        ([1, 2], [[1, 2, 2]], "shows 0 images but came with 1"),
        ([IMAGE, IMAGE], [[1, 2, 2]], "more images than the 1 it came with"),
    ],
)
def test_mismatch_is_refused(tokens: list[int], grids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(tokens, torch.tensor(grids), IMAGE, 2)
