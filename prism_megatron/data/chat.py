"""Chat messages and images to tokens and patches, with the checkpoint's own processor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.data.images import decode_image
from prism_megatron.errors import UserError
from prism_megatron.types import IMAGE_PLACEHOLDER, EncodedPrompt, Example, InputSpec, Message, PreferencePair, Visual


class ChatProcessor:
    """Tokenizer, chat template and image processor of one HF checkpoint."""

    def __init__(self, checkpoint_dir: Path) -> None:
        from transformers import AutoProcessor

        if not (checkpoint_dir / "config.json").is_file():
            raise UserError(f"{checkpoint_dir} has no config.json; give the directory of an HF Qwen3-VL checkpoint")
        self._processor = AutoProcessor.from_pretrained(checkpoint_dir)
        self.tokenizer: Any = self._processor.tokenizer
        self.terminator_id = self._special("<|im_end|>")
        self._special_ids = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._num_ids = len(self.tokenizer)
        config = json.loads((checkpoint_dir / "config.json").read_text())
        vision = config["vision_config"]
        self.input_spec = InputSpec(
            image_token_id=self._special("<|image_pad|>"),
            video_token_id=self._special("<|video_pad|>"),
            merge_size=vision["spatial_merge_size"],
            patch_dim=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            max_positions=config["text_config"]["max_position_embeddings"],
        )

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None:
            raise UserError(f"the checkpoint's tokenizer has no {token}; it is not a Qwen3-VL tokenizer")
        return int(token_id)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt up to the assistant's turn, one image token per image: what the rollout engine takes."""
        chat = [{"role": m.role, "content": _parts(m.content)} for m in messages]
        text = self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Tokens of what somebody wrote, none of them special: ``<|im_end|>`` spelled out is text, too."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, without tokens that have none."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def has_text(self, token_ids: Sequence[int]) -> bool:
        """Whether each of them is in its text: none is special, none beyond the tokenizer's vocabulary."""
        return self._special_ids.isdisjoint(token_ids) and max(token_ids, default=0) < self._num_ids

    def encode_prompts(self, rows: Sequence[Example | PreferencePair]) -> list[EncodedPrompt]:
        """Encode prompts with their images, each distinct image once; image tokens become one per merged patch.

        Raises UserError where a prompt's placeholders and its images are not as many.
        """
        distinct = list(dict.fromkeys(data for row in rows for data in row.images))
        visuals = dict(zip(distinct, self._encode_images(distinct), strict=True))
        prompts = []
        for row in rows:
            shown = tuple(visuals[data] for data in row.images)
            prompts.append(EncodedPrompt(self._expand(self.prompt_ids(row.messages), shown, row.source), shown))
        return prompts

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], source: str) -> EncodedPrompt:
        """Encode a whole chat in HF's messages format, images and videos (lists of frames) included.

        Raises UserError, quoting ``source``, for a chat the processor cannot read.
        """
        try:
            encoded = self._processor.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt", "videos_kwargs": {"do_sample_frames": False}},
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(f"{source}: not a chat this checkpoint's processor can read ({error})") from error
        images = iter(_visuals(encoded.get("pixel_values"), encoded.get("image_grid_thw"), is_video=False))
        videos = iter(_visuals(encoded.get("pixel_values_videos"), encoded.get("video_grid_thw"), is_video=True))
        parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
        kinds = [kind for part in parts for kind in ("image", "video") if kind in part or part.get("type") == kind]
        shown = tuple(next(images if kind == "image" else videos) for kind in kinds)
        return EncodedPrompt(tuple(encoded["input_ids"][0].tolist()), shown)

    def _encode_images(self, images: Sequence[bytes]) -> list[Visual]:
        if not images:
            return []
        encoded = self._processor.image_processor(images=[decode_image(data) for data in images], return_tensors="pt")
        return _visuals(encoded["pixel_values"], encoded["image_grid_thw"], is_video=False)

    def _expand(self, token_ids: Sequence[int], visuals: Sequence[Visual], source: str) -> tuple[int, ...]:
        spec = self.input_spec
        found = token_ids.count(spec.image_token_id)
        if found != len(visuals):
            raise UserError(f"{source}: the chat shows {found} images, the row has {len(visuals)}; make them match")
        remaining = iter(visuals)
        expanded: list[int] = []
        for token in token_ids:
            count = len(next(remaining).patches) // spec.merge_size**2 if token == spec.image_token_id else 1
            expanded.extend([token] * count)
        return tuple(expanded)


def _visuals(pixels: Tensor | None, grids: Tensor | None, *, is_video: bool) -> list[Visual]:
    """HF's concatenated patches, cut into images or videos by their grids."""
    if pixels is None or grids is None:
        return []
    cut = torch.split(pixels, grids.prod(1).tolist())
    # Each in memory of its own: a view pins the others' patches, and takes them along when it is sent to another rank.
    return [
        Visual(patches.clone(), (t, h, w), is_video) for patches, (t, h, w) in zip(cut, grids.tolist(), strict=True)
    ]


def _parts(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
