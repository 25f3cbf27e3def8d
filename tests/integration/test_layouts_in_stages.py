"""Alignment, whole, on two pipeline stages: policy, discriminator and engine give the numbers of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observe import metrics as names


def test_alignment_on_two_pipeline_stages(
    speaking_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    place = [
        *("tiny_align", f"run.dir={tmp_path}", f"model.hf_checkpoint={speaking_checkpoint}"),
        *(f"discriminator.hf_checkpoint={speaking_checkpoint}", f"data={tiny_data}/alignment.parquet"),
        *("run.train_iters=2", "run.save_interval=2", "eval.num_questions=0", "prompts_per_iteration=2"),
        *("rollout.samples_per_prompt=4", "rollout.max_response_tokens=96"),
        *("discriminator.num_experts=8", "discriminator.load_balance_coeff=0.01"),
    ]
    measured: list[list[dict[str, Any]]] = []
    for stages in (1, 2):
        layout = [f"run.name=stages{stages}", f"parallel.pipeline_model_parallel_size={stages}"]
        launch(stages, ["-m", "prism_megatron.train", *place, *layout])
        log = tmp_path / f"stages{stages}" / "metrics.jsonl"
        measured.append([json.loads(line) for line in log.read_text().splitlines()])
    compared = (names.DISCRIMINATOR_LOSS, names.LOAD_BALANCE_LOSS, names.POLICY_LOSS, names.GRAD_NORM, names.ENTROPY)
    for one, two in zip(*measured, strict=True):
        assert one[names.RESPONSE_TOKENS] == two[names.RESPONSE_TOKENS], "the same seeds sample the same responses"
        for name in compared:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
