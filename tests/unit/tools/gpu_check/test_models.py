"""``tools/gpu_check`` trains as many layers of the 4B-shaped model as fit on a GPU, and reports how many."""

from __future__ import annotations

import pytest

from prism_megatron.config import ModelConfig
from tools.gpu_check import models, parts

GIB = 2**30


def test_an_h200_holds_the_whole_model() -> None:
    assert models.fitting_layers(139 * GIB) == 36
    sizes = [models.step_bytes(36, ModelConfig("", "fp8", recompute=again)) / GIB for again in (True, False)]
    assert sizes == pytest.approx([105, 139], abs=1), "without recomputation nothing is left over"


def test_fewer_layers_are_reported() -> None:
    layers = models.fitting_layers(79 * GIB)
    assert 12 <= layers < 24
    variants = {"bf16": {"note": models.note_on_depth(layers)}, "fp8": {"note": models.note_on_depth(36)}}
    results = {"train": {"variants": variants}}
    assert parts.lines_of(results, ("error", "fault")) == []
    assert parts.lines_of(results, ("note",)) == [
        f"train bf16: {layers} of 4B's 36 decoder layers, not the full model",
    ]


def test_a_gpu_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="a GPU of 16 GiB is too small to train a few layers of 4B"):
        models.fitting_layers(16 * GIB)
