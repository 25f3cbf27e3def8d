"""vLLM inside the ranks: its numbers are HF's, before and after a weight update, at tensor parallelism 1 and 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_equals_hf(
    ranks: int,
    tiny_checkpoint: Path,
    other_tiny_checkpoint: Path,
    tiny_data: Path,
    launch: Callable[..., str],
    tmp_path: Path,
) -> None:
    out = tmp_path / "measured.json"
    prompts = tiny_data / "heldout.parquet"
    launch(ranks, [str(WORKER), str(tiny_checkpoint), str(other_tiny_checkpoint), str(prompts), str(ranks), str(out)])
    measured = json.loads(out.read_text())
    assert measured["first"] < 1e-4
    assert measured["second"] < 1e-4, "stale weights, prefixes or pictures"
    assert measured["greedy"] < 1e-4
    assert measured["cold"] < 1e-4, "log-probabilities are not those of the temperature that was sampled at"
    assert measured["cold_is_likelier"] > 0.1, "sampled at another temperature than asked for"
    assert measured["same_seeds_same_tokens"]
    assert measured["alone_same_tokens"], "a sample depends on what else is in the batch"
    assert measured["samples_differ"]
    assert measured["visual_tokens"] == []
    assert measured["update_changes_tokens"]
    assert measured["recovers"], "an update after a refused one"
    assert measured["process_untouched"], "vLLM left another random state or thread count behind"
    assert measured["version_at_start"] is None
    assert measured["versions"] == [1]
    assert "the last update was refused" in measured["refused"]
    if ranks > 1:
        assert "layernorm.weight is not the same on rank 0 and rank 1" in measured["drifted"]
    assert "1 parameters did not arrive" in measured["missing"]
    assert "the engine has no parameter nobody" in measured["unknown"]
    assert "600 response tokens do not fit max_model_len (512)" in measured["too_long"]
    assert measured["nothing_asked"] == []
    assert "0 of 6 prompts were answered within rollout.timeout_seconds (0.001)" in measured["timeout"]
    assert measured["goes_on_after_timeout"]
    assert "parameters did not arrive, first" in measured["dropped"]
    assert measured["doubled"].endswith("arrived twice")
    assert measured["recovers_midway"], "modules half filled by a refused update kept what they had"
    check_guard(measured["guard"])


def check_guard(found: dict[str, str]) -> None:
    """A parameter left out of a sync is found and named; a complete sync passes before and after."""
    assert "nothing" not in found
    assert "nothing again" not in found
    assert "its prefix cache still has results of earlier weights" in found["prefix cache"]
    assert "its encoder cache still has results of earlier weights" in found["encoder cache"]
    # It holds prepared pixels, no result of a weight: left in place it changes no answer.
    assert "multimodal cache" not in found
    assert "the first is model.language_model.embed_tokens.weight" in found["tied output"]
    assert "weight_loader" in found["layerwise reload"], "vLLM cannot load into what it has packed"
    for lost in ("layers.1.self_attn.v_proj.weight", "blocks.1.norm1.weight", "embed_tokens.weight"):
        assert re.search(rf"1 of the engine's parameters .* the first is \S*{re.escape(lost)}$", found[lost])
