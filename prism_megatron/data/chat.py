"""Chat messages and images to tokens and patches, with the checkpoint's own processor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from prism_megatron.data.hf_files import check_processor_files, loading_failed, read_json_object
from prism_megatron.data.images import decode_image
from prism_megatron.data.rows import Trace, no_trace
from prism_megatron.errors import UserError
from prism_megatron.types import IMAGE_PLACEHOLDER, EncodedPrompt, Example, InputSpec, Message, PreferencePair, Visual


class ChatProcessor:
    """Tokenizer, chat template and image processor of one HF checkpoint.

    Images are scaled to between ``min_pixels`` and ``max_pixels``, None for the checkpoint's own limits.

    Raises UserError for a directory whose files are missing, damaged, or of different models.
    """

    def __init__(self, checkpoint_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        from transformers import AutoProcessor

        check_processor_files(checkpoint_dir)
        try:
            self._processor = AutoProcessor.from_pretrained(checkpoint_dir)
        except Exception as fault:  # transformers and tokenizers raise anything for a damaged file
            raise loading_failed(checkpoint_dir, fault) from fault
        self._directory = checkpoint_dir
        self._limit_pixels(min_pixels, max_pixels)
        self.tokenizer: Any = self._processor.tokenizer
        added = self.tokenizer.added_tokens_decoder.items()
        self._specials: dict[str, int] = {token.content: number for number, token in added if token.special}
        self._special_ids = frozenset(self._specials.values())
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_text = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.terminator_id = self._special("<|im_end|>")
        self._num_ids = len(self.tokenizer)
        config = read_json_object(checkpoint_dir / "config.json")
        try:
            vision = config["vision_config"]
            self.input_spec = InputSpec(
                image_token_id=self._special("<|image_pad|>"),
                video_token_id=self._special("<|video_pad|>"),
                merge_size=vision["spatial_merge_size"],
                patch_dim=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
                max_positions=config["text_config"]["max_position_embeddings"],
            )
            self._check_tokenizer(config)
        except (KeyError, TypeError) as fault:
            raise UserError(f"{checkpoint_dir}/config.json lacks {fault}; copy the checkpoint again") from fault
        self._check_image_processor(vision)
        self._check_template()

    def _limit_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        processor = self._processor.image_processor
        low, high = min_pixels or processor.size["shortest_edge"], max_pixels or processor.size["longest_edge"]
        if low > high:
            raise UserError(
                f"dataset.min_pixels ({low}) must be at most dataset.max_pixels ({high}; none is the checkpoint's own "
                "limit); raise the latter"
            )
        processor.size = {"shortest_edge": low, "longest_edge": high}

    def _special(self, token: str) -> int:
        if token not in self._specials:
            raise UserError(f"{self._directory}/tokenizer.json has no {token}; it is not a Qwen3-VL tokenizer")
        return self._specials[token]

    def _check_tokenizer(self, config: Mapping[str, Any]) -> None:
        rows, file = config["text_config"]["vocab_size"], self._directory / "tokenizer.json"
        if self._num_ids > rows:
            raise UserError(
                f"{file} has {self._num_ids} tokens, and the model embeds vocab_size ({rows}); resize the model's "
                "embedding, or give the tokenizer it was trained with"
            )
        text = "".join(map(chr, range(32, 127)))
        if self.decode(self.encode_text(text)) != text or 2 * self._num_ids < rows:
            raise UserError(
                f"{file} is not this model's: it has {self._num_ids} tokens for {rows} rows of the embedding, or loses "
                "letters; copy the checkpoint again"
            )
        for name, number in (
            ("image_token_id", self.input_spec.image_token_id),
            ("video_token_id", self.input_spec.video_token_id),
        ):
            if config.get(name, number) != number:
                raise UserError(
                    f"{self._directory}/config.json has {name} {config[name]}, tokenizer.json {number}; they are of "
                    "different models, copy the checkpoint again"
                )

    def _check_image_processor(self, vision: Mapping[str, Any]) -> None:
        for name, other in (
            ("patch_size", "patch_size"),
            ("temporal_patch_size", "temporal_patch_size"),
            ("merge_size", "spatial_merge_size"),
        ):
            found = getattr(self._processor.image_processor, name, None)
            if found != vision[other]:
                raise UserError(
                    f"{self._directory}: the image processor's {name} is {found}, {other} in config.json "
                    f"{vision[other]}; copy the checkpoint again"
                )

    def _check_template(self) -> None:
        try:
            ids = self.prompt_ids([Message("system", "s"), Message("user", f"{IMAGE_PLACEHOLDER}u")])
        except Exception as fault:  # a template is a program, and raises what it likes
            said = str(fault).splitlines()[0][:300]
            raise UserError(
                f"{self._directory}: its chat template fails ({said}); copy the checkpoint again"
            ) from fault
        if ids.count(self.input_spec.image_token_id) != 1 or self.terminator_id not in ids:
            raise UserError(f"{self._directory}: its chat template is not Qwen3-VL's; copy the checkpoint again")

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt up to the assistant's turn, one image token per image: what the rollout engine takes.

        The chat template's special tokens are special. Those that a message spells out are text.
        """
        if not self._special_text.search("".join(m.content for m in messages)):
            return tuple(self.tokenizer(self.rendered(messages), add_special_tokens=False)["input_ids"])
        return self._marked_ids(messages, frozenset())[0]

    def answered_prompt_ids(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The same prompt, and the spans of its answers: the tokens a model generates, end of turn included.

        Each answer is tokenised on its own, as a response is.
        """
        if all(message.role != "assistant" for message in messages):
            return self.prompt_ids(messages), ()
        return self._marked_ids(messages, frozenset(i for i, m in enumerate(messages) if m.role == "assistant"))

    def _marked_ids(
        self, messages: Sequence[Message], answers: frozenset[int]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Tokens of a prompt, and spans of the messages with the numbers ``answers``.

        Answers, and special tokens that are spelled out, pass the template as numbers between marks that nobody wrote.
        """
        written = "".join(m.content for m in messages)
        mark = "\ue000"
        while mark in written:
            mark += "\ue000"
        hidden = [
            replace(
                message,
                content=f"{mark}a{i}{mark}"
                if i in answers
                else self._special_text.sub(lambda found: f"{mark}{self._specials[found[0]]}{mark}", message.content),
            )
            for i, message in enumerate(messages)
        ]
        names = {str(number): name for name, number in self._specials.items()}
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        open_answer: int | None = None  # where an answer starts whose end of turn is still to come
        for index, piece in enumerate(self._special_text.split(self.rendered(hidden))):
            if index % 2:
                ids.append(self._specials[piece])
                if open_answer is not None:
                    spans.append((open_answer, len(ids)))
                    open_answer = None
                continue
            parts = re.split(f"{mark}a([0-9]+){mark}", piece)
            for i, part in enumerate(parts):
                if i % 2:
                    open_answer = len(ids)
                    ids += self.encode_text(messages[int(part)].content)
                elif part:
                    ids += self.encode_text(re.sub(f"{mark}([0-9]+){mark}", lambda found: names[found[1]], part))
        assert len(spans) == len(answers), "the template shows every answer and ends it"
        return tuple(ids), tuple(spans)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The prompt's text, special tokens spelled out."""
        chat = [{"role": m.role, "content": _parts(m.content)} for m in messages]
        return str(self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    @property
    def max_pixels(self) -> int:
        """The most pixels of an image; larger ones are scaled down."""
        return int(self._processor.image_processor.size["longest_edge"])

    @property
    def cell(self) -> int:
        """Pixels of the side of the square that one image token stands for."""
        processor = self._processor.image_processor
        return int(processor.patch_size * processor.merge_size)

    def image_tokens(self, width: int, height: int) -> int:
        """The number of tokens of an image of this size in pixels."""
        patches: int = self._processor.image_processor.get_number_of_image_patches(height, width)
        return patches // self.input_spec.merge_size**2

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a written text, none of them special: ``<|im_end|>`` spelled out is text, too."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a whole response, its terminator included."""
        return (*self.encode_text(text), self.terminator_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, without tokens that have none."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def has_text(self, token_ids: Sequence[int]) -> bool:
        """Tell if the text shows every token: none is special, none beyond the tokenizer's vocabulary."""
        return self._special_ids.isdisjoint(token_ids) and max(token_ids, default=0) < self._num_ids

    def encode_prompts(
        self,
        rows: Sequence[Example | PreferencePair],
        *,
        train_answers: bool = False,
        trace: Trace = no_trace,
    ) -> list[EncodedPrompt]:
        """Encode prompts with their images, each distinct image once; image tokens become one per merged patch.

        With ``train_answers`` the loss is on the answers in them, too. ``trace`` gets the source of each row whose
        images are decoded. Raises UserError where a prompt's placeholders and its images are not as many.
        """
        rows = list(rows)  # those of a data set are read anew each time
        sources = {data: row.source for row in reversed(rows) for data in row.images}
        distinct = list(dict.fromkeys(data for row in rows for data in row.images))
        images = []
        for data in distinct:
            trace(sources[data])
            try:
                images.append(decode_image(data))
            except (OSError, ValueError, SyntaxError) as fault:  # the file has changed since it was checked
                raise UserError(f"{sources[data]}: an image cannot be decoded ({fault}); replace the file") from fault
        visuals = dict(zip(distinct, self._encode_images(images), strict=True))
        prompts = []
        for row in rows:
            visuals_of_row = tuple(visuals[data] for data in row.images)
            ids, spans = (
                self.answered_prompt_ids(row.messages) if train_answers else (self.prompt_ids(row.messages), ())
            )
            prompts.append(self._expanded(ids, spans, visuals_of_row, row.source))
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
        visuals = tuple(next(images if kind == "image" else videos) for kind in kinds)
        return EncodedPrompt(tuple(encoded["input_ids"][0].tolist()), visuals)

    def _encode_images(self, images: Sequence[Image]) -> list[Visual]:
        if not images:
            return []
        encoded = self._processor.image_processor(images=list(images), return_tensors="pt")
        return _visuals(encoded["pixel_values"], encoded["image_grid_thw"], is_video=False)

    def _expanded(
        self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], visuals: tuple[Visual, ...], source: str
    ) -> EncodedPrompt:
        """The prompt with a token for every merged patch; ``spans`` are of ``token_ids``."""
        spec = self.input_spec
        found = token_ids.count(spec.image_token_id)
        if found != len(visuals):
            raise UserError(f"{source}: the chat shows {found} images, the row has {len(visuals)}; make them match")
        remaining = iter(visuals)
        expanded: list[int] = []
        starts = []
        for token in token_ids:
            starts.append(len(expanded))
            count = len(next(remaining).patches) // spec.merge_size**2 if token == spec.image_token_id else 1
            expanded.extend([token] * count)
        starts.append(len(expanded))
        return EncodedPrompt(tuple(expanded), visuals, tuple((starts[low], starts[high]) for low, high in spans))


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
