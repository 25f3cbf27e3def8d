"""The parts of a row, each checked for its type: text, chats, images, ids. What is wrong raises UserError."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from prism_megatron.data.images import check_image
from prism_megatron.data.rows import Row, from_json
from prism_megatron.errors import UserError
from prism_megatron.types import IMAGE_PLACEHOLDER, Message

VIDEO_PLACEHOLDER = "<video>"

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_UNSUPPORTED = ("video", "videos", "audio", "audios")
# Every reader asks parquet files for these, too: to find pictures and ids, and to refuse videos and audio.
COMMON_COLUMNS = ("id", "qid", "image", "images", "data_source", *_UNSUPPORTED)

_quote = reprlib.Repr(maxstring=80, maxother=80).repr


def text_field(value: Any, what: str, source: str) -> str:
    """``value`` if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{source}: {what} must be text, got {_quote(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise UserError(f"{source}: {what} is not valid Unicode ({fault}); correct or drop the row") from fault
    return value


def optional_text(fields: Mapping[str, Any], key: str, source: str) -> str | None:
    """The text of a key, None where it is null or not there."""
    value = fields.get(key)
    return None if value is None else text_field(value, key, source)


def answer_text(value: Any, column: str, source: str) -> str | None:
    """An answer as text; None for null, blank text and NaN, which is what pandas makes of null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float | Decimal):
        raise UserError(
            f"{source}: {column} is {_quote(value)}; it must be one text or number (further right answers go into "
            "reward_model.equivalent_answers)"
        )
    text = text_field(str(value), column, source)
    return text if text.strip() and text != "nan" else None


def struct_field(value: Any, what: str, source: str) -> dict[str, Any]:
    """A nested struct, also as JSON text; empty where it is null."""
    value = from_json(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {what} must be a struct, got {_quote(value)}")
    return value


def refuse_unsupported(fields: Mapping[str, Any], source: str) -> None:
    """Raise UserError where the row shows something other than pictures."""
    for key in _UNSUPPORTED:
        if fields.get(key):
            raise UserError(f"{source}: has {key!r}; only text and images are trained on, drop the row")


# Chats ----------------------------------------------------------------------------------------------------------------


def chat_field(turns: Any, source: str) -> tuple[tuple[Message, ...], list[Any]]:
    """The turns of a chat, and the images that its content parts name themselves, in order.

    A turn is from/value or role/content. Content is text that marks each image with ``<image>``, or a list of parts
    ({"type": "text", "text": ...}, {"type": "image"}).
    """
    turns = from_json(turns)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{source}: a chat is a non-empty list of turns, got {_quote(turns)}")
    messages, images = [], list[Any]()
    for turn in turns:
        message, named = _turn(turn, source)
        messages.append(message)
        images += named
    return tuple(messages), images


def check_prompt(messages: Sequence[Message], images: Sequence[bytes], source: str) -> None:
    """Raise UserError for a prompt that does not end with the user's turn or does not show each image once."""
    if not messages or messages[-1].role != "user":
        last = repr(messages[-1].role) if messages else "nothing"
        raise UserError(f"{source}: the prompt must end with the user's turn, it ends with {last}")
    for message in messages:
        if message.role != "user" and IMAGE_PLACEHOLDER in message.content:
            raise UserError(f"{source}: {IMAGE_PLACEHOLDER} in a {message.role} turn; only a user's turn shows images")
        if VIDEO_PLACEHOLDER in message.content:
            raise UserError(f"{source}: {VIDEO_PLACEHOLDER} in the prompt; videos are not trained on, drop the row")
    found = sum(m.content.count(IMAGE_PLACEHOLDER) for m in messages)
    if found != len(images):
        raise UserError(
            f"{source}: {found} {IMAGE_PLACEHOLDER} placeholder(s) for {len(images)} image(s); write one per image"
        )


def _turn(turn: Any, source: str) -> tuple[Message, list[Any]]:
    fields = turn if isinstance(turn, dict) else {}
    role, content = (_first(fields, keys) for keys in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str | list):
        raise UserError(
            f"{source}: cannot read the turn {_quote(turn)}; a turn is from/value or role/content, "
            f"with a role of {sorted(_ROLES)} and text that marks each image with {IMAGE_PLACEHOLDER}"
        )
    if isinstance(content, str):
        return Message(_ROLES[role], text_field(content, "a turn's text", source)), []
    texts, images = [], []
    for part in content:
        text, named = _part(part, source)
        texts.append(text)
        images += named
    return Message(_ROLES[role], "".join(texts)), images


def _part(part: Any, source: str) -> tuple[str, list[Any]]:
    """Text of one part of a turn's content, and the image it names itself."""
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type", "text" if "text" in fields else None)
    if kind == "text":
        return text_field(fields.get("text"), "a text part", source), []
    if kind in ("image", "image_url"):
        named = _first(fields, ("image", "image_url", "url", "path", "bytes"))
        if isinstance(named, dict) and "url" in named:
            named = named["url"]
        return IMAGE_PLACEHOLDER, [] if named is None else [named]
    raise UserError(f"{source}: cannot read the content part {_quote(part)}; a part is of type text or image")


def _first(fields: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


# Images ---------------------------------------------------------------------------------------------------------------


def listed_images(fields: Mapping[str, Any]) -> list[Any]:
    """The images in a row's own column, as they stand there."""
    listed = from_json(_first(fields, ("images", "image")))
    return [] if listed is None else listed if isinstance(listed, list) else [listed]


class Images:
    """Reads the encoded pictures of rows. With ``check`` each is decoded once to see that it can be."""

    def __init__(self, check: bool = True) -> None:
        self._check = check

    def of_row(self, row: Row, named_in_chat: Sequence[Any] = ()) -> tuple[bytes, ...]:
        """Encoded pictures of ``images`` or ``image``, or of the chat's own parts.

        A picture is a path relative to the data file, bytes, a struct of ``bytes`` and ``path``, or a data: URL.
        """
        items = listed_images(row.fields)
        if items and named_in_chat:
            raise UserError(f"{row.source}: images in a column and in the chat's parts; give them in one place")
        return tuple(self._image(item, number, row) for number, item in enumerate(items or named_in_chat))

    def embedded(self, encoded: bytes, source: str) -> bytes:
        """A picture that the row itself contains."""
        if self._check:
            check_image(encoded, source)
        return encoded

    def stored(self, file: str, name: str, row: Row) -> bytes:
        """A picture that the row names as ``name``."""
        return self.embedded(_read(file, name, row), f"{row.source}, image {name}")

    def _image(self, item: Any, number: int, row: Row) -> bytes:
        if isinstance(item, dict):
            item = self._of_struct(item)
        source = f"{row.source}, image {number}"
        if isinstance(item, str) and item.startswith("data:"):
            item = _decoded(item.partition("base64,")[2], source)
        if isinstance(item, bytes) and item:
            return self.embedded(item, source)
        if isinstance(item, str) and item:
            return self._named(item, row)
        raise UserError(
            f"{source}: an image is a path or a struct with its encoded file in 'bytes' or a 'path', got {_quote(item)}"
        )

    def _of_struct(self, struct: Mapping[str, Any]) -> Any:
        data = struct.get("bytes")
        if isinstance(data, str) and data:
            return f"data:;base64,{data}"
        return data or struct.get("path")

    def _named(self, name: str, row: Row) -> bytes:
        if name.startswith(("http://", "https://")):
            raise UserError(f"{row.source}: image {name} is on the web; download it and give its path")
        # Plain strings: a Path for each of a million pictures is slower than reading it.
        path = unquote(name.removeprefix("file://")) if name.startswith("file://") else name
        if not row.image_root:
            return self.stored(os.path.join(os.path.dirname(row.file), path), name, row)
        file = os.path.normpath(os.path.join(row.image_root, path))
        if not file.startswith(os.path.join(os.path.normpath(row.image_root), "")):
            raise UserError(f"{row.source}: image {name} is outside of image_root ({row.image_root}); correct the path")
        return self.stored(file, name, row)


class ImageSizes(Images):
    """Checks the pictures of rows, each content once, and returns none of them (b"" for each).

    ``of_last_row`` has width and height of the last row's pictures: [w, h, w, h, ..], None without ``check``, where it
    is only seen to that their files exist.
    """

    def __init__(self, check: bool = True) -> None:
        super().__init__(check)
        self._of_file: dict[str, tuple[int, int]] = {}
        self._of_content: dict[bytes, tuple[int, int]] = {}
        self.of_last_row: list[int] | None = None

    def of_row(self, row: Row, named_in_chat: Sequence[Any] = ()) -> tuple[bytes, ...]:
        self.of_last_row = [] if self._check else None
        return super().of_row(row, named_in_chat)

    def embedded(self, encoded: bytes, source: str) -> bytes:
        if self._check:
            self._add(self._size(encoded, source))
        return b""

    def stored(self, file: str, name: str, row: Row) -> bytes:
        if not self._check:
            if not _is_file(file):
                _read(file, name, row)
            return b""
        if file not in self._of_file:
            self._of_file[file] = self._size(_read(file, name, row), f"{row.source}, image {name}")
        self._add(self._of_file[file])
        return b""

    def _size(self, encoded: bytes, source: str) -> tuple[int, int]:
        digest = hashlib.blake2b(encoded, digest_size=20).digest()
        if digest not in self._of_content:
            self._of_content[digest] = check_image(encoded, source)
        return self._of_content[digest]

    def _add(self, size: tuple[int, int]) -> None:
        assert self.of_last_row is not None
        self.of_last_row += size


def _is_file(file: str) -> bool:
    try:
        return os.path.isfile(file)
    except ValueError:  # a name that no file can have
        return False


def _read(file: str, name: str, row: Row) -> bytes:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.readall()
    except FileNotFoundError as fault:
        raise UserError(
            f"{row.source}: image {file} does not exist; paths are relative to "
            + (f"{row.file.name}'s folder" if not row.image_root else f"image_root ({row.image_root})")
        ) from fault
    except (OSError, ValueError) as fault:  # a folder, no permission, a name that no file can have
        raise UserError(f"{row.source}, image {name}: cannot be read ({fault}); correct the path") from fault


def _decoded(text: str, source: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as fault:
        raise UserError(f"{source}: not base64 ({fault}); embed the encoded file, or give its path") from fault


# Ids ------------------------------------------------------------------------------------------------------------------


def row_id(row: Row, extra: Mapping[str, Any], data_source: str | None) -> str:
    """``id`` or ``qid``, else ``extra_info.index``, which counts anew in each data source, else file and row number."""
    for name in ("id", "qid"):
        if (given := _id_text(row.fields.get(name), name, row.source)) is not None:
            return given
    if (index := _id_text(extra.get("index"), "extra_info.index", row.source)) is not None:
        return index if data_source is None else f"{data_source}/{index}"
    return f"{row.file.name}/{row.number}"


def _id_text(value: Any, what: str, source: str) -> str | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise UserError(f"{source}: {what} must be text or a number, got {_quote(value)}")
    return text_field(str(value), what, source)
