"""Defects of the paper's discriminator (spec 3.3) whose absence only a network can show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("network_defects_worker.py")


@pytest.fixture(scope="module")
def metrics(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("defects") / "metrics.json"
    launch(1, [str(WORKER), str(tiny_checkpoint), str(tiny_data / "alignment.parquet"), str(out)])
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("experts", ["shared", "dedicated"])
def test_w1_load_balancing_has_a_gradient_under_recomputation(metrics: dict[str, Any], experts: str) -> None:
    assert metrics[f"{experts}_gradient"] > 1e-4
    assert metrics[f"{experts}_recompute_differs"] < 1e-5 * metrics[f"{experts}_gradient"]


def test_w2_a_score_does_not_depend_on_its_neighbours_lengths(metrics: dict[str, Any]) -> None:
    assert metrics["spread"] > 0.1
    assert metrics["alone_differs"] < 1e-5 * metrics["spread"] + 1e-4


def test_a_score_does_not_depend_on_other_responses_to_its_prompt(metrics: dict[str, Any]) -> None:
    assert metrics["shared_tokens"] < 0.9 * metrics["total_tokens"], "the prompt is computed once a branch"
    assert metrics["shared_spread"] > 0.1
    assert metrics["shared_differs"] < 1e-5 * metrics["shared_spread"] + 1e-4


def test_the_gradient_penalty_is_r1_of_the_real_network(metrics: dict[str, Any]) -> None:
    # 512 draws of a squared normal: a standard error of 6 %.
    assert metrics["r1"] > 1e-6
    assert metrics["r1_estimate"] == pytest.approx(metrics["r1"], rel=0.25)


def test_replay_is_bounded_by_prompt_and_drawn_by_seed_and_iteration(metrics: dict[str, Any]) -> None:
    assert metrics["replay_nothing"] == 0, "nothing is past at the start"
    assert metrics["replay_size"] == {"0": 2, "1": 0, "2": 2}, "the prompt not seen for longest left"
    assert len(metrics["replay_drawn"]) == 6, "three responses, two branches"
    assert [branch for _, branch, _ in metrics["replay_drawn"]] == [0, 1] * 3
    assert not any(on_policy for *_, on_policy in metrics["replay_drawn"])
    assert metrics["replay_again"], "the same after a restart"
    assert metrics["replay_same_text"]


def test_replayed_pairs_are_truncated_on_both_sides(metrics: dict[str, Any]) -> None:
    assert metrics["replay_cut"] == [[True, 10, 10]] * 6


def test_w4_scores_have_no_dropout(metrics: dict[str, Any]) -> None:
    assert metrics["dropout_differs"] == 0


def test_w4_scores_are_not_rounded_to_the_models_precision(metrics: dict[str, Any]) -> None:
    assert metrics["head_dtype"] == metrics["score_dtype"] == "torch.float32"
    assert not metrics["rounded"]


def test_a_score_that_is_not_finite_is_refused_by_name(metrics: dict[str, Any]) -> None:
    assert metrics["refused"].startswith("score of sample 0 is nan; the step is refused")


def test_a_gradient_that_is_not_finite_is_refused_by_name(metrics: dict[str, Any]) -> None:
    message = r"gradient norm is nan, and the first gradient not finite is that of vision\S+; the step is refused"
    assert re.match(message, metrics["gradient_refused"])
