"""The memory estimate of recipes compared with measured memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.memory import PARTS

ROOT = Path(__file__).resolve().parents[2]


_TRIED = ("recompute", "bf16", "tensor parallel")  # all of them take minutes


@pytest.mark.slow
def test_estimates_are_near_measured_memory(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.bench.memory",
        "--cases",
        ",".join(_TRIED),
        "--out",
        str(tmp_path / "memory.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert tuple(cases) == _TRIED
    for case, ranks in cases.items():
        for rank in ranks:
            measured, estimated = rank["measured"], rank["estimated"]
            for part in PARTS[:-1]:
                assert estimated[part] == pytest.approx(measured[part], rel=0.01), (case, part, rank)
            assert 0.9 < estimated["activations"] / measured["activations"] < 1.25, (case, rank)
