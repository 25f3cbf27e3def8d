"""A user's mistake: one line that names value, need and remedy, exit status 2, and nothing written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from prism_megatron.stages.setup import clear_disk_errors
from recipes.estimate.memory import PUBLISHED
from recipes.launch import main as launch_main
from recipes.local_run import launch as launch_pipeline
from recipes.train import main

ROOT = Path(__file__).resolve().parents[2]


def sft(checkpoint: Path, data: Path, runs: Path, *overrides: str) -> list[str]:
    return [
        *("tiny_sft", f"run.dir={runs}", "eval.num_questions=0", "run.train_iters=1"),
        *(f"model.hf_checkpoint={checkpoint}", f"data={data}", *overrides),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny_stf"],
            "unknown recipe 'tiny_stf'; there are tiny_sft, tiny_",
        ),
        (["tiny_sft", "optimizer.rl=1"], "unknown key 'optimizer.rl': optimizer has adam_beta1"),
        (["tiny_sft", "lr"], "override 'lr' is not of the form key=value"),
        (["tiny_sft", "optimizer.lr=fast"], "override 'optimizer.lr=fast' is refused"),
        (["tiny_rlvr", "algorithm=ppo"], "algorithm must be grpo or dapo or gspo, got 'ppo'"),
        (["tiny_rlvr", "compat=paper"], "compat must be fixed or reference, got 'paper'"),
        (["tiny_rlvr", "kl_estimator=k4"], "kl_estimator must be k1 or k2 or k3, got 'k4'"),
        (
            ["tiny_rlvr", "mini_batches_per_iteration=3"],
            "mini_batches_per_iteration (3) must divide rollout.samples_per_prompt (8)",
        ),
        (["tiny_align", "label_smoothing=0.5"], "label_smoothing must be in [0, 0.5), got 0.5"),
        (["tiny_align", "gating.mode=on"], "gating.mode must be none or acc_gating or gated"),
        (["tiny_align", "combine=max"], "combine must be per_branch or weighted_sum, got 'max'"),
        (["tiny_sft", "model.precision=fp16"], "model.precision must be fp32 or bf16 or fp8, got 'fp16'"),
        (["tiny_sft", "model.fp8.recipe=int8"], "model.fp8.recipe must be delayed or tensorwise or blockwise or mxfp8"),
        (
            ["tiny_sft", "model.fp8.recipe=delayed", "model.fp8.last_layers_bf16=1"],
            "model.fp8.recipe delayed has one history for all layers, so first_layers_bf16 (0) and last_layers_bf16 "
            "(1) must be 0; use recipe tensorwise",
        ),
    ],
)
def test_before_anything_is_read(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_only_a_user_error_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An error of torch keeps its traceback."""
    broken = patch("prism_megatron.train.run_stage", lambda config: torch.tensor([[1], [1, 2]]))
    with broken, pytest.raises(ValueError, match="expected sequence of length 1"):
        main(["tiny_sft"])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused here may be there")
def test_fp8_on_a_cpu_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny_sft", "model.precision=fp8"]) == 2
    expected = "error: model.precision fp8 needs Transformer Engine on a GPU; use bf16 or fp32\n"
    assert capsys.readouterr().err == expected


def test_pipeline_overrides_are_checked_before_the_first_stage() -> None:
    with pytest.raises(ValueError, match="override 'lr=1' must start with a stage"):
        launch_pipeline("tiny_pipeline", "never", ["lr=1"], 1)
    with pytest.raises(ValueError, match=r"unknown key 'run\.train_iter'"):
        launch_pipeline("tiny_pipeline", "never", ["rlvr.run.train_iter=1"], 1)
    with pytest.raises(ValueError, match="unknown recipe or pipeline 'tiny_pipelin'; there are tiny_pipeline"):
        launch_pipeline("tiny_pipelin", "never", [], 1)
    assert not Path("runs/never").exists()


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["launch", "tiny_pipeline", "--name", "never", "rlvr.optimizer.lr=1", "lr=1"])
    assert launch_main() == 2
    assert "error: override 'lr=1' must start with a stage" in capsys.readouterr().err


def test_files_that_are_not_there(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = tmp_path / "runs", tiny_data / "sft.jsonl"
    assert main(sft(tmp_path / "nothing", data, runs)) == 2
    assert "nothing has no config.json; give" in capsys.readouterr().err
    assert main(sft(tiny_checkpoint, tmp_path / "none.jsonl", runs)) == 2
    assert "none.jsonl: no such data file" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(sft(tiny_checkpoint, tmp_path / "empty.jsonl", runs)) == 2
    assert "empty.jsonl: empty data set" in capsys.readouterr().err
    for asked, message in (
        ([f"eval.data={tmp_path}/none.parquet"], "none.parquet: no such data file"),
        ([f"eval.data={data}"], "sft.jsonl, line 1: no answer; fill reward_model.ground_truth"),
        ([f"eval.data={tiny_data}/heldout.parquet"], "heldout.parquet has 40 rows, and 41 are asked for; lower"),
    ):
        assert main(sft(tiny_checkpoint, data, runs, *asked, "eval.num_questions=41")) == 2
        assert message in capsys.readouterr().err
    assert [entry.name for entry in runs.iterdir()] == ["data_cache"], "no run was begun"


def test_a_tiny_recipe_takes_no_real_model(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((PUBLISHED / "2b.json").read_text())
    assert main(sft(tmp_path, tiny_data / "sft.jsonl", tmp_path / "runs")) == 2
    error = capsys.readouterr().err
    assert "has hidden size 2048, and this recipe is for toy models of at most model.max_hidden_size (512)" in error
    assert "use the stage's recipe for its size, sft_..qwen3_vl_SIZE_.." in error
    assert not (tmp_path / "runs").exists()


def test_degrees_that_do_not_fit(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = tmp_path / "runs", tiny_data / "sft.jsonl"
    assert main(sft(tiny_checkpoint, data, runs, "parallel.tensor_model_parallel_size=3")) == 2
    assert "world size 1 is not a multiple of tensor (3)" in capsys.readouterr().err
    assert main(sft(tiny_checkpoint, data, runs, "parallel.tensor_model_parallel_size=2")) == 2
    assert "start a multiple of 2 ranks or lower a degree" in capsys.readouterr().err
    assert main(sft(tiny_checkpoint, data, runs, "parallel.pipeline_model_parallel_size=2")) == 2
    assert "is not a multiple of tensor (1) x pipeline (2)" in capsys.readouterr().err
    assert not runs.exists(), "nothing was read or written"


def test_damaged_checkpoints(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, launch: Callable[..., str]
) -> None:
    """These are found while loading, with the process groups up: the rank must still end, and say why in one line."""
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny_checkpoint, truncated)
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    command = ["-m", "recipes.train", *sft(truncated, tiny_data / "sft.jsonl", tmp_path / "runs")]
    output = launch(1, command, expect=2)
    assert "model.safetensors is damaged or truncated" in output
    assert "Traceback" not in output


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    message = r"no space left for .*; free some and run the same command"
    with pytest.raises(OSError, match=message) as caught, clear_disk_errors(tmp_path), open("/dev/full", "w") as full:
        full.write("x" * 10000)
    assert caught.value.errno == errno.ENOSPC


def test_nemo_runs_command_line_fails_with_its_stage(tmp_path: Path) -> None:
    command = ["recipes", "--factory", "tiny_sft", "config.run.train_iters=1", "run.executor=local", "--yes"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 1
    assert "error: runs/tiny/base has no config.json" in done.stdout + done.stderr
