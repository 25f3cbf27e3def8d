"""Ranks of the parity check: ``python -m tools.parity.worker PLAN.json``, started by ``tools.parity.ranks``."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save_file

from prism_megatron.config import ParallelConfig
from prism_megatron.parallel import groups
from prism_megatron.parallel.rendezvous import open_rendezvous
from prism_megatron.types import InputSpec
from tools.parity.cases import Case
from tools.parity.inputs import load_rows
from tools.parity.trainer import discriminator_results, load_processor, policy_results


def worker(plan: Path) -> None:
    """Run the cases of ``plan`` one after the other, each on its own ranks. The first failure ends the process.

    Ranks are forked from this process, which has imported everything: starting Python takes longer than a case.
    """
    settings = json.loads(plan.read_text())
    load_processor(Path(settings["checkpoint"]))
    for number, record in enumerate(settings["cases"]):
        case = Case(**{**record, "parallel": ParallelConfig(**record["parallel"])})
        _store, meeting = open_rendezvous()
        ranks = []
        for rank in range(case.ranks):
            if pid := os.fork():
                ranks.append(pid)
                continue
            os.environ |= {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            run_rank(case, settings, Path(settings["out"]) / f"{number}.safetensors")
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"{case.name}: a rank ended with status {os.waitstatus_to_exitcode(status)}")


def run_rank(case: Case, settings: dict[str, Any], out: Path) -> NoReturn:
    """Run one rank of a case and exit. A rank that exceeds the time limit prints its stack and exits."""
    faulthandler.dump_traceback_later(settings["case_timeout"], exit=True)
    try:
        groups.initialize(case.parallel, seed=1)
        rows, spec = load_rows(Path(settings["rows"])), InputSpec(**settings["spec"])
        measure = discriminator_results if case.experts else policy_results
        results = measure(Path(settings["checkpoint"]), rows, spec, case)
        if groups.is_main_rank():
            save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
        groups.shutdown()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
