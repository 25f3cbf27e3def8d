"""tools/parity as a user runs it: own chats, a dump for anyone's comparison, and one line for what cannot be run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.data.shapes import ShapesConfig, sample_scenes

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.parity", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_own_chats_and_dump(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (picture,) = sample_scenes(1, ShapesConfig())
    picture.save(tmp_path / "scene.png")
    question = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "How many are red?"}]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}],
        [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes"}],
    ]
    inputs, dump = tmp_path / "chats.jsonl", tmp_path / "ours.safetensors"
    inputs.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = run("--hf", str(tiny_checkpoint), "--tp", "2", "--packed", "--inputs", str(inputs), "--dump", str(dump))
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["layout"] == "2x-tp2-packed"
    assert measured["rows"] == 2
    assert measured["within_tolerance"]
    assert 0 < measured["logits_relative"] < 2e-5, "equal to the bit would mean that one side was compared with itself"
    dumped = load_file(dump)
    assert dumped.keys() == {"row_0", "row_1", "input_ids_0", "input_ids_1"}
    for row in range(2):
        assert dumped[f"row_{row}"].dtype == torch.float32
        assert len(dumped[f"row_{row}"]) == len(dumped[f"input_ids_{row}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "4"], "num_query_groups (2) must be divisible by tensor_model_parallel_size (4); use 2 or less"),
        (["--pp", "3"], "num_layers (4) must be divisible by pipeline_model_parallel_size (3); use 2 or less"),
        (["--vpp", "2"], "need pipeline_model_parallel_size above 1"),
        (["--inputs", __file__], "line 1: not a chat in HF's messages format"),
    ],
)
def test_refusals(arguments: list[str], message: str, tiny_checkpoint: Path) -> None:
    done = run("--hf", str(tiny_checkpoint), *arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in done.stderr
