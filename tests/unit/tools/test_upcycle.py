"""Dense to experts by command: the loss it reports, the layout it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.upcycle import main

SIZES = ["--num-experts", "4", "--top-k", "2"]


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    answer: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_equal_experts_say_what_the_dense_model_says(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--hf", str(tiny_checkpoint), "--out", str(tmp_path / "same"), *SIZES]) == 0
    same = report(capsys)
    assert same["loss_after"] == pytest.approx(same["loss_before"], abs=1e-4)
    noisy = ["--noise-std", "2", "--experts", "shared"]
    assert main(["--hf", str(tiny_checkpoint), "--out", str(tmp_path / "noisy"), *SIZES, *noisy]) == 0
    after = report(capsys)
    assert after["loss_before"] == same["loss_before"]
    assert abs(after["loss_after"] - after["loss_before"]) > 0.01, "noise of twice the weights' size is heard"
    dense = load_file(tiny_checkpoint / "model.safetensors")["model.language_model.layers.1.mlp.down_proj.weight"]
    tensors = load_file(tmp_path / "noisy" / "model.safetensors")
    down = tensors["model.language_model.layers.1.mlp.experts.down_proj"]
    assert down.shape == (4, 384, 128)
    assert float((down - dense.T).std() / dense.std()) == pytest.approx(2, rel=0.02)
    assert tensors["v_head.1.weight"].shape == (1, 128)
    config = json.loads((tmp_path / "noisy" / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl_moe"
    assert (config["text_config"]["num_experts"], config["text_config"]["moe_intermediate_size"]) == (4, 384)


def test_a_score_head_is_made_only_when_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headless = tmp_path / "headless"
    assert main(["--hf", str(tiny_checkpoint), "--out", str(headless), *SIZES]) == 0
    tensors = load_file(headless / "model.safetensors")
    del tensors["v_head.1.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    again = ["--hf", str(headless), "--out", str(tmp_path / "again"), *SIZES]
    assert main(again) == 2
    assert "has experts already; --init-score-head gives it the score heads" in capsys.readouterr().err
    assert main([*again, "--init-score-head"]) == 0
    made = load_file(tmp_path / "again" / "model.safetensors")
    assert made.pop("v_head.1.weight").shape == (2, 128)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert main(["--hf", str(tmp_path / "again"), "--out", str(tmp_path / "more"), *SIZES, "--init-score-head"]) == 2
    assert "already has a score head" in capsys.readouterr().err
    assert main(["--hf", str(tiny_checkpoint), "--out", str(tmp_path / "x"), *SIZES, "--init-score-head"]) == 2
    assert main(["--hf", str(tiny_checkpoint), "--out", str(headless), *SIZES]) == 2
    assert "exists; remove it" in capsys.readouterr().err
