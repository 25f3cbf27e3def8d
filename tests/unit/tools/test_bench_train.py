"""The training benchmark's arithmetic; ``tests/integration/test_bench_train.py`` runs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import EncodedPrompt
from recipes.tiny import tiny_sft
from tools.bench_inputs import model_sizes
from tools.bench_train import Prepared, with_recomputed


def test_what_is_computed_twice_counts_for_hfu() -> None:
    batches = [[TrainingSequence(EncodedPrompt((1, 2, 3)), (4,) * length)] for length in (100, 200)]
    config = tiny_sft()

    def hfu(recompute: bool) -> float:
        config.model.recompute = recompute
        prepared = Prepared(config, batches, {}, SimpleNamespace(sizes=model_sizes("tiny")), 0.0)
        assert with_recomputed(prepared, None)["hfu"] is None
        found: float = with_recomputed(prepared, 0.3)["hfu"]
        return found

    assert 0.3 < hfu(recompute=False) < 0.35, "the logits are made twice"
    assert hfu(recompute=True) == pytest.approx(0.4), "of three passes' worth the first is made again"
