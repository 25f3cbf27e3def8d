"""What every stage does before its loop and after it: groups, models, logs, checkpoints, export."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from prism_megatron import config as cfg
from prism_megatron.checkpoint.checkpointer import Checkpointer
from prism_megatron.convert.hf_io import HFWeights, save_hf
from prism_megatron.convert.manifest import is_converted
from prism_megatron.convert.native import check_manifest, load_checkpoint
from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
from prism_megatron.convert.rules import Rule
from prism_megatron.convert.transfer import export_weights, load_weights
from prism_megatron.convert.upcycle import UpcycledWeights, upcycled_config
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import check_rlvr
from prism_megatron.data.loader import batch_indices, shard_for_rank
from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic
from prism_megatron.model.build import build_discriminator, build_policy, wrap_for_training
from prism_megatron.model.fp8 import check_sizes
from prism_megatron.model.sizes import HFSizes, check_discriminator, read_sizes
from prism_megatron.observe.logger import MetricsLog
from prism_megatron.observe.timers import Timers
from prism_megatron.optim.optimizer import build_optimizer
from prism_megatron.optim.schedule import learning_rate
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks, on_main_rank
from prism_megatron.parallel.degrees import check_degrees, check_engine_ranks
from prism_megatron.stages import preemption
from prism_megatron.stages.run_folder import CHECKPOINTS, prepare
from prism_megatron.stages.run_lock import RunLock


@dataclass(frozen=True)
class TrainableModel:
    """A model in training: this rank's chunks in Megatron's DDP, their optimizer, what is needed to export them."""

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
        """Write an HF directory. Collective; the main rank writes."""
        tensors = export_weights(self.chunks, self.table)
        if groups.is_main_rank():
            save_hf(directory, tensors, self.source, self.config_changes)
        else:
            for _ in tensors:
                pass
        dist.barrier()


@dataclass(frozen=True)
class Stage:
    """An open stage: where it writes and how it counts. The main rank has its ``identity``."""

    config: cfg.StageConfig
    dir: Path
    log: MetricsLog
    timers: Timers
    checkpointer: Checkpointer
    start: int
    identity: dict[str, Any] | None

    def save_if_due(self, iteration: int, parts: Mapping[str, TrainableModel], carried: Any = None) -> None:
        """Save every ``save_interval`` iterations and, to the end, after the last one or when told to stop.

        ``carried`` is plain data that goes on to later iterations, the same on every rank. Collective. Raises Preempted
        after saving because it was told to stop.
        """
        run = self.config.run
        stop = preemption.is_asked()
        if iteration % run.save_interval == 0 or iteration == run.train_iters or stop:
            with self.timers("save"), clear_disk_errors(self.dir):
                self.checkpointer.save(iteration, {n: (p.chunks, p.optimizer) for n, p in parts.items()}, carried)
        if iteration == run.train_iters or stop:
            self.checkpointer.close()
        else:
            self.checkpointer.poll()
        if stop:
            raise preemption.Preempted(f"{self.config.stage}: told to stop, saved iteration {iteration}")

    def resume(self, parts: Mapping[str, TrainableModel]) -> Any:
        """Load the last checkpoint of this stage into ``parts``, if there is one. From here on TERM makes it save.

        Returns what was ``carried`` when it was saved, or None.
        """
        gc.enable()  # train.py stops it while there is nothing to collect
        preemption.listen()
        if not self.start:
            return None
        return self.checkpointer.load(self.start, {n: (p.chunks, p.optimizer) for n, p in parts.items()})


@contextmanager
def open_stage(config: cfg.StageConfig, num_moe_experts: int | None = None) -> Iterator[Stage]:
    """Check, start the process groups, open logs. Leaves the groups when the loop is done."""
    directory = cfg.stage_dir(config)
    sizes = read_sizes(Path(config.model.hf_checkpoint))
    check_hidden_size(config, sizes)
    if config.eval.num_questions:
        check_rlvr(config.eval.data, config.eval.num_questions)  # or training would be over before it is missed
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_degrees(config.parallel, world_size, sizes.degrees(num_moe_experts))
    check_sizes(config.model, config.parallel, sizes)
    if num_moe_experts is not None:
        check_sizes(config.model, config.parallel, sizes, upcycled=True)
    groups.initialize(config.parallel, config.run.seed)
    check_engine_ranks(
        gather_over_ranks(groups.data_parallel_rank()),
        config.rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size,
    )
    with clear_disk_errors(directory), _locked(directory):
        for checkpoint in _checkpoints(config):
            check_manifest(checkpoint)
        identity = on_main_rank(lambda: prepare(config))
        checkpointer = Checkpointer(directory / CHECKPOINTS, config.run.keep_checkpoints, {"identity": identity})
        start = checkpointer.latest()
        with MetricsLog(directory, config.stage, config.run.train_iters, start, groups.is_main_rank()) as log:
            yield Stage(config, directory, log, Timers(), checkpointer, start, identity)
    groups.shutdown()


def check_hidden_size(config: cfg.StageConfig, sizes: HFSizes) -> None:
    """Refuse a checkpoint that is too large for the recipe's lengths and learning rates to make sense."""
    model, hidden = config.model, sizes.text["hidden_size"]
    if model.max_hidden_size and hidden > model.max_hidden_size:
        raise UserError(
            f"model.hf_checkpoint {model.hf_checkpoint} has hidden size {hidden}, and this recipe is for toy models "
            f"of at most model.max_hidden_size ({model.max_hidden_size}); use the stage's recipe for its size, "
            f"{config.stage}_..qwen3_vl_SIZE_.. (python -m recipes.launch --help lists them)"
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The main rank has the run folder, before anything is written or removed there. Collective."""
    lock = on_main_rank(lambda: RunLock(directory))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _checkpoints(config: cfg.StageConfig) -> list[Path]:
    """HF directories that the stage starts from; load_checkpoint() checks converted ones."""
    named = [config.model.hf_checkpoint]
    if isinstance(config, cfg.WarmupConfig | cfg.AlignConfig):
        named.append(config.discriminator.hf_checkpoint)
    return [path for path in map(Path, dict.fromkeys(named)) if not is_converted(path)]


def mark_finished(stage: Stage, summary: dict[str, Any]) -> None:
    """Mark the stage as finished, so that the same command does nothing the next time."""
    if groups.is_main_rank():
        said = {"config": cfg.to_yaml(stage.config), "identity": stage.identity, **summary}
        write_atomic(stage.dir / cfg.FINISHED, json.dumps(said, indent=2) + "\n")
    dist.barrier()


def load_policy(config: cfg.StageConfig) -> TrainableModel:
    """The policy with the weights of ``model.hf_checkpoint``, its optimizer beside it."""
    chunks, table, sizes, source = _policy_parts(config, config.model)
    return _trained("policy", chunks, config.optimizer, table, sizes, source, {})


def load_reference(config: cfg.StageConfig) -> TrainableModel:
    """The policy as this stage found it, with neither gradients nor an optimizer."""
    frozen = dataclasses.replace(config.model, freeze=["vision", "merger", "language_model"])
    chunks, table, sizes, source = _policy_parts(config, frozen)
    wrapped = wrap_for_training(chunks, use_distributed_optimizer=False)
    return TrainableModel("reference", wrapped, None, config.optimizer, table, sizes, source, {})


def _policy_parts(config: cfg.StageConfig, model: cfg.ModelConfig) -> tuple[list[nn.Module], list[Rule], HFSizes, Path]:
    """Model chunks with the weights of a checkpoint, HF's or converted; its table, its sizes and where it is."""
    source = Path(model.hf_checkpoint)
    sizes = read_sizes(source)
    table = policy_table(sizes)
    chunks = list[nn.Module](build_policy(model, config.parallel, sizes))
    load_checkpoint(chunks, table, source, "policy")
    return chunks, table, sizes, source


def load_discriminator(config: cfg.WarmupConfig | cfg.AlignConfig, optimizer: cfg.OptimizerConfig) -> TrainableModel:
    """The discriminator: upcycled from a dense checkpoint, or read back from an upcycled one (spec 3.2, 8.2)."""
    wanted = config.discriminator
    source = Path(wanted.hf_checkpoint)
    sizes = read_sizes(source)
    check_discriminator(wanted, sizes)
    table = discriminator_table(sizes, wanted.num_experts, 2 if wanted.experts == "dedicated" else 1)
    chunks = build_discriminator(config.model, config.parallel, wanted, sizes)
    if sizes.num_experts is None:
        with HFWeights(source) as weights:
            load_weights(chunks, table, UpcycledWeights(weights, sizes, wanted, config.run.seed))
    else:
        load_checkpoint(chunks, table, source, "discriminator")
    changes = dict(upcycled_config(sizes, wanted.num_experts, wanted.topk, wanted.load_balance_coeff))
    return _trained("discriminator", chunks, optimizer, table, sizes, source, changes)


def load_processor(config: cfg.StageConfig) -> ChatProcessor:
    return ChatProcessor(Path(config.model.hf_checkpoint))


def log_line(what: object) -> None:
    """Print a line, once for all ranks."""
    if groups.is_main_rank():
        print(what, flush=True)


def local_batch[Row](rows: Sequence[Row], batch_size: int, iteration: int, seed: int) -> list[Row]:
    """This data-parallel rank's rows of an iteration."""
    indices = batch_indices(len(rows), batch_size, iteration, seed)
    return [rows[i] for i in shard_for_rank(indices, groups.data_parallel_rank(), groups.data_parallel_size())]


@contextmanager
def clear_disk_errors(directory: Path) -> Iterator[None]:
    """Say which folder is on the full disk, and that what was written before is intact."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, f"no space left for {directory}; free some and run the same command, it goes on from there"
        ) from error


def _trained(
    name: str,
    chunks: Sequence[nn.Module],
    optimizer: cfg.OptimizerConfig,
    table: list[Rule],
    sizes: HFSizes,
    source: Path,
    changes: dict[str, Any],
) -> TrainableModel:
    wrapped = wrap_for_training(chunks, optimizer.use_distributed_optimizer)
    return TrainableModel(name, wrapped, build_optimizer(optimizer, wrapped), optimizer, table, sizes, source, changes)
