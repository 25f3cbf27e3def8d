"""What a stage needs of a GPU's memory, by arithmetic: ``python -m recipes.launch RECIPE --estimate``.

Parameters are counted from the conversion table, so they are exact. Measured on CPU ranks by ``tools/bench/memory.py``,
never on a GPU. Assumed:

- bfloat16 weights, gradients summed in float32, AdamW's three float32 copies cut over data-parallel ranks (float32
  weights need no copy of their own); of a frozen parameter the weight only, as of the policy before training, which is
  kept where ``kl_coeff`` is not 0;
- a full micro-batch, half of it image tokens, each of four patches; one-forward-one-backward keeps as many
  micro-batches as there are pipeline stages; flash attention; experts take 1.5 times their even share
  (``recipes/estimate/activations.py``);
- with FP8, a second and a third copy of the decoder's linear weights, one byte each: rounded, and that transposed;
  activations are counted as in BF16;
- layers are recomputed one at a time where ``model.recompute`` says so, the vision tower never;
- the rollout engine has ``rollout.gpu_memory_utilization`` of the GPU, for good, or with ``rollout.sleep_level`` while
  it is awake, and ``_ASLEEP`` else; weights are pushed when no activations are held, to an engine that is awake;
- ``_RESERVED`` for the CUDA context, NCCL's buffers and what the allocator cannot use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config import (
    AlignConfig,
    CollectConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyGradientConfig,
    StageConfig,
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
_ENGINE_OVERHEAD = 3e9  # vLLM's activations
_ASLEEP = 2e9  # what vLLM holds outside the memory that it can give back
_ENGINE_SEQUENCES = 4  # of full length, that the key-value cache should hold at least
_FP8_COPIES = 2  # bytes
_ALL = ("vision", "merger", "language_model")
_LINEAR = re.compile(r"decoder\..*linear_(?:qkv|proj|fc1|fc2)\.weight")
_PART = re.compile(r"(?:decoder|vision)\.layers\.(\d+)\.")
PUBLISHED = Path(__file__).parents[1] / "published"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    ``activations`` are with logits, ``push`` is held while weights go to the engine; never both. ``engine`` is its
    share while awake, ``asleep`` what it keeps while activations are held, all of it if it does not sleep.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    push: float = 0.0
    engine: float = 0.0
    asleep: float = 0.0

    @property
    def total(self) -> float:
        for_good = self.weights + self.gradients + self.optimizer + _RESERVED
        return for_good + max(self.activations + self.asleep, self.push + self.engine)

    def check(self) -> None:
        """Raises UserError where trainer and engine do not fit a GPU together."""
        if self.total > GPU_BYTES:
            raise UserError(
                f"the fullest GPU needs {self.total / 1e9:.0f} GB of {GPU_BYTES / 1e9:.0f}:\n{self.table()}\n"
                "lower rollout.gpu_memory_utilization or max_tokens_per_microbatch, raise a parallel degree, or set "
                "rollout.sleep_level=1"
            )

    def table(self) -> str:
        rows = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        rows += [("reserved", _RESERVED), ("total", self.total), ("of", GPU_BYTES)]
        return "\n".join(f"{name:11s} {value / 1e9:6.1f} GB" for name, value in rows)


def estimate(
    config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes, load: Load | None = None
) -> Memory:
    """Of the fullest pipeline stage, for a full micro-batch where ``load`` is not given.

    Raises UserError for degrees that do not fit, or an engine that cannot.
    """
    stages = stage_estimates(config, world_size, policy, dense_discriminator, load)
    return max(stages, key=lambda memory: memory.total)


def stage_estimates(
    config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes, load: Load | None = None
) -> list[Memory]:
    """Of each pipeline stage."""
    parallel = config.parallel
    check_layout(config, world_size, policy, dense_discriminator)
    table = policy_table(policy)
    engine = _engine_bytes(config, policy, table)
    asleep = min(_ASLEEP, engine) if config.rollout.sleep_level else engine
    if isinstance(config, CollectConfig):
        return [Memory(engine=engine, asleep=engine)]
    parts: list[_Part] = []
    if not isinstance(config, WarmupConfig):
        parts.append(_Part(table, policy, config.model.freeze, config.optimizer))
    if isinstance(config, PolicyGradientConfig) and config.kl_coeff:
        parts.append(_Part(table, policy, _ALL, config.optimizer))  # the policy as it was
    if isinstance(config, WarmupConfig | AlignConfig):
        wanted = config.discriminator
        heads = 2 if wanted.experts == "dedicated" else 1
        scorer = discriminator_table(dense_discriminator, wanted.num_experts, heads)
        upcycled = _upcycled(dense_discriminator, wanted.num_experts, wanted.topk)
        optimizer = config.optimizer if isinstance(config, WarmupConfig) else config.discriminator_optimizer
        parts.append(_Part(scorer, upcycled, wanted.freeze, optimizer))
    stages = []
    for stage in range(parallel.pipeline_model_parallel_size):
        resident = [_resident(part, config, stage, world_size) for part in parts]
        activations = max(_activations(part, config, stage, load) for part in parts)
        push = _push(table, config) if isinstance(config, PolicyGradientConfig) else 0.0
        weights, gradients, optimizer = (sum(column) for column in zip(*resident, strict=True))
        stages.append(Memory(weights, gradients, optimizer, activations, push, engine, asleep))
    return stages


def check_layout(config: StageConfig, world_size: int, policy: HFSizes, dense_discriminator: HFSizes) -> None:
    """Refuse degrees that some model of the stage does not divide by, or more data-parallel ranks than rows."""
    parallel, experts = config.parallel, policy.num_experts
    if isinstance(config, WarmupConfig | AlignConfig):
        check_degrees(parallel, world_size, dense_discriminator.degrees(config.discriminator.num_experts))
        check_sizes(config.model, parallel, dense_discriminator, upcycled=True)
        experts = experts or config.discriminator.num_experts  # a dense policy has nothing to cut
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
    engine, same_rows = config.rollout.tensor_model_parallel_size, parallel.tensor_model_parallel_size
    same_rows *= parallel.context_parallel_size
    if engine and same_rows % engine:
        raise UserError(
            f"rollout.tensor_model_parallel_size ({engine}) must divide tensor times context parallel size "
            f"({same_rows}), since all ranks of an engine must hold the same prompts"
        )


def published_sizes(size: str, folder: Path) -> HFSizes:
    """Sizes of a released checkpoint, without it; ``folder`` is a place for its config.json."""
    (folder / "config.json").write_text((PUBLISHED / f"{size}.json").read_text())
    return read_sizes(folder)


@dataclass(frozen=True)
class _Part:
    """A model that a stage trains."""

    table: list[Rule]
    sizes: HFSizes
    freeze: Sequence[str]
    optimizer: OptimizerConfig


def _resident(part: _Part, config: StageConfig, stage: int, world_size: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer on a rank of this pipeline stage."""
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
        # The head of the model; a tied one is the embedding itself where there is but one stage.
        return {last} if last or not rule.tied else set()
    return {stage_of_layer[int(found[1])]}


def decoder_layers(sizes: HFSizes, parallel: ParallelConfig) -> list[int]:
    """Decoder layers of each pipeline stage."""
    stages, layers = parallel.pipeline_model_parallel_size, sizes.text["num_hidden_layers"]
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    middle = stages - bool(first) - bool(last)
    even = (layers - first - last) // middle if middle else 0
    return [first or even, *[even] * (stages - 2), last or even][:stages] if stages > 1 else [layers]


def _is_frozen(rule: Rule, freeze: Sequence[str]) -> bool:
    if not rule.megatron.startswith("vision."):
        return "language_model" in freeze
    return ("merger" if "merger" in rule.megatron else "vision") in freeze


def _activations(part: _Part, config: StageConfig, stage: int, load: Load | None) -> float:
    layers = decoder_layers(part.sizes, config.parallel)[stage]
    return activation_bytes(config, part.sizes, part.freeze, stage, layers, load or full_load(config, part.sizes))


def _push(table: Sequence[Rule], config: StageConfig) -> float:
    """What an export holds, and vLLM's part of the largest module until it is copied to its place."""
    itemsize = 4 if config.model.precision == "fp32" else 2
    exported, module = export_bytes(table, itemsize, config.rollout.sync_bucket_mib << 20)
    return exported + module / _engine_ranks(config)


def _engine_ranks(config: StageConfig) -> int:
    return config.rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size


def _engine_bytes(config: StageConfig, policy: HFSizes, table: Sequence[Rule]) -> float:
    """The rollout engine's share, which must hold its weights and a few responses of full length."""
    if not isinstance(config, PolicyGradientConfig | CollectConfig) and not config.eval.num_questions:
        return 0.0
    rollout, text = config.rollout, policy.text
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
