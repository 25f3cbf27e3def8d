"""Every recipe as a native NeMo-Run factory, for those who know NeMo-Run's own command line or compose experiments:

    python -m recipes --factory tiny_sft config.run.train_iters=5 run.executor=local --yes
    PRISM_CLUSTER=slurm/clusters/cpu.yaml python -m recipes --factory tiny_sft run.executor=slurm --yes

The slurm executor reads the cluster file that ``PRISM_CLUSTER`` names, since NeMo-Run's command line cannot give a
factory of executors an argument. A job ends as those of ``recipes.launch`` do; pipelines and passing over what is
finished are that launcher's. Ranks import this module again, so all it does is register; the command line is
``recipes/__main__.py``, since NeMo-Run finds again only what it can import.
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
    """The recipe's stage as a ``run.Partial``, its configuration open to change."""
    return run.Partial(run_and_exit, config=_as_config(stage_recipe(recipe)()))


def local() -> Any:
    """One process under torchrun; ``run.executor.ntasks_per_node`` changes that."""
    return local_executor(ranks=1)


def slurm() -> Any:
    """As many nodes as the cluster file says; ``run.executor.nodes`` changes that."""
    cluster = _cluster()
    executor = slurm_executor(cluster, cluster.nodes, cluster.ranks_per_node, Path())
    executor.srun_args = [*(executor.srun_args or ()), "bash", "slurm/rank.sh"]  # the last before NeMo-Run's command
    return executor


@dataclass(kw_only=True)
class StageFolder(run.Plugin):  # type: ignore[name-defined, misc]
    """Checks the stage's configuration once everything is overridden, and tells a SLURM job where the stage writes."""

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
