"""The policy's HF directory says the same in transformers and in vLLM, both as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("hf_text_worker.py")
QUICKSTART = ROOT / "runs" / "quickstart"
PROMPTS = 20


def test_identical_greedy_text(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    """On what `make quickstart` trained, where it has been run; else on a fresh checkpoint."""
    trained = (QUICKSTART / "hf" / "config.json").is_file()
    checkpoint = QUICKSTART / "hf" if trained else tiny_checkpoint
    prompts = (QUICKSTART / "data" if trained else tiny_data) / "heldout.parquet"
    out = tmp_path / "answers.json"
    command = [sys.executable, "-W", "ignore", str(WORKER), str(checkpoint), str(prompts), str(PROMPTS), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-4000:])
    answers = json.loads(out.read_text())
    assert len(answers["vllm"]) == PROMPTS
    assert len(set(answers["vllm"])) > 1, "the pictures and questions matter"
    assert answers["transformers"] == answers["vllm"]
    if trained:
        assert all("<answer>" in text for text in answers["vllm"])
