"""Start the trainer's ranks for a list of parity cases and read their results."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.types import EncodedPrompt
from tools.parity.cases import Case
from tools.parity.inputs import save_rows
from tools.processes import run_module


def run_cases(
    checkpoint: Path, rows: Sequence[EncodedPrompt], cases: Sequence[Case], case_timeout: float = 120
) -> list[dict[str, Tensor]]:
    """Run each case on its own ranks. Raises RuntimeError with their output when one fails or hangs."""
    with tempfile.TemporaryDirectory() as folder:
        save_rows(rows, Path(folder) / "rows.safetensors")
        plan = Path(folder) / "plan.json"
        settings = {
            "checkpoint": str(checkpoint.resolve()),
            "rows": f"{folder}/rows.safetensors",
            "spec": asdict(ChatProcessor(checkpoint).input_spec),
            "out": folder,
            "case_timeout": case_timeout,
            "cases": [asdict(case) for case in cases],
        }
        plan.write_text(json.dumps(settings))
        done = run_module(
            "tools.parity.worker",
            [str(plan)],
            timeout=60 + case_timeout * len(cases),
            environment={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )
        if done.status != 0:
            end = "did not end in time" if done.status is None else f"ended with status {done.status}"
            raise RuntimeError(f"ranks {end}:\n{done.output[-6000:]}")
        return [load_file(f"{folder}/{number}.safetensors") for number in range(len(cases))]
