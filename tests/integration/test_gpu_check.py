"""tools/gpu_check as a user runs it on a machine without a GPU, and what it makes of a part that hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu_check import parts

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tools.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_the_dry_run_measures_what_a_cpu_can(tmp_path: Path) -> None:
    done = run("--dry", "--only", "names,fp8", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["faults"] == []
    assert {kind: found["hf_tensors"] for kind, found in result["parts"]["names"]["variants"].items()} == {
        "dense": 103,
        "experts": 103,
        "discriminator": 104,
    }
    fp8 = result["parts"]["fp8"]["variants"]
    assert fp8["bf16"]["kl_nats_per_token"].keys() == {"0", "2", "4"}
    assert 0 < fp8["bf16"]["kl_nats_per_token"]["0"] < 1e-2, "rounding shows, and is small"
    assert fp8["fp32"]["loss"][-1] < fp8["fp32"]["loss"][0]
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        assert fp8[f"fp8_{recipe}"]["needs"] == "a GPU"
        assert fp8[f"fp8_{recipe}"]["megatron"]["fp8_recipe"] == recipe


def test_a_part_that_hangs_is_recorded_and_the_next_one_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("names", "parity"):
        monkeypatch.setitem(parts.SECONDS, part, 0.05)
    options = parts.Options(tmp_path / "out.json", dry=True)
    assert parts.check(["names", "parity"], options) == 1
    result = json.loads(options.out.read_text())
    assert result["faults"] == ["names: no end after 0.05 s", "parity: no end after 0.05 s"]


def test_what_a_variant_should_not_have_measured_is_a_fault() -> None:
    variants = {"one": {"fault": None}, "two": {"fault": "too far"}, "three": {"error": "ValueError: no"}, "four": {}}
    found = parts.lines_of({"parity": {"variants": variants, "error": "exit status -11"}}, ("error", "fault"))
    assert found == ["parity: exit status -11", "parity two: too far", "parity three: ValueError: no"]


def test_make_takes_the_python_at_hand_where_no_environment_was_made(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it would check this GPU")
    for folder in ("prism_megatron", "recipes", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    at_hand = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["make", "-f", str(ROOT / "Makefile"), "gpu-check"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | at_hand, capture_output=True, text=True, check=False)
    assert "error: this needs a GPU and Transformer Engine" in done.stderr


def test_refusals() -> None:
    done = run("--only", "speed")
    assert (done.returncode, done.stderr[:50]) == (2, "error: no part speed; there are names, parity, fp8, train,"[:50])
