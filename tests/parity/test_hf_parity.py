"""Our Qwen3-VL against HF's, at tensor parallelism 1 and 2: log-probabilities, gradients, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_policy_equals_hf(
    ranks: int, sequence_parallel: bool, tiny_checkpoint: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "measured.json"
    launch(ranks, [str(WORKER), str(tiny_checkpoint), str(ranks), str(int(sequence_parallel)), str(out)])
    measured = json.loads(out.read_text())
    assert measured["logprob_relative_diff"] < 1e-6
    assert measured["entropy_abs_diff"] < 1e-4
    assert measured["grad_relative_diff"] < 1e-4, measured["worst_gradient"]
    assert measured["export_identical"]
    assert measured["padding_changes_nothing"] < 1e-6
