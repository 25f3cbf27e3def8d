"""Wilson's confidence interval, reported with every accuracy."""

from __future__ import annotations

import pytest

from prism_megatron.stages.evaluate import wilson_interval


def test_known_values() -> None:
    # Wilson's interval of 8 out of 10, as published in many places: 0.4902 to 0.9433.
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_at_0_and_1_it_stays_inside_and_has_a_width() -> None:
    low, high = wilson_interval(0, 500)
    assert (low, high) == (0.0, pytest.approx(0.0076, abs=1e-4))
    assert wilson_interval(500, 500) == [pytest.approx(1 - high), 1.0]
