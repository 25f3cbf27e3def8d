"""Checks of an HF directory: it has all files of its tokenizer and its image processor, undamaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError

# Of each line one must be there; the second of a pair of names is what other versions of transformers write.
_NEEDED = (
    (("config.json",),),
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    (("preprocessor_config.json",), ("processor_config.json",)),
)
_READ_AS_JSON = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "chat_template.json", "special_tokens_map.json"),
    "added_tokens.json",
)
_LARGE_JSON = ("tokenizer.json", "vocab.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path} is not valid JSON ({fault}); copy the checkpoint again") from fault
    except OSError as fault:
        raise UserError(f"{path} cannot be read ({fault.strerror}); copy the checkpoint again") from fault
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a JSON object; copy the checkpoint again")
    return content


def check_processor_files(directory: Path) -> None:
    """Raise UserError for a file that is missing or not JSON. The large ones are only looked for."""
    for choices in _NEEDED:
        if not any(all((directory / name).is_file() for name in names) for names in choices):
            needed = " or ".join(" and ".join(names) for names in choices)
            raise UserError(f"{directory} has no {needed}; give the directory of a whole HF Qwen3-VL checkpoint")
    for name in _READ_AS_JSON:
        if (directory / name).exists():
            read_json_object(directory / name)


def loading_failed(directory: Path, fault: Exception) -> UserError:
    """The error of a directory that transformers cannot load: the file that is not JSON, else what it says."""
    for name in _LARGE_JSON:
        if (directory / name).exists():
            try:
                read_json_object(directory / name)
            except UserError as damaged:
                return damaged
    said = (str(fault).strip() or type(fault).__name__).splitlines()[0][:300]
    return UserError(
        f"{directory}: tokenizer.json, tokenizer_config.json or the processor's files cannot be loaded ({said}); copy "
        "the checkpoint again"
    )
