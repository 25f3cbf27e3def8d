"""HF directories: complete or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.convert.hf_io import HFWeights, save_hf
from tests.models import save_tensors


def template(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": {"a": 1, "b": 2}}))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(3)}
    changes = {"text_config": {"b": 3}}
    save_tensors(tmp_path / "out", tensors, template(tmp_path / "in"), config_changes=changes, shard_bytes=32)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with HFWeights(tmp_path / "out") as weights:
        assert weights.names == set(tensors)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"] == {"a": 1, "b": 3}
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_write_that_fails_leaves_the_old_directory(tmp_path: Path) -> None:
    source = template(tmp_path / "in")
    save_tensors(tmp_path / "out", {"t": torch.ones(2)}, source)

    def broken():  # type: ignore[no-untyped-def]
        yield "t", torch.zeros(2)
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        save_hf(tmp_path / "out", dict.fromkeys("tu", ((2,), torch.float32)), broken(), source)
    assert load_file(tmp_path / "out/model.safetensors")["t"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "holds no model.safetensors"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), "damaged or truncated"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    save_tensors(tmp_path / "out", {"t": torch.ones(2)}, template(tmp_path / "in"))
    damage(tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError, match=message):
        HFWeights(tmp_path / "out")


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_tensors(tmp_path / "out", {"t": torch.ones(2)}, template(tmp_path / "in"))
    with HFWeights(tmp_path / "out") as weights, pytest.raises(ValueError, match="has no tensor u"):
        weights["u"]
