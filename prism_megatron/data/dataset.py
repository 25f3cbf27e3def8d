"""Readers and writers of the data files PRISM is released with (spec 1.2 to 1.5).

Each reader takes a file, a folder, a pattern or a list of files, JSON Lines or parquet, and returns the records of
``prism_megatron.types``, each read when it is asked for. Rows that it cannot trust are refused, or skipped where
``ReadOptions`` allow that: the error names the file, the line or row, what was found, and what to do about it. Pictures
are embedded, or paths relative to the file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prism_megatron.data.fields import (
    COMMON_COLUMNS,
    Images,
    answer_text,
    chat_field,
    check_prompt,
    listed_images,
    optional_text,
    refuse_unsupported,
    row_id,
    struct_field,
    text_field,
)
from prism_megatron.data.index import RowFormat
from prism_megatron.data.layouts import (
    PROMPTS,
    SFT_COLUMNS,
    SFT_OTHERS,
    TRUTHS,
    demonstration_turns,
    ground_truth,
    prompt_turns,
)
from prism_megatron.data.lazy import Rows, read_rows
from prism_megatron.data.response import SYSTEM_PROMPT, Response, parse_response
from prism_megatron.data.rows import Columns, ReadOptions, Row, required
from prism_megatron.data.sources import Data
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from prism_megatron.types import IMAGE_PLACEHOLDER, Example, Message, PreferencePair

_RLVR_KEYS = (PROMPTS, TRUTHS)
_RLVR_OTHERS = ("extra_info", "input", "history", "system", *COMMON_COLUMNS)
_TEACHER_KEYS = ("teacher_caption", "teacher_cot", "teacher_response")
_PAIR_TEXTS = ("teacher_caption", "teacher_cot", "student_caption", "student_cot")
_NO_OPTIONS = ReadOptions()


# Readers --------------------------------------------------------------------------------------------------------------


def read_sft(path: Data, options: ReadOptions = _NO_OPTIONS) -> Rows[Example]:
    """Read demonstrations (spec 1.2).

    A row has ``conversations`` or ``messages`` (``from``/``value`` or ``role``/``content`` turns, the last one the
    demonstration, in any form), or a question and an answer as ``data/layouts.py`` names them, and optionally
    ``images``, ``system`` and ``id``.
    """
    return read_rows(path, _SFT, options)


def read_alignment(path: Data, options: ReadOptions = _NO_OPTIONS) -> Rows[Example]:
    """Read the alignment set (spec 1.3): prompts with a teacher's demonstration.

    The demonstration is ``teacher_response``, or caption and reasoning joined where that is blank; the two halves are
    taken from it by the same parser that splits the policy's responses, so both classes are cut at the same place.
    """
    return read_rows(path, _ALIGNMENT, options)


def read_rlvr(path: Data, options: ReadOptions = _NO_OPTIONS) -> Rows[Example]:
    """Read an RLVR set (spec 1.4): prompts with a verifiable answer, in columns that ``data/layouts.py`` names."""
    return read_rows(path, _RLVR, options)


def check_rlvr(path: Data, count: int, options: ReadOptions = _NO_OPTIONS) -> None:
    """Raise UserError for files that :func:`read_rlvr` refuses, or that have fewer than ``count`` rows."""
    found = len(read_rlvr(path, options))
    if found < count:
        raise UserError(f"{path} has {found} rows, and {count} are asked for; lower the number, or give another file")


def read_pool(path: Data, options: ReadOptions = _NO_OPTIONS) -> Rows[Example]:
    """Read prompts for curation: as for RLVR, with demonstrations where there are some, whatever they are worth."""
    return read_rows(path, _POOL, options)


def read_pairs(path: Data, options: ReadOptions = _NO_OPTIONS) -> Rows[PreferencePair]:
    """Read the discriminator's warm-up pairs (spec 1.5).

    The prompt is ``prompt`` where a row has it (a chat, taken as it stands), else ``question`` after the paper's
    system prompt or the row's own ``system`` ("" for none).
    """
    return read_rows(path, _PAIRS, options)


# Writers --------------------------------------------------------------------------------------------------------------


def write_pairs(path: str | Path, pairs: Sequence[PreferencePair]) -> None:
    """Write warm-up pairs so that ``read_pairs`` gives them back; images go to a folder next to the file, once each."""
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
        columns["extra_info"] = _column([e.extra for e in examples])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, write_page_checksum=True)
    write_atomic(path, buffer.getvalue())


def _column(structs: list[dict[str, Any]]) -> pa.Array:
    """A column of structs, or of their JSON text where they have no type in common."""
    try:
        return pa.array(structs)
    except (pa.ArrowException, ValueError):
        return pa.array([json.dumps(struct, default=str) for struct in structs])


# One row of each file -------------------------------------------------------------------------------------------------


def _sft_example(row: Row, images: Images) -> Example:
    fields, source = row.fields, row.source
    refuse_unsupported(fields, source)
    messages, in_chat = chat_field(demonstration_turns(fields, len(listed_images(fields)), source), source)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(f"{source}: the last turn must be the assistant's demonstration, after a user's turn")
    *prompt, demonstration = messages
    if (system := optional_text(fields, "system", source)) and prompt[0].role != "system":
        prompt.insert(0, Message("system", system))
    if not demonstration.content.strip():
        raise UserError(f"{source}: the last turn, the demonstration, is blank; correct or drop the row")
    response = parse_response(demonstration.content)
    encoded = images.of_row(row, in_chat)
    check_prompt(prompt, encoded, source)
    data_source = optional_text(fields, "data_source", source)
    return Example(
        id=row_id(row, {}, data_source),
        messages=tuple(prompt),
        images=encoded,
        source=source,
        response=demonstration.content,
        answer=response.answer.strip() if response else None,
        teacher_caption=response.caption_block if response else None,
        teacher_reasoning=response.reasoning_block if response else None,
        data_source=data_source,
    )


def _rlvr_example(row: Row, images: Images) -> Example:
    fields, source = row.fields, row.source
    refuse_unsupported(fields, source)
    extra = struct_field(fields.get("extra_info"), "extra_info", source)
    messages, in_chat = chat_field(prompt_turns(fields, len(listed_images(fields)), source), source)
    encoded = images.of_row(row, in_chat)
    check_prompt(messages, encoded, source)
    reward_model = struct_field(fields.get("reward_model"), "reward_model", source)
    answer = ground_truth(fields, source)
    if answer is None:
        raise UserError(f"{source}: no answer; fill reward_model.ground_truth (the verifier compares with it)")
    data_source = optional_text(fields, "data_source", source)
    return Example(
        id=row_id(row, extra, data_source),
        messages=messages,
        images=encoded,
        source=source,
        answer=answer,
        equivalent_answers=_equivalents(reward_model.get("equivalent_answers"), source),
        data_source=data_source,
        extra=extra,
    )


def _pool_example(row: Row, images: Images) -> Example:
    response = optional_text(row.fields, "teacher_response", row.source)
    return replace(_rlvr_example(row, images), response=response or None)


def _alignment_example(row: Row, images: Images) -> Example:
    prompt = _rlvr_example(row, images)
    caption, reasoning, whole = (optional_text(row.fields, key, row.source) or "" for key in _TEACHER_KEYS)
    text = whole or f"{caption}\n{reasoning}"
    response = _parse_demonstration(text, row.source)
    return replace(
        prompt, response=text, teacher_caption=response.caption_block, teacher_reasoning=response.reasoning_block
    )


def _preference_pair(row: Row, images: Images) -> PreferencePair:
    fields, source = row.fields, row.source
    refuse_unsupported(fields, source)
    texts = {key: text_field(required(fields, (key,), source), key, source) for key in _PAIR_TEXTS}
    prompt = required(fields, ("prompt", "question"), source)
    if isinstance(prompt, str):
        encoded = images.of_row(row)
        messages = _question(prompt, fields, len(encoded), source)
    else:
        messages, in_chat = chat_field(prompt, source)
        encoded = images.of_row(row, in_chat)
    check_prompt(messages, encoded, source)
    teacher, student = (
        _parse_demonstration(f"{texts[f'{side}_caption']}\n{texts[f'{side}_cot']}", f"{source}, {side}")
        for side in ("teacher", "student")
    )
    return PreferencePair(
        id=row_id(row, {}, optional_text(fields, "data_source", source)),
        messages=messages,
        images=encoded,
        source=source,
        teacher_caption=teacher.caption_block,
        teacher_reasoning=teacher.reasoning_block,
        student_caption=student.caption_block,
        student_reasoning=student.reasoning_block,
    )


_SFT = RowFormat(Columns((SFT_COLUMNS,), (*SFT_OTHERS, *COMMON_COLUMNS)), _sft_example)
_RLVR = RowFormat(Columns(_RLVR_KEYS, _RLVR_OTHERS), _rlvr_example)
_POOL = RowFormat(Columns(_RLVR_KEYS, ("teacher_response", *_RLVR_OTHERS)), _pool_example)
_ALIGNMENT = RowFormat(Columns((*_RLVR_KEYS, *((key,) for key in _TEACHER_KEYS)), _RLVR_OTHERS), _alignment_example)
_PAIRS = RowFormat(
    Columns((("prompt", "question"), *((key,) for key in _PAIR_TEXTS)), ("system", *COMMON_COLUMNS)), _preference_pair
)


def _question(question: str, fields: Mapping[str, Any], images: int, source: str) -> tuple[Message, ...]:
    question = text_field(question, "the question", source)
    if IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * images + question
    system = optional_text(fields, "system", source) if "system" in fields else SYSTEM_PROMPT
    user = Message("user", question)
    return (Message("system", system), user) if system else (user,)


def _equivalents(value: Any, source: str) -> tuple[str, ...]:
    """The further right answers: a list of them, or one."""
    values = value if isinstance(value, list) else [value]
    texts = (answer_text(item, "reward_model.equivalent_answers", source) for item in values)
    return tuple(text for text in texts if text is not None)


def _parse_demonstration(text: str, source: str) -> Response:
    response = parse_response(text)
    if response is None:
        raise UserError(
            f"{source}: the demonstration breaks the response grammar (caption, think, answer: each once, in this "
            f"order, none empty, nothing between them); correct or drop it. It begins {text[:80]!r}"
        )
    return response


def _store_image(folder: Path, encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        suffix = (image.format or "png").lower()
    file = folder / f"{hashlib.sha256(encoded).hexdigest()[:20]}.{suffix}"
    if not file.exists():
        write_atomic(file, encoded, durable=False)
    return f"{folder.name}/{file.name}"
