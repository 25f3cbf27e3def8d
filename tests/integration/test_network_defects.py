"""Defects of the paper's discriminator (spec 3.3) that need a network to show that they are gone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("network_defects_worker.py")


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("defects") / "measured.json"
    launch(1, [str(WORKER), str(tiny_checkpoint), str(tiny_data / "alignment.parquet"), str(out)])
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("experts", ["shared", "dedicated"])
def test_w1_load_balancing_has_a_gradient_under_recomputation(measured: dict[str, Any], experts: str) -> None:
    assert measured[f"{experts}_gradient"] > 1e-4
    assert measured[f"{experts}_recompute_differs"] < 1e-5 * measured[f"{experts}_gradient"]


def test_w2_a_score_does_not_depend_on_its_neighbours_lengths(measured: dict[str, Any]) -> None:
    assert measured["spread"] > 0.1
    assert measured["alone_differs"] < 1e-5 * measured["spread"] + 1e-4


def test_a_score_does_not_depend_on_who_shares_its_prompt(measured: dict[str, Any]) -> None:
    assert measured["shared_tokens"] < 0.9 * measured["whole_tokens"], "the prompt is computed once a branch"
    assert measured["shared_spread"] > 0.1
    assert measured["shared_differs"] < 1e-5 * measured["shared_spread"] + 1e-4


def test_the_gradient_penalty_is_r1_of_the_real_network(measured: dict[str, Any]) -> None:
    # 512 draws of a squared normal: a standard error of 6 %.
    assert measured["r1"] > 1e-6
    assert measured["r1_estimate"] == pytest.approx(measured["r1"], rel=0.25)


def test_replay_is_bounded_by_prompt_and_drawn_by_seed_and_iteration(measured: dict[str, Any]) -> None:
    assert measured["replay_nothing"] == 0, "nothing is past at the start"
    assert measured["replay_kept"] == {"0": 2, "1": 0, "2": 2}, "the prompt not seen for longest left"
    assert len(measured["replay_drawn"]) == 6, "three responses, two branches"
    assert [branch for _, branch, _ in measured["replay_drawn"]] == [0, 1] * 3
    assert not any(fresh for *_, fresh in measured["replay_drawn"])
    assert measured["replay_again"], "the same after a restart"
    assert measured["replay_same_text"]


def test_what_is_replayed_is_cut_on_both_sides(measured: dict[str, Any]) -> None:
    assert measured["replay_cut"] == [[True, 10, 10]] * 6


def test_w4_no_score_is_thinned_by_dropout(measured: dict[str, Any]) -> None:
    assert measured["dropout_differs"] == 0


def test_w4_scores_are_not_rounded_to_the_models_precision(measured: dict[str, Any]) -> None:
    assert measured["head_dtype"] == measured["score_dtype"] == "torch.float32"
    assert not measured["rounded"]


def test_a_score_that_is_not_finite_is_refused_by_name(measured: dict[str, Any]) -> None:
    assert measured["refused"].startswith("score of sample 0 is nan; the step is refused")


def test_a_gradient_that_is_not_finite_is_refused_by_name(measured: dict[str, Any]) -> None:
    message = r"gradient norm is nan, and the first gradient not finite is that of vision\S+; the step is refused"
    assert re.match(message, measured["gradient_refused"])
