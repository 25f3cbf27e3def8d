"""Runs several stages one after another in the same ranks: ``stages_worker.py FILE``, a JSON list of command lines.

A process can start and leave only one rollout engine and the process group it shares; here both outlive each stage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from prism_megatron import config as cfg
from prism_megatron.parallel import groups
from prism_megatron.rollout.interface import Engine
from prism_megatron.stages import align, rlvr
from prism_megatron.stages.rollouts import start_engine
from prism_megatron.train import run_stage
from recipes.train import load


def main(runs: str) -> None:
    engines: list[Engine] = []

    def the_engine(config: cfg.StageConfig, checkpoint: Path) -> Engine:
        if not engines:
            engines.append(start_engine(config, checkpoint))
        return engines[0]

    def leave_megatrons_groups() -> None:
        dist.barrier()
        parallel_state.destroy_model_parallel()

    with pytest.MonkeyPatch.context() as patches:
        for stage in (align, rlvr):
            patches.setattr(stage, "start_engine", the_engine)
        patches.setattr(groups, "shutdown", leave_megatrons_groups)
        for recipe, *overrides in json.loads(Path(runs).read_text()):
            run_stage(load(recipe, overrides))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
