"""HF directories of ours say the same in transformers and in vLLM, both as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.config import ParallelConfig
from prism_megatron.convert.convert_checkpoint import hf_to_megatron, megatron_to_hf
from prism_megatron.convert.hf_io import HFWeights
from tests.models import make_variant, save_tensors

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("hf_text_worker.py")
QUICKSTART = ROOT / "runs" / "quickstart"
PROMPTS = 20


def test_identical_greedy_text(speaking_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Use the model that `make quickstart` trained if it has run, otherwise a briefly trained checkpoint."""
    trained = (QUICKSTART / "hf" / "config.json").is_file()
    checkpoint = QUICKSTART / "hf" if trained else speaking_checkpoint
    prompts = (QUICKSTART / "data" if trained else tiny_data) / "heldout.parquet"
    answers = ask(checkpoint, prompts, PROMPTS, tmp_path)
    assert len(set(answers["vllm"])) > 1, "the pictures and questions matter"
    assert answers["transformers"] == answers["vllm"]
    assert all("<answer>" in text for text in answers["vllm"])


@pytest.mark.parametrize("kind", ["experts", "untied"])
def test_converted(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """Policies unlike the tiny one, experts stored as the released ones are, after a way to Megatron and back."""
    made = make_variant(kind, tmp_path / "made", seed=6)
    with HFWeights(made) as weights:
        save_tensors(tmp_path / "hf", {name: weights[name] for name in sorted(weights.names)}, made)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", ParallelConfig())
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=tmp_path / "hf")
    answers = ask(tmp_path / "back", tiny_data / "heldout.parquet", 6, tmp_path)
    assert len(set(answers["vllm"])) > 1
    # A random model writes bytes that are no text: one shows an unfinished character, the other waits for its end.
    texts = {name: [text.replace("\ufffd", "") for text in answers[name]] for name in answers}
    assert texts["transformers"] == texts["vllm"]


def ask(checkpoint: Path, prompts: Path, count: int, tmp_path: Path) -> dict[str, list[str]]:
    """Responses of transformers and vLLM to the first ``count`` prompts."""
    out = tmp_path / "answers.json"
    command = [sys.executable, "-W", "ignore", str(WORKER), str(checkpoint), str(prompts), str(count), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-4000:])
    answers: dict[str, list[str]] = json.loads(out.read_text())
    assert len(answers["vllm"]) == count
    return answers
