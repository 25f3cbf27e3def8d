"""HF checkpoint directories: reading tensors by name, writing a complete directory at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


class HFWeights:
    """The tensors of an HF checkpoint directory, read one at a time (close it when done).

    Raises ValueError, naming the file, when the directory has no weights or one of its files is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (directory / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise ValueError(f"{directory} holds no model.safetensors (or its index); give a complete HF checkpoint")
        self._files = []
        self._owner: dict[str, Any] = {}
        for name in files:
            path = directory / name
            if not path.is_file():
                raise ValueError(f"{index} lists {name}, which is missing; copy the checkpoint again")
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or truncated ({error}); copy it again") from error
            self._files.append(opened)
            self._owner.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._owner.clear()
        self._files.clear()

    @property
    def names(self) -> set[str]:
        return set(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner:
            raise ValueError(f"{self.directory} has no tensor {name}; is it a checkpoint of another model?")
        tensor: Tensor = self._owner[name].get_tensor(name)
        return tensor


def save_hf(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    template: Path,
    config_changes: dict[str, Any] | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Write a checkpoint directory that HF and vLLM load; tokenizer and processor come from ``template``.

    ``config_changes`` is merged into the template's ``config.json``. The directory appears only when complete; one that
    was there before is replaced.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_shards(partial, tensors, shard_bytes)
    for name in _SIDE_FILES:
        if (template / name).is_file():
            shutil.copy(template / name, partial / name)
    config = json.loads((template / "config.json").read_text())
    _merge(config, config_changes or {})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    replace_directory(partial, directory)


def replace_directory(new: Path, place: Path) -> None:
    """Put ``new`` where ``place`` is. There is never a moment with half of either."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _save_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + size > shard_bytes:
            flush()
        held[name] = tensor.detach().cpu().contiguous().clone()
        total += size
    flush()
    if len(shards) == 1:
        os.replace(directory / "shard-0", directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / f"shard-{number}", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            _merge(base.setdefault(key, {}), value)
        else:
            base[key] = value
