"""NeMo-Run factories of all recipes, for NeMo-Run's own command line and for experiments that compose them:

    python -m recipes --factory tiny_sft config.run.train_iters=5 run.executor=local --yes
    PRISM_CLUSTER=slurm/clusters/cpu.yaml python -m recipes --factory tiny_sft run.executor=slurm --yes

The slurm executor reads the cluster file named by ``PRISM_CLUSTER``, since NeMo-Run's command line cannot pass an
argument to an executor factory. Jobs end like those of ``recipes.launch``; only that launcher has pipelines and skips
finished stages. Ranks import this module again, so it only registers factories; the command line is
``recipes/__main__.py``, since NeMo-Run must be able to import what it runs.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fiddle

from prism_megatron.config import apply_overrides, stage_dir
from prism_megatron.errors import UserError
from prism_megatron.train import run_and_exit
from recipes import STAGE_RECIPES, stage_recipe
from recipes.cluster import (
    ClusterConfig,
    local_executor,
    read_cluster,
    setup_lines,
    slurm_executor,
    stop_signal,
)
from recipes.upstream import nemo_run

run = nemo_run()


def task(recipe: str) -> Any:
    """Return a recipe's stage as a ``run.Partial`` whose configuration can be changed."""
    return run.Partial(run_and_exit, config=_as_config(stage_recipe(recipe)()))


def local() -> Any:
    """Return an executor of one process under torchrun; ``run.executor.ntasks_per_node`` changes the number."""
    return local_executor(ranks=1)


def slurm() -> Any:
    """Return an executor on the cluster file's number of nodes; ``run.executor.nodes`` changes it."""
    cluster = _cluster()
    executor = slurm_executor(cluster, cluster.nodes, cluster.ranks_per_node, Path())
    executor.srun_args = [*(executor.srun_args or ()), "bash", "slurm/rank.sh"]  # directly before NeMo-Run's command
    return executor


@dataclass(kw_only=True)
class StageFolder(run.Plugin):  # type: ignore[name-defined, misc]
    """Check the stage's configuration after all overrides, and pass its run folder to a SLURM job."""

    def setup(self, task: Any, executor: Any) -> None:
        config = apply_overrides(fiddle.build(task.config), [])
        if isinstance(executor, run.SlurmExecutor):
            cluster = _cluster()
            executor.setup_lines = setup_lines(cluster, stage_dir(config))
            executor.signal = stop_signal(cluster, config.stage)


def _cluster() -> ClusterConfig:
    if "PRISM_CLUSTER" not in os.environ:
        raise UserError("run.executor=slurm needs PRISM_CLUSTER=FILE; slurm/clusters/ has examples")
    return read_cluster(Path(os.environ["PRISM_CLUSTER"]))


def _as_config(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    return run.Config(type(value), **{f.name: _as_config(getattr(value, f.name)) for f in dataclasses.fields(value)})


for name in STAGE_RECIPES:
    run.cli.factory(target=run_and_exit, name=name)(partial(task, name))
run.cli.factory(target=run.LocalExecutor, name="local")(local)
run.cli.factory(target=run.SlurmExecutor, name="slurm")(slurm)
