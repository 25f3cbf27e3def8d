"""Set-up and tear-down common to all stages: process groups, models, logs, checkpoints, export."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from prism_megatron import config as cfg
from prism_megatron.checkpoint.checkpointer import Checkpointer
from prism_megatron.convert.hf_io import HFWeights, save_hf
from prism_megatron.convert.load_checkpoint import check_manifest, load_checkpoint
from prism_megatron.convert.manifest import is_converted
from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
from prism_megatron.convert.rules import Rule
from prism_megatron.convert.transfer import export_manifest, export_weights, load_weights
from prism_megatron.convert.upcycle import UpcycledWeights, upcycled_config
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import check_rlvr
from prism_megatron.data.lazy import SKIPPED, Rows, read_row
from prism_megatron.data.loader import batch_indices, shard_for_rank
from prism_megatron.data.rows import ReadOptions, Trace, no_trace
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from prism_megatron.model.build import build_discriminator, build_policy, wrap_for_training
from prism_megatron.model.fp8 import check_sizes
from prism_megatron.model.sizes import HFSizes, check_num_experts, read_sizes
from prism_megatron.observe.logger import MetricsLog
from prism_megatron.observe.timers import Timers
from prism_megatron.optim.optimizer import build_optimizer
from prism_megatron.optim.schedule import learning_rate
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks, on_main_rank
from prism_megatron.parallel.degrees import check_degrees, check_engine_ranks
from prism_megatron.stages.preemption import Preempted, StopSignals
from prism_megatron.stages.run_folder import CHECKPOINTS, prepare
from prism_megatron.stages.run_lock import RunLock
from prism_megatron.types import Example, PreferencePair

DATA_CACHE = "data_cache"


@dataclass(frozen=True)
class TrainableModel:
    """This rank's model chunks in Megatron's DDP, their optimizer (None if frozen), and what their export needs."""

    name: str
    chunks: list[Any]
    optimizer: Any
    optimizer_config: cfg.OptimizerConfig
    table: list[Rule]
    sizes: HFSizes
    source: Path
    config_changes: dict[str, Any]

    def learning_rate(self, iteration: int, train_iters: int) -> float:
        return learning_rate(self.optimizer_config, iteration, train_iters)

    def export(self, directory: Path) -> None:
        """Write the model as an HF directory. Collective; the main rank writes."""
        shapes, tensors = export_manifest(self.chunks, self.table), export_weights(self.chunks, self.table)
        if groups.is_main_rank():
            save_hf(directory, shapes, tensors, self.source, self.config_changes)
        else:
            for _ in tensors:
                pass
        dist.barrier()


@dataclass(frozen=True)
class Stage:
    """An open stage: its folder, logs, timers and checkpoints.

    ``start`` is the iteration of the checkpoint that it resumes from, or 0. ``identity`` is None but on the main rank.
    """

    config: cfg.StageConfig
    dir: Path
    log: MetricsLog
    timers: Timers
    checkpointer: Checkpointer
    start: int
    identity: dict[str, Any] | None
    stop_signals: StopSignals = field(default_factory=StopSignals)

    def save_if_due(self, iteration: int, models: Mapping[str, TrainableModel], extra_state: Any = None) -> None:
        """Save a checkpoint every ``save_interval`` iterations, after the last one, and when preempted. Collective.

        Periodic saves are written in the background; the last save and that of a preempted stage block until they are
        written. ``extra_state`` is plain data, the same on every rank. Raises Preempted after the save.
        """
        run = self.config.run
        assert isinstance(run, cfg.RunConfig)
        stop = self.stop_signals.requested_on_any_rank()
        if iteration % run.save_interval == 0 or iteration == run.train_iters or stop:
            with self.timers("save"), clear_disk_errors(self.dir):
                self.checkpointer.save(iteration, _states(models), extra_state)
        if iteration == run.train_iters or stop:
            self.checkpointer.close()
        else:
            self.checkpointer.poll()
        if stop:
            raise Preempted(f"{self.config.stage}: preempted, saved iteration {iteration}")

    def resume(self, models: Mapping[str, TrainableModel]) -> Any:
        """Load this stage's last checkpoint into ``models``, if there is one, and return its ``extra_state`` or None.

        From here on TERM and INT make the stage save and stop.
        """
        gc.enable()  # train.py disables it during imports and reading
        self.stop_signals.listen()
        if not self.start:
            return None
        return self.checkpointer.load(self.start, _states(models))


def _states(models: Mapping[str, TrainableModel]) -> dict[str, tuple[list[Any], Any]]:
    return {name: (model.chunks, model.optimizer) for name, model in models.items()}


@contextmanager
def open_stage(config: cfg.StageConfig) -> Iterator[Stage]:
    """Initialize the process groups and open the run folder; shut the groups down at the end.

    ``check_settings`` is called before. Raises UserError for evaluation data that cannot be read.
    """
    directory = cfg.stage_dir(config)
    if isinstance(config, cfg.PolicyTrainingConfig) and config.eval.num_questions:
        # Invalid data would be noticed after training otherwise.
        check_rlvr(config.eval.data, config.eval.num_questions, read_options(config))
    groups.initialize(config.parallel, config.run.seed)
    if isinstance(config.rollout, cfg.EngineRollout):
        engine_size = config.rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size
        check_engine_ranks(gather_over_ranks(groups.data_parallel_rank()), engine_size)
    with clear_disk_errors(directory), _locked(directory):
        for checkpoint in _checkpoints(config):
            check_manifest(checkpoint)
        identity = on_main_rank(lambda: prepare(config))
        run = config.run
        keep, iterations = (run.keep_checkpoints, run.train_iters) if isinstance(run, cfg.RunConfig) else (1, 1)
        checkpointer = Checkpointer(directory / CHECKPOINTS, keep, {"identity": identity})
        start = checkpointer.latest()
        with MetricsLog(directory, config.stage, iterations, start, groups.is_main_rank()) as log:
            yield Stage(config, directory, log, Timers(), checkpointer, start, identity)
    groups.shutdown()


def check_settings(config: cfg.StageConfig) -> None:
    """Check the configuration with the model's sizes and the number of ranks, before any data is read.

    Raises UserError for a model that the recipe is not for, or that the layout or the precision cannot split.
    """
    sizes = read_sizes(Path(config.model.hf_checkpoint))
    check_hidden_size(config, sizes)
    num_moe_experts = None
    if isinstance(config, cfg.WarmupConfig | cfg.AlignConfig):
        num_moe_experts = config.discriminator.num_experts
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_degrees(config.parallel, world_size, sizes.degrees(num_moe_experts))
    check_sizes(config.model, config.parallel, sizes)
    if num_moe_experts is not None:
        check_sizes(config.model, config.parallel, sizes, upcycled=True)


def check_hidden_size(config: cfg.StageConfig, sizes: HFSizes) -> None:
    """Raise UserError for a checkpoint larger than the models that the recipe's hyper-parameters are meant for."""
    model, hidden = config.model, sizes.text["hidden_size"]
    if model.max_hidden_size and hidden > model.max_hidden_size:
        raise UserError(
            f"model.hf_checkpoint {model.hf_checkpoint} has hidden size {hidden}, and this recipe is for toy models "
            f"of at most model.max_hidden_size ({model.max_hidden_size}); use the stage's recipe for its size, "
            f"{config.stage}_..qwen3_vl_SIZE_.. (python -m recipes.launch --help lists them)"
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the run folder on the main rank, before anything is written or removed there. Collective."""
    lock = on_main_rank(lambda: RunLock(directory))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _checkpoints(config: cfg.StageConfig) -> list[Path]:
    """Return the HF directories that the stage starts from; :func:`load_checkpoint` checks converted ones."""
    named = [config.model.hf_checkpoint]
    if isinstance(config, cfg.WarmupConfig | cfg.AlignConfig):
        named.append(config.discriminator.hf_checkpoint)
    return [path for path in map(Path, dict.fromkeys(named)) if not is_converted(path)]


def mark_finished(stage: Stage, summary: dict[str, Any]) -> None:
    """Write ``finished.json`` with configuration, identity and ``summary``; a later start then does nothing."""
    if groups.is_main_rank():
        content = {"config": cfg.to_yaml(stage.config), "identity": stage.identity, **summary}
        write_atomic(stage.dir / cfg.FINISHED, json.dumps(content, indent=2) + "\n")
    dist.barrier()


def load_policy(config: cfg.PolicyTrainingConfig) -> TrainableModel:
    """Load the policy from ``model.hf_checkpoint``, HF's format or converted, and build its optimizer."""
    chunks, table, sizes, source = _policy(config, config.model)
    wrapped, optimizer = _with_optimizer(chunks, config.optimizer)
    return TrainableModel("policy", wrapped, optimizer, config.optimizer, table, sizes, source, {})


def load_reference(config: cfg.PolicyTrainingConfig) -> TrainableModel:
    """Load the policy that this stage started from as a frozen model, without gradients or optimizer."""
    frozen = dataclasses.replace(config.model, freeze=["vision", "merger", "language_model"])
    chunks, table, sizes, source = _policy(config, frozen)
    wrapped = wrap_for_training(chunks, use_distributed_optimizer=False)
    return TrainableModel("reference", wrapped, None, config.optimizer, table, sizes, source, {})


def _policy(config: cfg.StageConfig, model: cfg.ModelConfig) -> tuple[list[nn.Module], list[Rule], HFSizes, Path]:
    """Build the policy's chunks and load their weights; also return conversion table, sizes and path."""
    source = Path(model.hf_checkpoint)
    sizes = read_sizes(source)
    table = policy_table(sizes)
    chunks = list[nn.Module](build_policy(model, config.parallel, sizes))
    load_checkpoint(chunks, table, source, "policy")
    return chunks, table, sizes, source


def load_discriminator(config: cfg.WarmupConfig | cfg.AlignConfig, optimizer: cfg.OptimizerConfig) -> TrainableModel:
    """Load the discriminator: upcycled from a dense checkpoint, or from an upcycled one (spec 3.2, 8.2)."""
    settings = config.discriminator
    source = Path(settings.hf_checkpoint)
    sizes = read_sizes(source)
    check_num_experts(settings, sizes)
    table = discriminator_table(sizes, settings.num_experts, 2 if settings.experts == "dedicated" else 1)
    chunks = build_discriminator(config.model, config.parallel, settings, sizes)
    if sizes.num_experts is None:
        with HFWeights(source) as weights:
            load_weights(chunks, table, UpcycledWeights(weights, sizes, settings, config.run.seed))
    else:
        load_checkpoint(chunks, table, source, "discriminator")
    changes = dict(upcycled_config(sizes, settings.num_experts, settings.topk, settings.load_balance_coeff))
    wrapped, built = _with_optimizer(chunks, optimizer)
    return TrainableModel("discriminator", wrapped, built, optimizer, table, sizes, source, changes)


def _with_optimizer(chunks: Sequence[nn.Module], optimizer: cfg.OptimizerConfig) -> tuple[list[Any], Any]:
    """Wrap model chunks in Megatron's DDP and build their optimizer."""
    wrapped = wrap_for_training(chunks, optimizer.use_distributed_optimizer)
    return wrapped, build_optimizer(optimizer, wrapped)


def load_processor(config: cfg.StageConfig) -> ChatProcessor:
    check_hidden_size(config, read_sizes(Path(config.model.hf_checkpoint)))
    dataset = config.dataset
    return ChatProcessor(Path(config.model.hf_checkpoint), dataset.min_pixels, dataset.max_pixels)


def log_line(line: object) -> None:
    """Print a line on the main rank."""
    if groups.is_main_rank():
        print(line, flush=True)


def read_options(config: cfg.StageConfig) -> ReadOptions:
    """Return the options with which a stage reads its data files."""
    return ReadOptions.from_config(config.dataset, Path(config.dataset.cache or Path(config.run.dir) / DATA_CACHE))


def report_skipped(stage: Stage, rows: Rows[Any]) -> None:
    """List skipped rows in the stage's folder, those skipped so far and later ones."""
    rows.report_skipped(stage.dir / SKIPPED, known=groups.is_main_rank(), new=groups.is_first_of_replica())


def local_batch[R: (Example, PreferencePair)](
    rows: Sequence[R], batch_size: int, iteration: int, seed: int, trace: Trace = no_trace
) -> list[R]:
    """Return this data-parallel rank's rows of an iteration; ``trace`` gets the source of each before it is read."""
    indices = batch_indices(len(rows), batch_size, iteration, seed)
    local = shard_for_rank(indices, groups.data_parallel_rank(), groups.data_parallel_size())
    return [read_row(rows, i, trace) for i in local]


@contextmanager
def clear_disk_errors(directory: Path) -> Iterator[None]:
    """Name the folder in an error about a full disk, and say how to resume."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left for {directory}; free some and run the same command, it resumes from the last checkpoint",
        ) from error
