"""M-RoPE positions, by hand and against HF's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prism_megatron.data.positions import mrope_positions
from prism_megatron.types import InputSpec, Visual

IMAGE, VIDEO = 9, 8
SPEC = InputSpec(image_token_id=IMAGE, video_token_id=VIDEO, merge_size=2, patch_dim=1, max_positions=64)


def visual(time: int, height: int, width: int, is_video: bool = False) -> Visual:
    return Visual(torch.zeros(time * height * width, 1), (time, height, width), is_video)


def test_text_image_text() -> None:
    # a 4x6-patch image merges to 2x3 tokens; text resumes after its longer side
    positions = mrope_positions([1, 2, *[IMAGE] * 6, 3], [visual(1, 4, 6)], SPEC)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_frames_of_a_video_stand_one_after_the_other_with_their_timestamps() -> None:
    positions = mrope_positions([1, VIDEO, VIDEO, 2, VIDEO, VIDEO, 3], [visual(2, 2, 4, is_video=True)], SPEC)
    assert positions.tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("tokens", "visuals", "message"),
    [
        ([1, IMAGE, 2], [visual(1, 4, 4)], "image 0 needs 4 visual tokens, the sequence has fewer"),
        ([1, 2], [visual(1, 2, 2)], "sequence came with 1 images but does not show image 0"),
        ([IMAGE, IMAGE], [visual(1, 2, 2)], "sequence shows more images than the 1 it came with"),
        ([VIDEO, 1], [visual(2, 2, 2, is_video=True)], "does not show frame 1 of video 0"),
        ([VIDEO], [visual(1, 2, 2)], "image 0 needs 1 visual tokens, the sequence has fewer"),
        ([IMAGE], [visual(1, 3, 2)], r"image 0 is 1 x 3 x 2 patches; .* multiples of the merge size \(2\): resize it"),
        ([1] * 65, [], r"a sequence of 65 positions does not fit the model's max_position_embeddings \(64\)"),
    ],
)
def test_what_does_not_fit_is_refused(tokens: list[int], visuals: list[Visual], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(tokens, visuals, SPEC)


def test_equal_to_hf_padded_or_not(tiny_checkpoint: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    from prism_megatron.data.chat import ChatProcessor
    from tools.parity.inputs import default_chats, encode_rows

    config = AutoConfig.from_pretrained(tiny_checkpoint)
    with torch.device("meta"):
        hf = Qwen3VLModel(config)
    spec = ChatProcessor(tiny_checkpoint).input_spec
    rows = encode_rows(tiny_checkpoint, default_chats())
    longest = max(len(row.token_ids) for row in rows)
    for side in ("right", "left"):
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            count = len(row.token_ids)
            position = slice(0, count) if side == "right" else slice(longest - count, longest)
            ids[number, position], real[number, position] = torch.tensor(row.token_ids), 1
        kinds = (ids == spec.image_token_id).int() + 2 * (ids == spec.video_token_id).int()
        grids = [[v.grid for row in rows for v in row.visuals if v.is_video == video] for video in (False, True)]
        hf_positions, _ = hf.get_rope_index(ids, kinds, *(torch.tensor(g) for g in grids), attention_mask=real)
        for number, row in enumerate(rows):
            ours = mrope_positions(row.token_ids, row.visuals, spec)
            assert torch.equal(ours, hf_positions[:, number, real[number].bool()])
