"""Conversion of checkpoints: resumed after a kill, and incomplete or damaged input refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.config import ParallelConfig
from prism_megatron.convert import manifest
from prism_megatron.convert.convert_checkpoint import hf_to_megatron, megatron_to_hf
from prism_megatron.convert.hf_io import HFWeights
from prism_megatron.convert.manifest import digest_file, first_fault
from tests.models import save_tensors
from tools.convert import main

ROOT = Path(__file__).resolve().parents[3]
SEED = 3


def test_killed_conversions_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("killed_worker.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(worker), str(tiny_checkpoint), str(tmp_path), str(SEED)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    started = json.loads(answer.stdout)
    for direction in ("there", "back"):
        assert len(started[direction]) > 3, "it was killed"
        assert started[direction][-1] > started[direction][0] > 0
        assert started[direction] == sorted(started[direction]), "no attempt began earlier than the one before"
    assert first_fault(tmp_path / "megatron") is None
    with HFWeights(tiny_checkpoint) as before, HFWeights(tmp_path / "hf") as after:
        assert before.names == after.names
        assert all(torch.equal(before[name], after[name]) for name in before.names)
    assert {p.name for p in tmp_path.iterdir()} == {"megatron", "hf"}, "nothing unfinished is left"


def test_commands(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["hf-to-megatron", "--hf", str(tiny_checkpoint), "--out", str(tmp_path / "megatron"), "--tp", "2"]
    assert main(there) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert json.loads(summary)["tensors"] == len(lines) == len(load_file(tiny_checkpoint / "model.safetensors"))
    assert main(there) == 2
    assert "exists; remove it or give another --out" in capsys.readouterr().err
    back = ["megatron-to-hf", "--megatron", str(tmp_path / "megatron"), "--out", str(tmp_path / "hf")]
    assert main([*back, "--verify", str(tiny_checkpoint)]) == 0
    assert main([*there[:-4], "--out", str(tmp_path / "x"), "--tp", "3"]) == 2
    assert "num_attention_heads (4) must be divisible by --tp (3)" in capsys.readouterr().err
    assert main([*there[:-4], "--out", str(tmp_path / "x"), "--ep", "2"]) == 2
    assert "num_experts (1) must be divisible by --ep (2)" in capsys.readouterr().err


def test_every_file_is_hashed_once(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are written are hashed meanwhile, weights that are read before."""
    read: list[str] = []

    def digest(path: Path) -> manifest.FileEntry:
        read.append(f"{path.parent.name}/{path.name}")
        return digest_file(path)

    monkeypatch.setattr(manifest, "digest_file", digest)
    hf_to_megatron(tiny_checkpoint, tmp_path / "megatron", ParallelConfig(), file_bytes=300_000)
    stored = {f"megatron/{path.name}" for path in (tmp_path / "megatron").glob("*.distcp")}
    assert len(stored) > 3
    assert not stored & set(read)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", shard_bytes=300_000)
    assert {read.count(name) for name in stored} == {1}
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert not [name for name in read if "safetensors" in name]
    assert first_fault(tmp_path / "hf") is None


def test_a_damaged_conversion_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    hf_to_megatron(tiny_checkpoint, tmp_path / "megatron", ParallelConfig())
    path = tmp_path / "megatron" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp does not have its checksum"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_verify_finds_another_model(tiny_checkpoint: Path, other_tiny_checkpoint: Path, tmp_path: Path) -> None:
    hf_to_megatron(tiny_checkpoint, tmp_path / "megatron", ParallelConfig())
    with pytest.raises(ValueError, match=r"is not what .* holds"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", verify=other_tiny_checkpoint)
    assert not (tmp_path / "hf").exists()


def test_score_head_in_a_file_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Spec 8.2: the head may be in value_head.pt under trl's name, the backbone may be prefixed."""
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    save_tensors(tmp_path / "hf", {f"base_model.{n}": t for n, t in tensors.items()}, tiny_checkpoint)
    head = torch.randn(1, 128)
    torch.save({"v_head.summary.weight": head}, tmp_path / "hf" / "value_head.pt")
    with HFWeights(tmp_path / "hf") as weights:
        assert weights.names == {*tensors, "v_head.1.weight"}
        assert torch.equal(weights["v_head.1.weight"], head)
    torch.save({"head": head}, tmp_path / "hf" / "value_head.pt")
    with pytest.raises(ValueError, match=r"value_head\.pt holds \['head'\]; it must hold one of"):
        HFWeights(tmp_path / "hf")
