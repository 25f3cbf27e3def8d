"""Scoring, packed and one sequence at a time, measured on the smallest step there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import discriminator


def test_each_way_gives_its_spread_speed_and_memory(tmp_path: Path) -> None:
    result = discriminator.measure(discriminator.Settings("tiny_align", samples=1, prompts=1, rounds=2), tmp_path)
    assert result["sequences"] == 4, "two branches of a response and of a demonstration"
    tokens = result["mean_tokens"]["prompt"] + result["mean_tokens"]["response"]
    for way in ("packed", "one_at_a_time"):
        measured = result[way]
        assert measured["seconds"]["p90"] >= measured["seconds"]["median"]
        assert measured["tokens_per_second"] == pytest.approx(tokens * measured["sequences_per_second"])
        assert 0 <= measured["extra_peak_bytes"] < result["peak_bytes_of_both_ways"]
    medians = {way: result[way]["seconds"]["median"] for way in ("packed", "one_at_a_time")}
    assert result["ratio"] == pytest.approx(medians["one_at_a_time"] / medians["packed"])


def test_one_turn_has_no_p90(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tools.bench.discriminator", "--rounds", "1"])
    assert discriminator.main() == 2
    assert "--rounds must be at least 2" in capsys.readouterr().err
