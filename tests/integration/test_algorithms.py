"""The method's variants, a few iterations each on the tiny model: they run, and what makes them different acts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observe import metrics as names
from prism_megatron.types import BRANCH_NAMES
from tests.models import make_variant

type Logged = Callable[[str], list[dict[str, Any]]]

WORKER = Path(__file__).with_name("stages_worker.py")
SMALL = [
    *("run.train_iters=2", "run.save_interval=2", "eval.num_questions=0", "prompts_per_iteration=4"),
    *("rollout.samples_per_prompt=4", "rollout.max_response_tokens=96"),
]
# Alignment first: on a CPU vLLM puts streams in the place of those that experts take hold of when they are built.
RUNS = {
    "shared": [
        *("tiny_align", "discriminator.experts=shared", "discriminator.num_experts=4"),
        *("discriminator_steps=2", "label_smoothing=0.1", "run.log_rollouts_per_iteration=16"),
        *("gating.mode=rlvr_v2", "combine=weighted_sum", "score_std_floor=0.1"),
    ],
    "reference": [
        *("tiny_align", "compat=reference", "discriminator_optimizer.lr=1e-3"),
        *("discriminator.num_experts=4", "discriminator.load_balance_coeff=0"),
    ],
    "dapo": [
        *("tiny_rlvr", "algorithm=dapo", "mini_batches_per_iteration=2", "epochs_per_iteration=2"),
        *("clip_low=0.01", "clip_high=0.02", "dual_clip=3", "importance_cap=2", "overlong_buffer_tokens=32"),
        "mask_truncated=true",
    ],
    "gspo": ["tiny_rlvr", "algorithm=gspo", "mini_batches_per_iteration=2", "clip_low=3e-4", "clip_high=4e-4"],
    "grpo": [
        *("tiny_rlvr", "clip_low=0", "clip_high=0", "compat=reference"),
        *("optimizer.lr=1e-5", "kl_coeff=0.01"),
    ],
}


# Trained in the same ranks, on what the tiny policy is not.
OTHERS = ("untied", "experts")


@pytest.fixture(scope="module")
def root(
    speaking_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder in which every run has logged two iterations."""
    root = tmp_path_factory.mktemp("algorithms")
    common = [f"run.dir={root}", f"model.hf_checkpoint={speaking_checkpoint}", *SMALL]
    data = {
        "tiny_rlvr": [f"data={tiny_data}/rlvr_candidates.parquet"],
        "tiny_align": [f"data={tiny_data}/alignment.parquet", f"discriminator.hf_checkpoint={speaking_checkpoint}"],
    }
    runs = [[recipe, f"run.name={name}", *common, *data[recipe], *more] for name, (recipe, *more) in RUNS.items()]
    for kind in OTHERS:
        other = make_variant(kind, root / "models" / kind)
        sft = [f"run.dir={root}", f"model.hf_checkpoint={other}", f"data={tiny_data}/sft.jsonl", "global_batch_size=16"]
        runs.append(["tiny_sft", f"run.name={kind}", *sft, *SMALL[:3], "optimizer.lr=1e-3"])
    (root / "runs.json").write_text(json.dumps(runs))
    launch(1, [str(WORKER), str(root / "runs.json")])
    return root


@pytest.fixture(scope="module")
def logged(root: Path) -> Logged:
    def rows_of(name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [1, 2]
        return rows

    return rows_of


def test_dapo_samples_until_groups_differ_and_its_clips_act(logged: Logged) -> None:
    for row in logged("dapo"):
        assert row[names.GENERATED_PROMPTS] > 4, "not every first group is worth training on"
        assert row[names.VALID_GROUPS] < 1
        assert row[names.CLIP_FRACTION] > 0
        assert row[names.APPROX_KL] > 0
        assert row[names.TRUNCATED_FRACTION] == 0, "trainer and engine agree"
        assert row[names.TRAIN_ROLLOUT_RESPONSE_ABS_DIFF] < 1e-4, (
            "old log-probabilities are those of the sampling policy"
        )


@pytest.mark.parametrize("name", RUNS)
def test_trainer_and_engine_are_compared_and_cut_responses_counted(name: str, logged: Logged) -> None:
    for row in logged(name):
        mean, of_response = row[names.TRAIN_ROLLOUT_MEAN_ABS_DIFF], row[names.TRAIN_ROLLOUT_RESPONSE_ABS_DIFF]
        assert 0 < mean <= of_response <= row[names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF]
        assert -1e-7 < row[names.TRAIN_ROLLOUT_KL] < mean
        assert 0 <= row[names.CUT_RESPONSES] <= 1 - row[names.FORMAT_VALID] + 1e-9, "what is cut is outside the grammar"


@pytest.mark.parametrize("kind", OTHERS)
def test_sft_of_other_models_learns(kind: str, logged: Logged) -> None:
    first, second = logged(kind)
    assert 0 < second[names.LOSS] < first[names.LOSS]
    assert first[names.GRAD_NORM] > 0


def test_gspo_clips_sequences(logged: Logged) -> None:
    rows = logged("gspo")
    assert max(row[names.CLIP_FRACTION] for row in rows) > 0
    assert all(row[names.GENERATED_PROMPTS] == 4 for row in rows)


def test_on_policy_nothing_is_clipped(logged: Logged) -> None:
    rows = logged("grpo")
    assert all(row[names.CLIP_FRACTION] == 0 and row[names.APPROX_KL] == 0 for row in rows)
    assert rows[0][names.VALID_GROUPS] > 0
    assert rows[0][names.REFERENCE_KL] == pytest.approx(0, abs=1e-9), "the policy is where it started"
    assert 1e-7 < rows[1][names.REFERENCE_KL] < 0.1, "one small step away"


def test_a_shared_pool_trained_twice_per_step(logged: Logged, root: Path) -> None:
    scored = [json.loads(line) for line in (root / "shared" / "rollouts.jsonl").read_text().strip("\n").split("\n")]
    for row in logged("shared"):
        valid = row[names.FORMAT_VALID] * 16
        assert row[names.PERCEPTION_PAIRS] == row[names.REASONING_PAIRS] == pytest.approx(valid)
        assert -1 <= row[names.PERCEPTION_LENGTH_CORRELATION] <= 1
        responses = [r["perception_score"] for r in scored if r["iteration"] == row["iteration"] and r["format_valid"]]
        assert row[names.PERCEPTION_SCORE_LEVEL] - row[names.PERCEPTION_GAP] / 2 == pytest.approx(
            sum(responses) / len(responses), abs=1e-4
        ), "pairs are measured as they were scored, before any step on them"
        for branch in BRANCH_NAMES:
            loads = [row[names.expert_load(branch, expert)] for expert in range(4)]
            assert sum(loads) == pytest.approx(1)
            assert max(loads) <= 0.5, "top 2: no expert gets more than half of what is routed"
        assert 0 < row[names.PERCEPTION_ROUTER_ENTROPY] < math.log(4)
        # Top 2 of one pool of 4; the switch loss of a perfectly balanced one is top-k.
        assert row[names.LOAD_BALANCE_LOSS] > 1.9


def test_alignment_as_the_paper_has_it(logged: Logged) -> None:
    rows = logged("reference")
    assert rows[1][names.DISCRIMINATOR_LOSS] < rows[0][names.DISCRIMINATOR_LOSS]
    for row in rows:
        # Dedicated experts: two each, both always chosen.
        assert [row[names.expert_load("perception", e)] for e in range(4)] == pytest.approx([0.5, 0.5, 0, 0])
        assert [row[names.expert_load("reasoning", e)] for e in range(4)] == pytest.approx([0, 0, 0.5, 0.5])
    # The terminators identify the sides: one step of training separates demonstration and response.
    assert rows[1][names.PERCEPTION_GAP] > 0
