"""Alignment and RLVR, whole, on two ranks: policy, discriminator and engine give the numbers of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observe import metrics as names

WORKER = Path(__file__).with_name("stages_worker.py")


@pytest.mark.slow
def test_alignment_on_two_pipeline_stages(
    speaking_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    common = [
        *("tiny_align", f"run.dir={tmp_path}", f"model.hf_checkpoint={speaking_checkpoint}"),
        *(f"discriminator.hf_checkpoint={speaking_checkpoint}", f"data={tiny_data}/alignment.parquet"),
        *("run.train_iters=2", "run.save_interval=2", "eval.num_questions=0", "prompts_per_iteration=2"),
        *("rollout.samples_per_prompt=4", "rollout.max_response_tokens=96"),
    ]
    measured: list[list[dict[str, Any]]] = []
    for stages in (1, 2):
        layout = [f"run.name=stages{stages}", f"parallel.pipeline_model_parallel_size={stages}"]
        launch(stages, ["-m", "recipes.train", *common, *layout])
        log = tmp_path / f"stages{stages}" / "metrics.jsonl"
        measured.append([json.loads(line) for line in log.read_text().splitlines()])
    compared = (names.DISCRIMINATOR_LOSS, names.LOAD_BALANCE_LOSS, names.POLICY_LOSS, names.GRAD_NORM, names.ENTROPY)
    for one, two in zip(*measured, strict=True):
        assert one[names.RESPONSE_TOKENS] == two[names.RESPONSE_TOKENS], "the same seeds sample the same responses"
        for name in compared:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_two_data_parallel_ranks(
    speaking_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    """Each rank samples and trains on half of the prompts; what is logged is of all of them."""
    # Alignment first: on a CPU vLLM puts streams in the place of those that experts take hold of when they are built.
    stages = {
        "align": [
            "tiny_align",
            *(f"discriminator.hf_checkpoint={speaking_checkpoint}", "discriminator.load_balance_coeff=0"),
            *("algorithm=gspo", "discriminator_steps=2", "discriminator_optimizer.lr=1e-5"),
        ],
        # So many samples of so many prompts at a time that both ranks find groups, and mixing them up would be seen.
        "dapo": [
            *("tiny_rlvr", "algorithm=dapo", "importance_cap=2", "overlong_buffer_tokens=32"),
            *("prompts_per_iteration=6", "oversampling=3", "rollout.samples_per_prompt=8"),
        ],
        "gspo": ["tiny_rlvr", "algorithm=gspo", "mini_batches_per_iteration=2", "clip_low=3e-4", "clip_high=4e-4"],
    }
    data = {
        "tiny_rlvr": f"data={tiny_data}/rlvr_candidates.parquet",
        "tiny_align": f"data={tiny_data}/alignment.parquet",
    }
    # Steps so small that they do not enlarge the rounding of sums taken in another order.
    small = [
        *("run.train_iters=2", "run.save_interval=2", "eval.num_questions=0", "prompts_per_iteration=4"),
        *("rollout.samples_per_prompt=4", "rollout.max_response_tokens=96", "optimizer.lr=1e-5"),
    ]
    for ranks in (1, 2):
        common = [f"run.dir={tmp_path}/{ranks}", f"model.hf_checkpoint={speaking_checkpoint}", *small]
        runs = [
            [recipe, data[recipe], f"run.name={name}", *common, *overrides]
            for name, (recipe, *overrides) in stages.items()
        ]
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        launch(ranks, [str(WORKER), str(tmp_path / "runs.json")])
    for name in stages:
        one, two = (measured(tmp_path / str(ranks) / name / "metrics.jsonl") for ranks in (1, 2))
        assert len(one) == 2
        for iteration in range(2):
            assert two[iteration] == pytest.approx(one[iteration], rel=1e-4, abs=1e-5), name


def measured(log: Path) -> list[dict[str, float]]:
    """All that is logged of each iteration, but for its stage, the time it took, and what is of micro-batches."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    # Balance is of a micro-batch's tokens: no mean of two halves'. Without a coefficient it is measured only.
    # The largest difference between trainer and engine is one of rounding: the stage itself refuses one above 1e-4.
    left_out = ("stage", "time", names.LOAD_BALANCE_LOSS, names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF)
    return [{k: v for k, v in row.items() if k not in left_out and not k.startswith("seconds_")} for row in rows]
