"""Chat messages and images to tokens and patches, with the checkpoint's own processor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from prism_megatron.types import EncodedPrompt, Example, Message, PreferencePair

IMAGE_PLACEHOLDER = "<image>"


class ChatProcessor:
    """Tokenizer, chat template and image processor of one HF checkpoint."""

    def __init__(self, checkpoint_dir: Path) -> None:
        from transformers import AutoProcessor

        if not (checkpoint_dir / "config.json").is_file():
            raise ValueError(f"{checkpoint_dir} has no config.json; give the directory of an HF Qwen3-VL checkpoint")
        self._processor = AutoProcessor.from_pretrained(checkpoint_dir)
        self.tokenizer: Any = self._processor.tokenizer
        self.merge_size = int(self._processor.image_processor.merge_size)
        self.image_token_id = self._special("<|image_pad|>")
        self.terminator_id = self._special("<|im_end|>")

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None:
            raise ValueError(f"the checkpoint's tokenizer has no {token}; it is not a Qwen3-VL tokenizer")
        return int(token_id)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt up to the assistant's turn, one image token per image: what the rollout engine takes."""
        chat = [{"role": m.role, "content": _parts(m.content)} for m in messages]
        text = self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def encode_prompts(self, rows: Sequence[Example | PreferencePair]) -> list[EncodedPrompt]:
        """Encode prompts with their images; image tokens are expanded to one per merged patch."""
        images = [decode_image(data) for row in rows for data in row.images]
        encoded = self._processor.image_processor(images=images, return_tensors="pt") if images else None
        prompts, patch, image = [], 0, 0
        for row in rows:
            if encoded is None:
                raise ValueError(f"{row.source}: a prompt without an image; this trainer needs one")
            grids = encoded["image_grid_thw"][image : image + len(row.images)]
            counts = grids.prod(1)
            pixels = encoded["pixel_values"][patch : patch + int(counts.sum())]
            tokens = self._expand(self.prompt_ids(row.messages), [int(c) // self.merge_size**2 for c in counts])
            prompts.append(EncodedPrompt(tokens, pixels, grids))
            patch, image = patch + int(counts.sum()), image + len(row.images)
        return prompts

    def _expand(self, token_ids: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
        remaining = iter(counts)
        expanded: list[int] = []
        for token in token_ids:
            expanded.extend([token] * next(remaining) if token == self.image_token_id else [token])
        return tuple(expanded)


def decode_image(data: bytes) -> Image.Image:
    """An encoded image as RGB. The readers have already refused what cannot be decoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def _parts(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
