"""A checkpoint whose tokenizer, template or processor is missing, damaged or another model's is refused in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.errors import UserError

FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("processor_config.json", "chat_template.jinja"),
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "hf"
    shutil.copytree(tiny_checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(checkpoint: Path) -> str | None:
    try:
        ChatProcessor(checkpoint)
    except UserError as fault:
        return str(fault)
    return None


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not text": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_changes_nothing(checkpoint: Path, tiny_checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    whole, stock = path.read_bytes(), ChatProcessor(tiny_checkpoint)
    for damage, apply in DAMAGES.items():
        content = apply(whole)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        said = refusal(checkpoint)
        if said is None:
            assert ChatProcessor(checkpoint).encode_text("How many?") == stock.encode_text("How many?"), damage
        else:
            assert str(checkpoint) in said, (damage, said)
            assert "\n" not in said, (damage, said)


def test_no_tokenizer_file_never_trains(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json or vocab\.json and merges\.txt"):
        ChatProcessor(checkpoint)


def test_no_image_processor(checkpoint: Path) -> None:
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json or processor_config\.json"):
        ChatProcessor(checkpoint)


def test_no_chat_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template fails"):
        ChatProcessor(checkpoint)


def test_a_tokenizer_larger_than_the_embedding(checkpoint: Path) -> None:
    changed(checkpoint / "config.json", lambda c: c["text_config"].update(vocab_size=399))
    with pytest.raises(UserError, match=r"tokenizer\.json has 400 tokens, and the model embeds vocab_size \(399\)"):
        ChatProcessor(checkpoint)


def test_a_tokenizer_far_smaller_than_the_embedding(checkpoint: Path) -> None:
    changed(checkpoint / "config.json", lambda c: c["text_config"].update(vocab_size=151_936))
    with pytest.raises(UserError, match=r"tokenizer\.json is not this model's: it has 400 tokens for 151936 rows"):
        ChatProcessor(checkpoint)


def test_another_models_image_token_or_patch(checkpoint: Path) -> None:
    config = (checkpoint / "config.json").read_text()
    changed(checkpoint / "config.json", lambda c: c.update(image_token_id=7))
    with pytest.raises(UserError, match=r"config\.json has image_token_id 7, tokenizer\.json"):
        ChatProcessor(checkpoint)
    (checkpoint / "config.json").write_text(config)
    changed(checkpoint / "config.json", lambda c: c["vision_config"].update(patch_size=14))
    with pytest.raises(UserError, match=r"image processor's patch_size is 16, patch_size in config\.json 14"):
        ChatProcessor(checkpoint)
