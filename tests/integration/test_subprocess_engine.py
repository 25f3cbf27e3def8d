"""An engine in processes of its own: killed at work it costs time and nothing else, the second time it ends the run.

What it computes with is looked at, too: a parameter that was damaged on its way is named, even if the engine is killed
while it is asked. So is one that only checksums tell from what was sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("subprocess_engine_worker.py")


@pytest.mark.parametrize(
    ("transport", "engine_ranks"),
    [
        ("auto", 1),
        pytest.param("collective", 1, marks=pytest.mark.slow),
        pytest.param("auto", 2, marks=pytest.mark.slow),
        pytest.param("collective", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_at_work(
    transport: str,
    engine_ranks: int,
    tiny_checkpoint: Path,
    tiny_data: Path,
    launch: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Two training ranks share an engine, at a temperature. An update is several times the memory."""
    arguments = [str(tiny_checkpoint), str(tiny_data / "heldout.parquet"), transport, str(engine_ranks), str(tmp_path)]
    output = launch(2, [str(WORKER), *arguments])
    for rank in range(2):
        measured = json.loads((tmp_path / f"measured_{rank}.json").read_text())
        assert measured["same_when_killed"], "the batch was not sampled again as it was"
        assert measured["versions"] == [[0], [1]]
        assert max(measured["differences"]) < 1e-4, "trainer and engine are not the same policy"
        assert measured["no_rows"] == []
        refused, nothing = measured["corrupted"]
        assert "layers.1.self_attn.v_proj.weight is not the same on rank 0 and engine process 0 of rank 0;" in refused
        assert nothing.startswith("the rollout engine has no complete set of weights")
        assert re.search(r"1 .* the first is \S*layers\.1\.self_attn\.v_proj\.weight$", measured["damaged"])
        death = measured["second_death"]
        assert "was generating for longer than rollout.timeout_seconds (1)" in death
        assert death.endswith("It had been restarted before")
    assert output.count("the rollout engine of rank 0 died generating (") == 1
    assert (
        len(
            re.findall(
                r"rank 0 (was found dead|died receiving weights|was lost while receiving weights: .*) \(", output
            )
        )
        == 1
    )
    assert output.count("ended with SIGKILL") >= 2
    assert output.count("It is restarted with the weights it had") == 2
