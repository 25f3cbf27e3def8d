"""A weight update is whole or it is refused; seeds do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.rollout.requests import sample_seed
from prism_megatron.rollout.weight_sync import complete_once

EXPECTED = frozenset({"a", "b"})


def test_complete_update_passes_through() -> None:
    given = [("b", torch.ones(1)), ("a", torch.zeros(1))]
    assert list(complete_once(iter(given), EXPECTED, 1)) == given


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "weight update 7: 1 parameters did not arrive, first b"),
        (["a", "c"], "weight update 7: the engine has no parameter c"),
        (["a", "a"], "weight update 7: a arrived twice"),
    ],
)
def test_incomplete_updates_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(complete_once(((name, torch.ones(1)) for name in names), EXPECTED, 7))


def test_seeds_differ_by_run_iteration_and_prompt_and_by_nothing_else() -> None:
    seeds = {sample_seed(run, iteration, prompt) for run in (1, 2) for iteration in (0, 1) for prompt in ("x", "y")}
    assert len(seeds) == 8
    assert sample_seed(1, 0, "x") == sample_seed(1, 0, "x")
    assert all(0 <= seed < 2**31 for seed in seeds)
