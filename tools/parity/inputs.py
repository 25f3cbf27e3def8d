"""Inputs of the parity check: chats in HF's messages format, encoded once for both sides."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.shapes import ShapesConfig, sample_scenes
from prism_megatron.errors import UserError
from prism_megatron.types import EncodedPrompt, Visual


def default_chats() -> list[list[dict[str, Any]]]:
    """Return chats with text only, an image, images of two sizes, videos, and a long text answer."""
    scenes = sample_scenes(6, ShapesConfig())
    small, wide, tall = scenes[0], scenes[1].resize((160, 64)), scenes[2].resize((64, 128))
    frames = [scene.resize((64, 96)) for scene in scenes[2:6]]

    def chat(answer: str, *parts: Any) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    def image(picture: Any) -> dict[str, Any]:
        return {"type": "image", "image": picture}

    def video(pictures: Any) -> dict[str, Any]:
        return {"type": "video", "video": pictures}

    return [
        chat("three red circles and a blue square", "How many objects are red, and which one is not?"),
        chat("yes", image(small), "Is the red circle left of the blue square?"),
        chat("the first has more", image(wide), "and", image(tall), "Which of the two pictures has more objects?"),
        chat("a triangle moves down", video(frames), "What happens here?"),
        chat("two", "A film:", video(frames[:2]), "a picture:", image(small), "How many circles are in both?"),
        chat("- top: none, none, red circle\n- middle: none, none, none\n" * 3, "Describe an empty page."),
        chat("no", image(tall), "Is it empty?"),
        chat("four", image(small), image(small), "How many objects are in the two together?"),
    ]


def read_chats(path: Path) -> list[list[dict[str, Any]]]:
    """Read one chat per line in HF's messages format, with images by path relative to the file.

    Raises UserError with the number of a line that is not a chat.
    """
    chats = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            chat = record["messages"] if isinstance(record, dict) else record
            for message in chat:
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if isinstance(part.get("image"), str):
                        part["image"] = str(path.parent / part["image"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a chat in HF's messages format ({error!r})") from error
        chats.append(chat)
    if not chats:
        raise UserError(f"{path}: no chats; write one per line")
    return chats


def encode_rows(checkpoint: Path, chats: Sequence[Sequence[dict[str, Any]]]) -> list[EncodedPrompt]:
    processor = ChatProcessor(checkpoint)
    return [processor.encode_chat(chat, f"chat {number}") for number, chat in enumerate(chats)]


def save_rows(rows: Sequence[EncodedPrompt], path: Path) -> None:
    """Write rows for the ranks, so that all have the same numbers."""
    tensors: dict[str, Tensor] = {}
    for number, row in enumerate(rows):
        tensors[f"{number}.ids"] = torch.tensor(row.token_ids)
        for index, visual in enumerate(row.visuals):
            tensors[f"{number}.{index}.patches"] = visual.patches.contiguous()
            tensors[f"{number}.{index}.grid"] = torch.tensor([*visual.grid, int(visual.is_video)])
    save_file(tensors, path)


def load_rows(path: Path) -> list[EncodedPrompt]:
    tensors = load_file(path)
    rows = []
    for number in itertools.takewhile(lambda n: f"{n}.ids" in tensors, itertools.count()):
        visuals = []
        for index in itertools.takewhile(lambda i: f"{number}.{i}.grid" in tensors, itertools.count()):  # noqa: B023
            time, height, width, is_video = tensors[f"{number}.{index}.grid"].tolist()
            visuals.append(Visual(tensors[f"{number}.{index}.patches"], (time, height, width), bool(is_video)))
        rows.append(EncodedPrompt(tuple(tensors[f"{number}.ids"].tolist()), tuple(visuals)))
    return rows
