"""Analytic estimate of peak GPU memory per stage: ``python -m recipes.launch RECIPE --estimate``.

Parameters are counted exactly, from the conversion table. ``tools/bench/memory.py`` compares the estimate with ranks on
a CPU; it was never measured on a GPU. Assumptions:

- Weights are bfloat16, gradients are summed in float32, and AdamW's three float32 copies are sharded over data-parallel
  ranks (float32 weights need no master copy). A frozen parameter, and the reference policy if ``kl_coeff`` > 0, has
  weights only.
- A micro-batch is full, half of it image tokens with four patches each. One-forward-one-backward keeps as many
  micro-batches as there are pipeline stages. Attention is flash attention. The most loaded rank's experts get 1.5
  times their even share (``recipes/estimate/activations.py``).
- FP8 adds two copies of the decoder's linear weights, one byte each: rounded, and transposed. Activations are counted
  as in BF16.
- With ``model.recompute`` one layer is recomputed at a time; the vision tower is not.
- The rollout engine has ``rollout.gpu_memory_utilization`` of the GPU: always, or with ``rollout.sleep_level`` while it
  is awake, and ``_ASLEEP`` otherwise. A weight sync needs the engine awake, and no activations exist at that time.
- ``_RESERVED`` covers the CUDA context, NCCL buffers and fragmentation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config import (
    AlignConfig,
    EngineRollout,
    OptimizerConfig,
    ParallelConfig,
    PolicyGradientConfig,
    RolloutConfig,
    SFTConfig,
    StageConfig,
    TrainingConfig,
    WarmupConfig,
)
from prism_megatron.convert.export_plan import export_bytes
from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
from prism_megatron.convert.rules import Rule
from prism_megatron.errors import UserError
from prism_megatron.model.fp8 import check_sizes
from prism_megatron.model.sizes import HFSizes, read_sizes
from prism_megatron.parallel.degrees import check_degrees
from recipes.estimate.activations import Load, activation_bytes, full_load

GPU_BYTES = 80e9
_RESERVED = 4e9
_ENGINE_OVERHEAD = 3e9  # activations of vLLM
_ASLEEP = 2e9  # memory that a sleeping vLLM keeps
_ENGINE_SEQUENCES = 4  # of full length, that the key-value cache must hold at least
_FP8_COPIES = 2  # bytes
_ALL = ("vision", "merger", "language_model")
_LINEAR = re.compile(r"decoder\..*linear_(?:qkv|proj|fc1|fc2)\.weight")
_PART = re.compile(r"(?:decoder|vision)\.layers\.(\d+)\.")
_LABELS = {
    "optimizer": "optimizer state",
    "weight_sync": "weight sync, no activations",
    "engine": "rollout engine",
    "engine_asleep": "rollout engine in training",
}
PUBLISHED = Path(__file__).parents[1] / "published"


@dataclass(frozen=True)
class Memory:
    """Bytes on the most loaded rank.

    ``activations`` include logits. ``weight_sync`` is needed while weights are sent to the engine; the two never exist
    at the same time. ``engine`` is the awake engine's share, ``engine_asleep`` its share during training.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    weight_sync: float = 0.0
    engine: float = 0.0
    engine_asleep: float = 0.0

    @property
    def total(self) -> float:
        permanent = self.weights + self.gradients + self.optimizer + _RESERVED
        return permanent + max(self.activations + self.engine_asleep, self.weight_sync + self.engine)

    def check(self) -> None:
        """Raise UserError if trainer and engine together do not fit a GPU."""
        if self.total > GPU_BYTES:
            raise UserError(
                f"the most loaded GPU needs {self.total / 1e9:.0f} GB of {GPU_BYTES / 1e9:.0f}:\n{self.table()}\n"
                "lower rollout.gpu_memory_utilization or max_tokens_per_microbatch, raise a parallel degree, or set "
                "rollout.sleep_level=1"
            )

    def table(self) -> str:
        rows = {_LABELS.get(f.name, f.name): getattr(self, f.name) for f in dataclasses.fields(self)}
        rows |= {"reserved": _RESERVED, "total": self.total, "GPU memory": GPU_BYTES}
        return "\n".join(f"{name:28s} {value / 1e9:6.1f} GB" for name, value in rows.items())


def estimate(
    config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes, load: Load | None = None
) -> Memory:
    """Estimate the most loaded pipeline stage, with a full micro-batch if ``load`` is None.

    Raises UserError for invalid degrees, or an engine that does not fit in its share.
    """
    stages = stage_estimates(config, world_size, policy, dense_discriminator, load)
    return max(stages, key=lambda memory: memory.total)


def stage_estimates(
    config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes, load: Load | None = None
) -> list[Memory]:
    """Estimate each pipeline stage; arguments as of ``estimate``."""
    parallel = config.parallel
    check_layout(config, world_size, policy, dense_discriminator)
    table = policy_table(policy)
    engine = _engine_bytes(config, policy, table)
    sleeps = isinstance(config.rollout, RolloutConfig) and config.rollout.sleep_level > 0
    engine_asleep = min(_ASLEEP, engine) if sleeps else engine
    if not isinstance(config, TrainingConfig):
        return [Memory(engine=engine, engine_asleep=engine)]
    parts: list[_Part] = []
    if not isinstance(config, WarmupConfig):
        parts.append(_Part(table, policy, config.model.freeze, config.optimizer))
    if isinstance(config, PolicyGradientConfig) and config.kl_coeff:
        parts.append(_Part(table, policy, _ALL, config.optimizer))  # the reference policy
    if isinstance(config, WarmupConfig | AlignConfig):
        settings = config.discriminator
        heads = 2 if settings.experts == "dedicated" else 1
        scorer = discriminator_table(dense_discriminator, settings.num_experts, heads)
        upcycled = _upcycled(dense_discriminator, settings.num_experts, settings.topk)
        optimizer = config.optimizer if isinstance(config, WarmupConfig) else config.discriminator_optimizer
        parts.append(_Part(scorer, upcycled, settings.freeze, optimizer))
    stages = []
    for stage in range(parallel.pipeline_model_parallel_size):
        resident = [_resident(part, config, stage, world_size) for part in parts]
        activations = max(_activations(part, config, stage, load) for part in parts)
        weight_sync = _weight_sync(table, config) if isinstance(config, PolicyGradientConfig) else 0.0
        weights, gradients, optimizer = (sum(column) for column in zip(*resident, strict=True))
        stages.append(Memory(weights, gradients, optimizer, activations, weight_sync, engine, engine_asleep))
    return stages


def check_layout(config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes) -> None:
    """Raise UserError for degrees that do not divide the stage's models, or more data-parallel ranks than rows."""
    parallel, experts = config.parallel, policy.num_experts
    if isinstance(config, WarmupConfig | AlignConfig):
        check_degrees(parallel, world_size, dense_discriminator.degrees(config.discriminator.num_experts))
        check_sizes(config.model, parallel, dense_discriminator, upcycled=True)
        experts = experts or config.discriminator.num_experts  # a dense policy has no experts to shard
    if not isinstance(config, WarmupConfig):
        check_degrees(parallel, world_size, policy.degrees(experts))
        check_sizes(config.model, parallel, policy)
    replicas = world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    for name in ("global_batch_size", "prompts_per_iteration"):
        rows = getattr(config, name, replicas)
        if rows % replicas:
            raise UserError(
                f"{name} ({rows}) must be divisible by the data-parallel size ({replicas}), or ranks have nothing to "
                "do; raise it, or a parallel degree, or take fewer nodes"
            )
    engine = _engine_ranks(config)
    same_rows = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if same_rows % engine:
        raise UserError(
            f"rollout.tensor_model_parallel_size ({engine}) must divide tensor times context parallel size "
            f"({same_rows}), since all ranks of an engine must hold the same prompts"
        )


def published_sizes(size: str, folder: Path) -> HFSizes:
    """Return the sizes of a released model; its config.json is written to ``folder``."""
    (folder / "config.json").write_text((PUBLISHED / f"{size}.json").read_text())
    return read_sizes(folder)


@dataclass(frozen=True)
class _Part:
    """Model that a stage holds: its parameters, sizes, frozen parts and optimizer."""

    table: list[Rule]
    sizes: HFSizes
    freeze: Sequence[str]
    optimizer: OptimizerConfig


def _resident(part: _Part, config: StageConfig, stage: int, world_size: int) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and optimizer state on a rank of this pipeline stage."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    replicas = {False: world_size // (tp * pp), True: world_size // (experts * pp)}
    layers = decoder_layers(part.sizes, parallel)
    stage_of_layer = [number for number, count in enumerate(layers) for _ in range(count)]
    weights = gradients = optimizer = 0.0
    of_weight, of_state = (4, 8) if config.model.precision == "fp32" else (2, 12)
    for rule in part.table:
        if stage not in _stages_of(rule, stage_of_layer):
            continue
        is_expert = rule.expert is not None
        count = rule.numel / (experts if is_expert else tp if rule.layout.axis is not None else 1)
        weights += of_weight * count
        if config.model.precision == "fp8" and _LINEAR.fullmatch(rule.megatron):
            weights += _FP8_COPIES * count
        if _is_frozen(rule, part.freeze):
            continue
        gradients += 4 * count
        optimizer += of_state * count / (replicas[is_expert] if part.optimizer.use_distributed_optimizer else 1)
    return weights, gradients, optimizer


def _stages_of(rule: Rule, stage_of_layer: Sequence[int]) -> set[int]:
    last = stage_of_layer[-1]
    if rule.megatron.startswith(("vision.", "embedding.")):
        return {0}
    found = _PART.match(rule.megatron)
    if found is None:
        # The output layer; a tied one is the embedding itself if there is only one stage.
        return {last} if last or not rule.tied else set()
    return {stage_of_layer[int(found[1])]}


def decoder_layers(sizes: HFSizes, parallel: ParallelConfig) -> list[int]:
    """Return the number of decoder layers of each pipeline stage."""
    stages, layers = parallel.pipeline_model_parallel_size, sizes.text["num_hidden_layers"]
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    middle = stages - bool(first) - bool(last)
    even = (layers - first - last) // middle if middle else 0
    return [first or even, *[even] * (stages - 2), last or even][:stages] if stages > 1 else [layers]


def _is_frozen(rule: Rule, freeze: Sequence[str]) -> bool:
    if not rule.megatron.startswith("vision."):
        return "language_model" in freeze
    return ("merger" if "merger" in rule.megatron else "vision") in freeze


def _activations(part: _Part, config: TrainingConfig, stage: int, load: Load | None) -> float:
    layers = decoder_layers(part.sizes, config.parallel)[stage]
    return activation_bytes(config, part.sizes, part.freeze, stage, layers, load or full_load(config, part.sizes))


def _weight_sync(table: Sequence[Rule], config: PolicyGradientConfig) -> float:
    """Return the bytes of an export, and of vLLM's shard of the largest module until it is loaded."""
    itemsize = 4 if config.model.precision == "fp32" else 2
    exported, module = export_bytes(table, itemsize, config.rollout.sync_bucket_mib << 20)
    return exported + module / _engine_ranks(config)


def _engine_ranks(config: StageConfig) -> int:
    engine = config.rollout.tensor_model_parallel_size if isinstance(config.rollout, EngineRollout) else None
    return engine or config.parallel.tensor_model_parallel_size


def _engine_bytes(config: StageConfig, policy: HFSizes, table: Sequence[Rule]) -> float:
    """Return the rollout engine's share, which must hold its weights and a few responses of full length."""
    rollout, text = config.rollout, policy.text
    if not isinstance(rollout, EngineRollout) or (isinstance(config, SFTConfig) and not config.eval.num_questions):
        return 0.0
    ranks = _engine_ranks(config)
    groups = max(text["num_key_value_heads"] // ranks, 1)
    cache = 2 * 2 * text["num_hidden_layers"] * groups * text["head_dim"] * rollout.max_model_len
    weights = 2 * sum(rule.numel for rule in table if not rule.tied) / ranks
    needed = weights + _ENGINE_SEQUENCES * cache + _ENGINE_OVERHEAD
    share = rollout.gpu_memory_utilization * GPU_BYTES
    if needed > share:
        raise UserError(
            f"rollout.gpu_memory_utilization ({rollout.gpu_memory_utilization:g}) gives the engine "
            f"{share / 1e9:.0f} GB, its weights and {_ENGINE_SEQUENCES} responses take {needed / 1e9:.0f} GB; raise "
            "it, or rollout.tensor_model_parallel_size"
        )
    return share


def _upcycled(dense: HFSizes, num_experts: int, topk: int) -> HFSizes:
    text = dense.text | {
        "num_experts": num_experts,
        "num_experts_per_tok": topk,
        "moe_intermediate_size": dense.text["intermediate_size"],
    }
    return HFSizes(text, dense.vision, dense.tie_embeddings)
