"""Seeds of sampled responses."""

from __future__ import annotations

from prism_megatron.data.seeds import sample_seed


def test_seeds_differ_by_run_iteration_and_prompt_and_by_nothing_else() -> None:
    seeds = {sample_seed(run, iteration, prompt) for run in (1, 2) for iteration in (0, 1) for prompt in ("x", "y")}
    assert len(seeds) == 8
    assert sample_seed(1, 0, "x") == sample_seed(1, 0, "x")
    assert all(0 <= seed < 2**31 for seed in seeds)
