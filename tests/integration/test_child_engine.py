"""An engine in processes of its own: killed at work it costs time and nothing else, the second time it ends the run.

What it computes with is looked at, too: a parameter that was damaged on its way is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

WORKER = Path(__file__).with_name("child_engine_worker.py")


def test_killed_while_generating(
    tiny_checkpoint: Path, tiny_data: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    """Two training ranks share an engine of one process, at a temperature. An update is several times the memory.

    An engine of two processes passes, too; it takes a minute more.
    """
    prompts = tiny_data / "heldout.parquet"
    output = launch(2, [str(WORKER), str(tiny_checkpoint), str(prompts), "1", str(tmp_path)])
    for rank in range(2):
        measured = json.loads((tmp_path / f"measured_{rank}.json").read_text())
        assert measured["same_when_killed"], "the batch was not sampled again as it was"
        assert measured["versions"] == [[0], [1]]
        assert max(measured["differences"]) < 1e-4, "trainer and engine are not the same policy"
        assert measured["no_rows"] == []
        assert re.search(r"1 of the engine's .* first \S*layers\.1\.self_attn\.v_proj\.weight$", measured["damaged"])
        death = measured["second_death"]
        assert "was generating for longer than rollout.timeout_seconds (1)" in death
        assert death.endswith("It had been started again once before")
    assert output.count("the rollout engine of rank 0 died generating (") == 1
    assert "ended with SIGKILL" in output
    assert "It is started again with the weights it had" in output
