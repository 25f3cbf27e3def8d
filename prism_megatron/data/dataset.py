"""Readers and writers of the data files PRISM is released with (spec 1.2 to 1.5).

Each reader returns the records of ``prism_megatron.types`` and refuses a file it cannot trust: an error names the file,
the line or row, what was found, and what to do about it. Nothing is skipped and nothing is made up in silence.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from prism_megatron.data.response import SYSTEM_PROMPT, Response, parse_response
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from prism_megatron.types import Example, Message, PreferencePair

IMAGE_PLACEHOLDER = "<image>"

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_RLVR_COLUMNS = ("images", "data_source", "prompt", "reward_model")
_TEACHER_COLUMNS = ("teacher_caption", "teacher_cot", "teacher_response")
_PAIR_KEYS = ("image", "teacher_caption", "teacher_cot", "student_caption", "student_cot")


# Readers --------------------------------------------------------------------------------------------------------------


def read_sft(path: str | Path) -> list[Example]:
    """Read demonstrations in sharegpt form (spec 1.2), JSON Lines or one JSON list.

    A row has ``conversations`` (``from``/``value`` or ``role``/``content`` turns, the last one the demonstration),
    ``images`` (paths relative to the file) and optionally ``system`` and ``id``.
    """
    path = Path(path)
    return [_sft_example(row, path, source) for row, source in _json_rows(path)]


def read_alignment(path: str | Path) -> list[Example]:
    """Read the alignment set (spec 1.3): prompts with a teacher's demonstration, images embedded.

    The demonstration is ``teacher_response``, or caption and reasoning joined where that is blank; the two halves are
    taken from it by the same parser that splits the policy's responses, so both classes are cut at the same place.
    """
    return _read_parquet(Path(path), _alignment_example, (*_RLVR_COLUMNS, *_TEACHER_COLUMNS))


def read_rlvr(path: str | Path) -> list[Example]:
    """Read an RLVR set (spec 1.4): prompts with a verifiable answer, images embedded."""
    return _read_parquet(Path(path), _rlvr_example, _RLVR_COLUMNS)


def check_rlvr(path: str | Path, rows: int) -> None:
    """Refuse, by its footer alone, a file that :func:`read_rlvr` would, or with fewer than ``rows`` rows."""
    path = Path(path)
    found = _footer(path, _RLVR_COLUMNS).num_rows
    if found < rows:
        raise UserError(f"{path} has {found} rows, and {rows} are asked for; lower the number, or give another file")


def read_pool(path: str | Path) -> list[Example]:
    """Read prompts for curation: as for RLVR, with demonstrations where there are some, whatever they are worth."""
    return _read_parquet(Path(path), _pool_example, _RLVR_COLUMNS)


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """Read the discriminator's warm-up pairs (spec 1.5), JSON Lines.

    The prompt is ``prompt`` where a line has it (a chat, taken as it stands), else ``question`` after the paper's
    system prompt or the line's own ``system`` ("" for none). Image paths are relative to the file.
    """
    path = Path(path)
    return [_preference_pair(row, path, source) for row, source in _json_rows(path)]


# Writers --------------------------------------------------------------------------------------------------------------


def write_pairs(path: str | Path, pairs: Sequence[PreferencePair]) -> None:
    """Write warm-up pairs so that ``read_pairs`` gives them back; images go to a folder beside the file, once each."""
    path = Path(path)
    image_dir = path.parent / f"{path.stem}_images"
    image_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in pairs:
        names = [_store_image(image_dir, image) for image in pair.images]
        line = {
            "id": pair.id,
            "image": names[0] if len(names) == 1 else names,
            "question": pair.messages[-1].content,
            "prompt": [{"role": m.role, "content": m.content} for m in pair.messages],
            "teacher_caption": pair.teacher_caption,
            "teacher_cot": pair.teacher_reasoning,
            "student_caption": pair.student_caption,
            "student_cot": pair.student_reasoning,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_prompts(path: str | Path, examples: Sequence[Example]) -> None:
    """Write prompts as parquet for ``read_rlvr``, and for ``read_alignment`` where every example has a demonstration.

    Raises:
        UserError: there is nothing to write, or an example has no answer to verify against.
    """
    path = Path(path)
    if not examples:
        raise UserError(f"{path}: no examples to write; a data set needs at least one")
    for example in examples:
        if example.answer is None:
            raise UserError(f"{path}: {example.source} has no answer; a prompt without one cannot be verified")
    columns: dict[str, list[Any]] = {
        "id": [e.id for e in examples],
        "data_source": [e.data_source for e in examples],
        "prompt": [[{"role": m.role, "content": m.content} for m in e.messages] for e in examples],
        "images": [[{"bytes": image, "path": None} for image in e.images] for e in examples],
        "answer": [e.answer for e in examples],
        "reward_model": [
            {"ground_truth": e.answer, "equivalent_answers": list(e.equivalent_answers), "style": "rule"}
            for e in examples
        ],
    }
    if all(e.response is not None for e in examples):
        columns["teacher_caption"] = [e.teacher_caption for e in examples]
        columns["teacher_cot"] = [e.teacher_reasoning for e in examples]
        columns["teacher_response"] = [e.response for e in examples]
    if any(e.extra for e in examples):
        columns["extra_info"] = [e.extra for e in examples]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_atomic(path, buffer.getvalue())


# One row of each file -------------------------------------------------------------------------------------------------


def _sft_example(row: Mapping[str, Any], path: Path, source: str) -> Example:
    turns = _require(row, ("conversations", "messages"), source)
    messages = _messages(turns, source)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"{source}: the last turn must be the assistant's demonstration, after a user's turn")
    *prompt, demonstration = messages
    if row.get("system"):
        prompt.insert(0, Message("system", row["system"]))
    response = _parse_demonstration(demonstration.content, source)
    images = _load_images(row.get("images"), path, source)
    _check_placeholders(prompt, images, source)
    return Example(
        id=str(row.get("id", source)),
        messages=tuple(prompt),
        images=images,
        source=source,
        response=demonstration.content,
        answer=response.answer.strip(),
        teacher_caption=response.caption_block,
        teacher_reasoning=response.reasoning_block,
        data_source=row.get("data_source"),
    )


def _rlvr_example(row: Mapping[str, Any], source: str) -> Example:
    extra = row.get("extra_info") or {}
    images = _embedded_images(row["images"], source)
    messages = _messages(row["prompt"], source)
    _check_placeholders(messages, images, source)
    reward_model = row["reward_model"] or {}
    answer = _answer_text(reward_model.get("ground_truth"), "reward_model.ground_truth", source)
    answer = answer or _answer_text(row.get("answer"), "answer", source)
    if answer is None:
        raise UserError(f"{source}: no answer; fill reward_model.ground_truth (the verifier compares with it)")
    return Example(
        id=str(row.get("id") or extra.get("index", source)),
        messages=messages,
        images=images,
        source=source,
        answer=answer,
        equivalent_answers=_equivalents(reward_model.get("equivalent_answers"), source),
        data_source=row["data_source"],
        extra=extra,
    )


def _answer_text(value: Any, column: str, source: str) -> str | None:
    """An answer as text; None for null, blank text and NaN, which is what pandas makes of null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float | Decimal):
        raise UserError(
            f"{source}: {column} is {value!r}; it must be one text or number (further right answers go into "
            "reward_model.equivalent_answers)"
        )
    text = str(value)
    return text if text.strip() and text != "nan" else None


def _equivalents(value: Any, source: str) -> tuple[str, ...]:
    """The further right answers: a list of them, or one."""
    values = value if isinstance(value, list) else [value]
    texts = (_answer_text(item, "reward_model.equivalent_answers", source) for item in values)
    return tuple(text for text in texts if text is not None)


def _pool_example(row: Mapping[str, Any], source: str) -> Example:
    return replace(_rlvr_example(row, source), response=row.get("teacher_response") or None)


def _alignment_example(row: Mapping[str, Any], source: str) -> Example:
    prompt = _rlvr_example(row, source)
    text = row["teacher_response"] or "\n".join((row["teacher_caption"] or "", row["teacher_cot"] or ""))
    response = _parse_demonstration(text, source)
    return Example(
        **{
            **vars(prompt),
            "response": text,
            "teacher_caption": response.caption_block,
            "teacher_reasoning": response.reasoning_block,
        }
    )


def _preference_pair(row: Mapping[str, Any], path: Path, source: str) -> PreferencePair:
    for key in _PAIR_KEYS:
        _require(row, (key,), source)
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    images = _load_images(names, path, source)
    messages = _pair_messages(row, len(images), source)
    _check_placeholders(messages, images, source)
    teacher = _parse_demonstration(f"{row['teacher_caption']}\n{row['teacher_cot']}", f"{source}, teacher")
    student = _parse_demonstration(f"{row['student_caption']}\n{row['student_cot']}", f"{source}, student")
    return PreferencePair(
        id=str(row.get("id", source)),
        messages=messages,
        images=images,
        source=source,
        teacher_caption=teacher.caption_block,
        teacher_reasoning=teacher.reasoning_block,
        student_caption=student.caption_block,
        student_reasoning=student.reasoning_block,
    )


def _pair_messages(row: Mapping[str, Any], images: int, source: str) -> tuple[Message, ...]:
    prompt = _require(row, ("prompt", "question"), source)
    if isinstance(prompt, list):
        return _messages(prompt, source)
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = IMAGE_PLACEHOLDER * images + prompt
    system = row.get("system", SYSTEM_PROMPT)
    user = Message("user", prompt)
    return (Message("system", system), user) if system else (user,)


# Parts of a row -------------------------------------------------------------------------------------------------------


def _messages(turns: Any, source: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{source}: a chat is a non-empty list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _SHAREGPT_ROLES or not isinstance(content, str):
            raise UserError(
                f"{source}: cannot read the turn {turn!r}; a turn is from/value or role/content, "
                f"with a role of {sorted(_SHAREGPT_ROLES)} and text that marks each image with {IMAGE_PLACEHOLDER}"
            )
        messages.append(Message(_SHAREGPT_ROLES[role], content))
    return tuple(messages)


def _check_placeholders(messages: Sequence[Message], images: Sequence[bytes], source: str) -> None:
    if messages[-1].role != "user":
        raise UserError(f"{source}: the prompt must end with the user's turn, it ends with {messages[-1].role!r}")
    found = sum(m.content.count(IMAGE_PLACEHOLDER) for m in messages)
    if found != len(images):
        raise UserError(
            f"{source}: {found} {IMAGE_PLACEHOLDER} placeholder(s) for {len(images)} image(s); write one per image"
        )


def _parse_demonstration(text: str, source: str) -> Response:
    response = parse_response(text)
    if response is None:
        raise UserError(
            f"{source}: the demonstration breaks the response grammar (caption, think, answer: each once, in this "
            f"order, none empty, nothing between them); correct or drop it. It begins {text[:80]!r}"
        )
    return response


def _load_images(names: Any, path: Path, source: str) -> tuple[bytes, ...]:
    if not names:
        raise UserError(f"{source}: no image; PRISM trains on image questions, list at least one path")
    images = []
    for name in names:
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{source}: image {file} does not exist; paths are relative to {path.name}'s folder")
        images.append(_verified(file.read_bytes(), f"{source}, image {name}"))
    return tuple(images)


def _embedded_images(structs: Any, source: str) -> tuple[bytes, ...]:
    if not structs:
        raise UserError(f"{source}: no image; PRISM trains on image questions, embed at least one")
    if any(not isinstance(item, dict) or not item.get("bytes") for item in structs):
        raise UserError(f"{source}: an image is a struct with its encoded file in 'bytes'; embed it there")
    return tuple(_verified(item["bytes"], f"{source}, image {i}") for i, item in enumerate(structs))


def _verified(encoded: bytes, source: str) -> bytes:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as fault:  # Pillow reports a broken PNG as SyntaxError
        raise UserError(f"{source}: not a readable image ({fault}); replace the file or drop the row") from fault
    return encoded


def _require(row: Mapping[str, Any], keys: Sequence[str], source: str) -> Any:
    """The value of the first of ``keys`` that the row has."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise UserError(f"{source}: needs the key {' or '.join(map(repr, keys))}, has {sorted(row)}")


def _store_image(folder: Path, encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        suffix = (image.format or "png").lower()
    file = folder / f"{hashlib.sha256(encoded).hexdigest()[:20]}.{suffix}"
    if not file.exists():
        write_atomic(file, encoded, durable=False)
    return f"{folder.name}/{file.name}"


# Whole files ----------------------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows of a JSON Lines file or of one JSON list, each with the place it came from."""
    _check_exists(path)
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"{path}: empty data set; check that the file was written to its end")
    if text.lstrip().startswith("["):
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(_parse_json(text, str(path)))]
    else:
        lines = enumerate(text.splitlines(), start=1)
        rows = [(f"{path}, line {i}", _parse_json(line, f"{path}, line {i}")) for i, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: empty data set; check that the file was written to its end")
    for source, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{source}: a row is a JSON object, got {type(row).__name__}")
        yield row, source


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        raise UserError(f"{source}: not JSON ({fault}); the file may be cut off, fetch or write it again") from fault


def _read_parquet(
    path: Path, to_example: Callable[[Mapping[str, Any], str], Example], columns: Sequence[str]
) -> list[Example]:
    _footer(path, columns)
    return [to_example(row, f"{path}, row {i}") for i, row in enumerate(pq.read_table(path).to_pylist())]


def _footer(path: Path, columns: Sequence[str]) -> pq.FileMetaData:
    """What a parquet file says of itself. Raises UserError where it is none, empty or without one of ``columns``."""
    _check_exists(path)
    try:
        footer = pq.read_metadata(path)
    except pa.ArrowInvalid as fault:
        raise UserError(f"{path}: not a parquet file ({fault}); the file may be cut off, fetch it again") from fault
    names = footer.schema.to_arrow_schema().names
    if missing := [column for column in columns if column not in names]:
        raise UserError(f"{path}: column(s) {missing} missing, has {names}; this file needs {columns}")
    if footer.num_rows == 0:
        raise UserError(f"{path}: empty data set; check the filter that wrote it")
    return footer


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such data file; correct it, or write the built-in task with make tiny-data")
