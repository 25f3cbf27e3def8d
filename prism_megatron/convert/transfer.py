"""Loading and exporting of weights: HF tensors to this rank's shards, and all ranks' shards to HF tensors.

All ranks iterate over the table in the same order and derive from it which rank has which shard, so planning needs one
small exchange. An export gathers over tensor-, expert- and expert-tensor-parallel ranks and then broadcasts over the
pipeline, in buckets of bounded size; every rank receives every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from prism_megatron.convert.buckets import gather_bucket, route_of
from prism_megatron.convert.export_plan import BUCKET_BYTES, bucket_in_effect, plan_buckets, units
from prism_megatron.convert.hf_io import check_finite
from prism_megatron.convert.rules import EMBEDDING, OUTPUT, SCORE_HEAD, Rule, Sliceable
from prism_megatron.errors import UserError
from prism_megatron.parallel import groups

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_LOCAL_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")
_GROUPED_EXPERT = re.compile(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)")  # Transformer Engine's grouped linears
_REASONS = {
    "replicated": "on every rank of a pipeline stage: not gathered",
    "sharded": "over {ranks} tensor-parallel ranks: gathered",
    "expert": "of experts on {ranks} expert-parallel ranks: gathered, all experts of a layer together",
}


class TensorSource(Protocol):
    """HF tensors by name: an open checkpoint, or a dictionary in :class:`InMemory`."""

    @property
    def names(self) -> set[str]: ...

    def lazy(self, name: str) -> Sliceable: ...

    def __getitem__(self, name: str) -> Tensor: ...


class InMemory:
    """A :class:`TensorSource` of a dictionary of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def lazy(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def check_source(table: Sequence[Rule], source: TensorSource) -> None:
    """Raise UserError for tensors that are missing, unknown or of another shape.

    An unused ``lm_head.weight`` is accepted: a tied one, or that of a model that becomes a discriminator.
    """
    expected = {name: shape for rule in table for name, shape in zip(rule.hf, rule.shapes, strict=True)}
    if SCORE_HEAD in expected.keys() - source.names:
        raise UserError(
            f"checkpoint has no score head ({SCORE_HEAD}, value_head.safetensors or value_head.pt); tools/upcycle.py "
            "makes one with --init-score-head"
        )
    if missing := sorted(expected.keys() - source.names):
        raise UserError(f"checkpoint lacks {len(missing)} tensors of this model: {', '.join(missing[:3])}")
    if extra := sorted(source.names - expected.keys() - {OUTPUT}):
        raise UserError(f"checkpoint has {len(extra)} tensors that this model does not have: {', '.join(extra[:3])}")
    for name, shape in expected.items():
        if name == SCORE_HEAD and source.lazy(name).shape[0] != shape[0]:
            raise UserError(
                f"{name} has {source.lazy(name).shape[0]} score heads, not {shape[0]}; discriminator.experts=shared "
                "has one, dedicated has one per branch"
            )
        if tuple(source.lazy(name).shape) != shape:
            raise UserError(
                f"{name} has shape {tuple(source.lazy(name).shape)}, not {shape}; config.json and the weights are of "
                "different models"
            )


def check_tied(embedding: Tensor, output: Tensor) -> None:
    """Raise UserError if a stored output layer differs from the embedding that config.json ties it to."""
    if output.shape != embedding.shape or not torch.equal(output, embedding):
        raise UserError(
            f"config.json ties {OUTPUT} to the embedding but the checkpoint stores another matrix; set "
            "tie_word_embeddings to false there to use it (as transformers 5 does), or remove it from the files"
        )


def load_weights(model: Any, table: Sequence[Rule], source: TensorSource) -> None:
    """Load every parameter on this rank, of a module or a list of virtual pipeline chunks, from HF tensors.

    Reads this rank's part of each tensor only. Raises UserError as :func:`check_source` and :func:`check_tied` do, and
    for values that are not finite.
    """
    check_source(table, source)
    rules = {rule.megatron: rule for rule in table}
    tied = any(rule.tied for rule in table)
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            rule = rules[name]
            tensors = rule.sources([source.lazy(hf) for hf in rule.hf])
            shard = rule.layout.join([rule.layout.cut(tensor, *_shard_rank_and_size(rule)) for tensor in tensors])
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            check_finite(", ".join(rule.hf), shard)
            if rule.hf == (EMBEDDING,) and tied and OUTPUT in source.names:
                check_tied(shard, rule.layout.cut(source.lazy(OUTPUT), *_shard_rank_and_size(rule)))
            parameter.copy_(shard)


def export_weights(
    model: Any,
    table: Sequence[Rule],
    bucket_bytes: int = BUCKET_BYTES,
    read: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (HF name, full tensor), except tied copies, on every rank. Collective: iterate to the end.

    Replicated tensors are yielded without a copy: copy those that are needed after a training step.

    Parameters are gathered in halves of ``bucket_bytes``, or a single larger module; one half is gathered, in a thread
    (on a GPU in this thread's stream), while the previous one is consumed. No module is in two halves, so that an
    engine, which stores tensors until a module is complete, stores at most one module. Peak memory:
    :func:`~prism_megatron.convert.export_plan.export_bytes`.

    Args:
        model: module, or list of virtual pipeline chunks.
        table: its conversion table.
        bucket_bytes: size of both halves.
        read: returns the tensor to export for a parameter: its values, or another tensor of its shape such as the
            gradient.
    """
    local = {name: read(parameter) for name, parameter in named_parameters(model).items()}
    buckets = plan_buckets(table, _stages_and_dtypes(local), bucket_bytes // 2)
    routes = {kind: route_of(kind) for kind in sorted({unit.kind for bucket in buckets for unit in bucket.units})}
    with groups.worker_thread() as thread:
        pending = thread.submit(gather_bucket, buckets[0], local, routes)
        for following in [*buckets[1:], None]:
            gathered = pending.result()
            if following is not None:
                pending = thread.submit(gather_bucket, following, local, routes)
            for unit, shards in gathered:
                yield from _split_to_hf(unit.rules, shards, routes[unit.kind].shards)
            del gathered, shards


def export_manifest(model: Any, table: Sequence[Rule]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of :func:`export_weights` by HF name, in its order. Collective."""
    stage_and_dtype = _stages_and_dtypes(named_parameters(model))
    manifest: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rules in units(table):
        _, dtype = next(stage_and_dtype[rule.megatron] for rule in rules if rule.megatron in stage_and_dtype)
        manifest |= {name: (shape, dtype) for name, shape in zip(rules[0].hf, rules[0].shapes, strict=True)}
    return manifest


def export_plan(model: Any, table: Sequence[Rule], bucket_bytes: int = BUCKET_BYTES) -> str:
    """Describe an export in a few lines: bytes, buckets, and what is gathered over which ranks. Collective."""
    buckets = plan_buckets(table, _stages_and_dtypes(named_parameters(model)), bucket_bytes // 2)
    sizes = dict.fromkeys(_REASONS, 0)
    for unit in (unit for bucket in buckets for unit in bucket.units):
        sizes[unit.kind] += unit.bytes
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    largest, module = max(bucket.largest_module for bucket in buckets)
    effective = bucket_in_effect(bucket_bytes, largest)
    lines = [
        f"weight sync: {sum(sizes.values()) / 1e6:.1f} MB to every rank in {len(buckets)} parts of half a bucket, "
        f"{effective / 1e6:.1f} MB; the engine's loader takes full tensors and shards them"
    ]
    if effective > bucket_bytes:
        lines.append(
            f"  rollout.sync_bucket_mib is {bucket_bytes / 1e6:.1f} MB, less than twice the {largest / 1e6:.1f} MB of "
            f"{module}; the engine needs complete modules"
        )
    for kind, size in sizes.items():
        if size:
            ranks = len(route_of(kind).shards)
            lines.append(f"  {size / 1e6:.1f} MB {_REASONS[kind if ranks > 1 else 'replicated']}".format(ranks=ranks))
    if stages > 1:
        lines.append(f"  all of it is broadcast over {stages} pipeline stages, since every engine needs all layers")
    return "\n".join(lines)


def _split_to_hf(
    unit: Sequence[Rule], shards: Sequence[Sequence[Tensor]], ranks: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the HF tensors of one unit; a stack is filled expert by expert.

    Args:
        unit: the unit's rules.
        shards: shards of each member of the group.
        ranks: (expert-parallel, tensor-parallel) rank of each member.
    """
    per_member = len(shards[0])

    def tensors(number: int) -> list[Tensor]:
        expert_rank, index = divmod(number, per_member)
        members = sorted((rank, member) for member, (of_expert, rank) in enumerate(ranks) if of_expert == expert_rank)
        return unit[number].layout.to_hf([shards[member][index] for _, member in members])

    if unit[0].expert is None:
        yield from zip(unit[0].hf, tensors(0), strict=True)
        return
    stack = shards[0][0].new_empty(unit[0].shapes[0])
    for number in range(len(unit)):
        (stack[number],) = tensors(number)
    yield unit[0].hf[0], stack


def _stages_and_dtypes(local: Mapping[str, Tensor]) -> dict[str, tuple[int, torch.dtype]]:
    """Return pipeline stage and dtype of every parameter in this rank's pipeline group. Collective."""
    dtypes = {name: tensor.dtype for name, tensor in local.items()}
    stages: list[dict[str, torch.dtype]] = [dtypes]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        stages = [{}] * pipeline.size()
        dist.all_gather_object(stages, dtypes, group=pipeline)
    return {name: (stage, dtype) for stage, names in enumerate(stages) for name, dtype in names.items()}


def unwrap(model: Any) -> nn.Module:
    """Return the model inside Megatron's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    inner: nn.Module = model
    return inner


def named_parameters(model: Any) -> dict[str, Tensor]:
    """Return parameters of a module, or of a list of virtual pipeline chunks, by global name.

    Megatron numbers layers and experts from zero on every rank; global names have their numbers in the full model.
    """
    chunks = [unwrap(chunk) for chunk in (model if isinstance(model, list | tuple) else [model])]
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    parameters: dict[str, Tensor] = {}
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]  # type: ignore[union-attr]
        named = {global_layer(name, numbers): parameter for name, parameter in chunk.named_parameters()}
        parameters |= global_experts(named, expert_rank)
    return parameters


def global_layer(name: str, numbers: Sequence[int]) -> str:
    """Replace the layer number in a name, on a pipeline stage with these ``numbers`` in the full model."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{numbers[int(match[1])]}.{match[2]}" if match else name


def global_experts(parameters: Mapping[str, Tensor], expert_rank: int) -> dict[str, Tensor]:
    """Replace expert numbers by those in the full model; grouped linears get the names of single experts."""
    single = {_GROUPED_EXPERT.sub(r"\1local_experts.\3.\2", name): p for name, p in parameters.items()}
    counts: dict[str, int] = {}
    for name in single:
        if match := _LOCAL_EXPERT.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)

    def numbered(name: str) -> str:
        match = _LOCAL_EXPERT.fullmatch(name)
        return f"{match[1]}{int(match[2]) + expert_rank * counts[match[1]]}{match[3]}" if match else name

    return {numbered(name): parameter for name, parameter in single.items()}


def _shard_rank_and_size(rule: Rule) -> tuple[int, int]:
    """Return this rank and the size of the group that a parameter is sharded over."""
    if rule.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
