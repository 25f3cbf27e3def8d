"""Learning-rate schedules, by hand."""

from __future__ import annotations

import pytest

from prism_megatron.config import OptimizerConfig
from prism_megatron.optim.schedule import learning_rate


def rates(style: str, iterations: list[int]) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_fraction=0.2, decay_style=style)
    return [learning_rate(config, i, 10) for i in iterations]


def test_warmup_then_decay() -> None:
    assert rates("constant", [0, 1, 2, 9]) == [0.5, 1.0, 1.0, 1.0]
    assert rates("linear", [2, 6]) == pytest.approx([1.0, 0.6])
    assert rates("cosine", [2, 6]) == pytest.approx([1.0, 0.6])
