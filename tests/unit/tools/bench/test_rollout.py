"""The rollout benchmark's arithmetic and refusals; it is run by hand, since it starts two engines."""

from __future__ import annotations

import pytest

from tools.bench import rollout


def test_the_engines_part_of_a_step() -> None:
    steps = [
        dict(zip(("sync", "rollout", "train"), seconds, strict=True)) for seconds in ((1, 4, 5), (2, 2, 9), (1, 8, 5))
    ]
    assert rollout.shares(steps) == {
        "sync_seconds": 1,
        "rollout_seconds": 4,
        "train_seconds": 5,
        "engine_share": 0.5,
    }


def test_engines_must_give_the_same_tokens() -> None:
    batches = [[(1, 2, 3), (4, 5)], [(6, 7), (8,)]]
    rollout.check_same({"child": batches, "colocated": batches})
    as_many = [[(1, 2, 3), (4, 5)], [(6, 9), (8,)]]
    with pytest.raises(RuntimeError, match=r"of batch 1, response 0 is \(6, 7\) from the child process and \(6, 9\)"):
        rollout.check_same({"child": batches, "colocated": as_many})


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--prompts", "many"], ["--prompts", "0,4"]])
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tools.bench.rollout", *arguments])
    assert rollout.main() == 2
    assert "must be at least 2 for a median and a p90, and --prompts" in capsys.readouterr().err
