"""Analytic estimate of a training step's time from sizes and unit costs; ``tools/plan`` ranks layouts by it.

A layer takes its matrix products at ``achieved`` of the peak, its other work at memory bandwidth (each saved element is
moved ``_PASSES`` times), and ``layer_seconds`` regardless of its size: the smaller a rank's shard, the lower its MFU.
Communication does not overlap with computation, as the trainer is configured. Ranks are ordered like Megatron's: tensor
parallelism innermost, then context, data and pipeline; a group that spans nodes has network bandwidth. All rows have
equal length, all experts equal load.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config import TrainingConfig
from prism_megatron.convert.qwen3_vl import policy_table
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import TrainingFlops, Workload, training_flops
from recipes.estimate.activations import layer_elements, vision_layer_elements
from recipes.estimate.memory import Memory, decoder_layers

COSTS = Path(__file__).parent / "costs"
_PASSES = 4  # written and read forward, read and written again (as a gradient) backward


@dataclass(frozen=True)
class Costs:
    """Unit costs of one rank and its links; ``recipes/estimate/costs/*.json`` states the source of each number."""

    peak_flops: float  # FLOP/s
    achieved: float  # fraction of it that large matrix products reach
    layer_seconds: float  # forward and backward
    memory_bytes_per_second: float
    memory_bytes: float
    host_seconds_per_token: float
    ranks_per_node: int
    intra_latency: float  # seconds
    intra_bytes_per_second: float  # that a rank sends
    inter_latency: float
    inter_bytes_per_second: float
    sync_bytes_per_second: float  # of gathered weights into the rollout engine


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause. ``bubble`` includes uneven stages; ``weight_sync`` is not part of the step."""

    compute: float
    bubble: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    gradients: float
    optimizer: float
    host: float
    weight_sync: float

    @property
    def communication(self) -> float:
        return self.tensor + self.context + self.expert + self.pipeline + self.gradients

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.communication + self.optimizer + self.host


@dataclass(frozen=True)
class Rows:
    """Global batch: the number of rows and their total work."""

    count: int
    work: Workload

    @property
    def tokens(self) -> int:
        return sum(self.work.sequence_lengths)

    @property
    def patches(self) -> int:
        return sum(self.work.frame_patches)


def read_costs(path: Path) -> Costs:
    """Read unit costs. Raises UserError if the file is missing or lacks a cost or its source."""
    try:
        found = json.loads(path.read_text())
        return Costs(**{f.name: found[f.name]["value"] for f in dataclasses.fields(Costs) if found[f.name]["source"]})
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        names = ", ".join(f.name for f in dataclasses.fields(Costs))
        raise UserError(f"{path} must give value and source of each of {names} ({error!r})") from error


def predict(
    config: TrainingConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs, memory: Memory
) -> StepTime:
    """Predict the time of a training step.

    Args:
        config: the stage; its layout, precision, micro-batch size and optimizer.
        sizes: the model's.
        rows: the global batch.
        world_size: number of ranks.
        costs: unit costs of the cluster.
        memory: the estimate of the most loaded rank, for gradients and optimizer state.
    """
    return _Step(config, sizes, rows, world_size, costs, memory).time()


class _Step:
    """Step of one layout: degrees, micro-batches and links under short names."""

    def __init__(
        self, config: TrainingConfig, sizes: HFSizes, rows: Rows, world_size: int, costs: Costs, memory: Memory
    ) -> None:
        parallel = config.parallel
        self.config, self.sizes, self.rows, self.costs, self.memory = config, sizes, rows, costs, memory
        self.tp, self.pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        self.cp, self.ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
        self.dp = world_size // (self.tp * self.pp * self.cp)
        self.world_size = world_size
        self.shards = self.tp if parallel.sequence_parallel else 1
        self.width = 4 if config.model.precision == "fp32" else 2
        rows_here = math.ceil(rows.count / self.dp)
        fit = max(int(config.max_tokens_per_microbatch // (rows.tokens / rows.count)), 1)
        self.microbatches = math.ceil(rows_here / fit)
        if (virtual := parallel.virtual_pipeline_model_parallel_size) > 1:
            self.microbatches += -self.microbatches % self.pp
        self.virtual = virtual
        self.tokens = rows.tokens / self.dp / self.microbatches / self.cp  # per rank and micro-batch
        self.patches = rows.patches / self.dp / self.microbatches
        self.layers = decoder_layers(sizes, parallel)

    def time(self) -> StepTime:
        stages = self._stage_seconds()
        busy = self.microbatches * sum(stages) / self.pp
        elapsed = self.microbatches * max(stages) + (sum(stages) - max(stages)) / self.virtual
        return StepTime(
            compute=busy,
            bubble=elapsed - busy,
            tensor=self._tensor(),
            context=self._context(),
            expert=self._expert(),
            pipeline=self._pipeline(),
            gradients=self._gradients(),
            optimizer=self._optimizer_bytes() / self.costs.memory_bytes_per_second,
            host=self.costs.host_seconds_per_token * self.rows.tokens / self.dp,
            weight_sync=self._weight_sync(),
        )

    def _stage_seconds(self) -> list[float]:
        """Return the seconds of one micro-batch, forward and backward, on each pipeline stage."""
        parts = _hardware_flops(self.config, self.sizes, self.rows.work)
        rate = self.costs.peak_flops * self.costs.achieved * self.dp * self.microbatches * self.tp
        language, head, vision = (parts[name] / rate for name in ("language", "head", "vision"))
        again = 1 + self.config.model.recompute / 3  # a second forward pass
        traffic = _PASSES * self.width / self.costs.memory_bytes_per_second
        layer = traffic * self.tokens * layer_elements(self.sizes, self.config.parallel, 1.0) * again
        layer += language / self.cp / sum(self.layers) + self.costs.layer_seconds * again
        seconds = [count * layer for count in self.layers]
        depth, frozen = self.sizes.vision["depth"], "vision" in self.config.model.freeze
        tower = traffic * self.patches * vision_layer_elements(self.sizes, self.tp) + self.costs.layer_seconds
        seconds[0] += vision + depth * tower * (1 / 3 if frozen else 1)
        seconds[-1] += head / self.cp
        return seconds

    def _tensor(self) -> float:
        """Return the seconds of four all-reduces per layer, six if it is recomputed, on the most loaded stage."""
        if self.tp == 1:
            return 0.0
        hidden, tower = self.sizes.text["hidden_size"], self.sizes.vision["hidden_size"]
        per_layer = (4 + 2 * self.config.model.recompute) * self._reduced(self.width * self.tokens * hidden, self.tp)
        times = 2 if "vision" in self.config.model.freeze else 4
        vision = times * self.sizes.vision["depth"] * self._reduced(self.width * self.patches * tower, self.tp)
        stages = [count * per_layer + (vision if stage == 0 else 0.0) for stage, count in enumerate(self.layers)]
        return self.microbatches * max(stages)

    def _context(self) -> float:
        """Return the seconds to gather keys and values forward and reduce-scatter their gradients backward."""
        text = self.sizes.text
        bytes_ = self.width * 2 * self.tokens * self.cp * text["num_key_value_heads"] * text["head_dim"] / self.tp
        times = 2 + self.config.model.recompute
        once = self._moved(bytes_ * (self.cp - 1) / self.cp, self.tp * self.cp)
        return self.microbatches * max(self.layers) * times * once if self.cp > 1 else 0.0

    def _expert(self) -> float:
        """Return the seconds of dispatch and combine, forward and backward, and of gathers within shared experts."""
        etp = self.config.parallel.expert_tensor_parallel_size
        if self.ep * etp == 1:
            return 0.0
        text = self.sizes.text
        routed = self.tokens / self.shards * text["num_experts_per_tok"] * text["hidden_size"] * self.width
        once = self._moved(routed * (self.ep - 1) / self.ep, self.ep * etp) if self.ep > 1 else 0.0
        once += self._moved(routed * (etp - 1), etp) if etp > 1 else 0.0
        return self.microbatches * max(self.layers) * (4 + 2 * self.config.model.recompute) * once

    def _pipeline(self) -> float:
        """Return the seconds to send hidden states and DeepStack features on, and gradients back."""
        if self.pp == 1:
            return 0.0
        levels = 1 + len(self.sizes.vision["deepstack_visual_indexes"])
        bytes_ = self.width * self.tokens / self.shards * levels * self.sizes.text["hidden_size"]
        return 2 * self.virtual * self.microbatches * self._moved(bytes_, self.world_size)

    def _gradients(self) -> float:
        """Return the seconds of the float32 all-reduce, or of reduce-scatter and weight gather if it is distributed."""
        replicas, span = self.dp * self.cp, self.tp * self.cp * self.dp
        seconds = 0.0
        if replicas > 1:
            seconds = self._reduced(self.memory.gradients, replicas, span)
            if self.config.optimizer.use_distributed_optimizer:
                gathered = self.memory.gradients / 4 * self.width
                seconds = seconds / 2 + self._moved(gathered * (replicas - 1) / replicas, span)
        if self.pp > 1 and self.sizes.tie_embeddings:
            text = self.sizes.text
            seconds += self._reduced(4 * text["vocab_size"] / self.tp * text["hidden_size"], 2, self.world_size)
        return seconds

    def _optimizer_bytes(self) -> float:
        """Return the bytes moved by clipping and AdamW: gradients three times, state and weights read and written."""
        state = self.memory.optimizer
        shard = 1 / (self.dp * self.cp) if self.config.optimizer.use_distributed_optimizer else 1.0
        return 2 * state + (3 * self.memory.gradients + 2 * self.memory.gradients / 4 * self.width) * shard

    def _weight_sync(self) -> float:
        """Return the seconds until every rank has gathered every tensor and its engine has loaded its shard."""
        size = self.width * sum(rule.numel for rule in policy_table(self.sizes) if not rule.tied)
        gathered = self._moved(size * (self.tp - 1) / self.tp, self.tp) if self.tp > 1 else 0.0
        passed = self._moved(size * (self.pp - 1) / self.pp, self.world_size) if self.pp > 1 else 0.0
        return gathered + passed + size / self.costs.sync_bytes_per_second

    def _reduced(self, bytes_: float, ranks: int, span: int | None = None) -> float:
        """Return the seconds of a ring all-reduce over ``ranks`` within ``span`` neighbouring ranks."""
        return self._moved(2 * bytes_ * (ranks - 1) / ranks, span or ranks)

    def _moved(self, bytes_: float, span: int) -> float:
        costs = self.costs
        if span <= costs.ranks_per_node:
            return costs.intra_latency + bytes_ / costs.intra_bytes_per_second
        return costs.inter_latency + bytes_ / costs.inter_bytes_per_second


def _hardware_flops(config: TrainingConfig, sizes: HFSizes, work: Workload) -> dict[str, float]:
    """Return the operations of the batch, recomputed ones included: decoder, output layer, vision with mergers."""

    def of(recompute: bool) -> TrainingFlops:
        return training_flops(sizes.text, sizes.vision, work, config.model.freeze, recompute)

    plain, actual = of(False), of(config.model.recompute)
    parts = actual.parts
    return {
        "language": parts["language"] + parts["attention"] + actual.recomputed - plain.recomputed,
        "head": parts["head"] + plain.recomputed,
        "vision": parts["vision"] + parts["vision_attention"] + parts["merger"],
    }
