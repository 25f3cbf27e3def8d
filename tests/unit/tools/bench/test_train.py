"""The training benchmark's arithmetic; ``test_stages.py`` counts operations, an integration test runs it."""

from __future__ import annotations

import pytest

from tools.bench.inputs import Settings
from tools.bench.train import Work, _as_json, speed, with_recomputed


def test_rates_are_those_of_each_steps_own_tokens_and_operations() -> None:
    spent = Work(tokens=[100, 200], flops=[1e12, 2e12], hardware_flops=[1.2e12, 2.4e12])
    found = speed(spent, seconds=[1.0, 2.0], ranks=2)
    assert found["tokens_per_second"] == pytest.approx(100)
    assert found["tokens_per_second_per_rank"] == pytest.approx(50)
    assert found["step_seconds"]["median"] == pytest.approx(1.5)
    assert found["flops_per_step"] == pytest.approx(1.5e12)
    assert found["tflops_per_rank"] == pytest.approx(0.5)
    assert found["mfu"] is None, "of a CPU no peak is known"
    assert with_recomputed(spent, None) == {"hardware_flops_per_step": pytest.approx(1.8e12), "hfu": None}
    assert with_recomputed(spent, 0.3)["hfu"] == pytest.approx(0.36), "what is done twice counts for HFU"


def test_older_baselines_are_of_the_same_settings() -> None:
    assert "discriminator_size" not in _as_json(Settings())
    assert _as_json(Settings(discriminator_size="2b"))["discriminator_size"] == "2b"
