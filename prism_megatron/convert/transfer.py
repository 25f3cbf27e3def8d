"""Moving weights: HF checkpoint -> this rank's shards, and all ranks' shards -> HF tensors.

Every rank walks the table in the same order and knows from it who owns what, so the plan costs one small exchange.
Export gathers over tensor-, expert- and expert-tensor-parallel ranks and then sends along the pipeline, in buckets of
bounded size; every rank sees every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from prism_megatron.convert.manifest import check_finite
from prism_megatron.convert.rules import OUTPUT, SCORE_HEAD, Rule, Sliceable
from prism_megatron.parallel import groups

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_LOCAL_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")
_GROUPED_EXPERT = re.compile(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)")  # Transformer Engine's grouped linears
_BUCKET_BYTES = 256 << 20


class TensorSource(Protocol):
    """HF tensors by name: an open checkpoint or a plain dictionary wrapped by :class:`InMemory`."""

    @property
    def names(self) -> set[str]: ...

    def lazy(self, name: str) -> Sliceable: ...

    def __getitem__(self, name: str) -> Tensor: ...


class InMemory:
    """A dictionary of tensors as a :class:`TensorSource`."""

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
    """Raises ValueError if a tensor of the table is missing or has another shape, or one of the source has no place.

    ``lm_head.weight`` may be left over: tied to the embedding, or of a model that becomes a discriminator.
    """
    expected = {name: shape for rule in table for name, shape in zip(rule.hf, rule.shapes, strict=True)}
    if SCORE_HEAD in expected.keys() - source.names:
        raise ValueError(
            f"checkpoint has no score head ({SCORE_HEAD}, value_head.safetensors or value_head.pt); tools/upcycle.py "
            "makes one with --init-score-head"
        )
    if missing := sorted(expected.keys() - source.names):
        raise ValueError(f"checkpoint lacks {len(missing)} tensors of this model: {', '.join(missing[:3])}")
    if extra := sorted(source.names - expected.keys() - {OUTPUT}):
        raise ValueError(f"checkpoint holds {len(extra)} tensors this model has no place for: {', '.join(extra[:3])}")
    for name, shape in expected.items():
        if name == SCORE_HEAD and source.lazy(name).shape[0] != shape[0]:
            raise ValueError(
                f"{name} has {source.lazy(name).shape[0]} score heads, not {shape[0]}; discriminator.experts=shared "
                "has one, dedicated has one per branch"
            )
        if tuple(source.lazy(name).shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(source.lazy(name).shape)}, not {shape}; config.json and the weights are of "
                "different models"
            )


def load_weights(model: Any, table: Sequence[Rule], source: TensorSource) -> None:
    """Fill every parameter on this rank, of one module or of a list of virtual pipeline chunks, from HF tensors.

    Reads this rank's part of each tensor only. Raises ValueError as :func:`check_source`, and at values that are not
    finite.
    """
    check_source(table, source)
    rules = {rule.megatron: rule for rule in table}
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            rule = rules[name]
            tensors = rule.sources([source.lazy(hf) for hf in rule.hf])
            shard = rule.layout.join([rule.layout.cut(tensor, *_place(rule)) for tensor in tensors])
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            check_finite(", ".join(rule.hf), shard)
            parameter.copy_(shard)


def export_weights(
    model: Any,
    table: Sequence[Rule],
    bucket_bytes: int = _BUCKET_BYTES,
    read: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (HF name, whole tensor) on every rank: all must iterate to the end. Tied copies are left out.

    ``read`` says what of a parameter is exported: its values, or another tensor of its shape such as its gradient.
    At most ``bucket_bytes`` of gathered tensors are held per kind of parameter, or one tensor if that is larger.
    """
    here = {name: read(parameter) for name, parameter in named_parameters(model).items()}
    owners = _owners(here)
    buckets: dict[tuple[int, torch.dtype, str], _Bucket] = {}
    for rules in units(table):
        stage, dtype = next(owners[rule.megatron] for rule in rules if rule.megatron in owners)
        kind = "expert" if rules[0].expert is not None else "cut" if rules[0].layout.axis is not None else "whole"
        size = sum(rule.numel for rule in rules) * dtype.itemsize
        bucket = buckets.setdefault((stage, dtype, kind), _Bucket(stage, dtype, kind))
        if bucket.units and bucket.bytes + size > bucket_bytes:
            yield from bucket.gather(here)
            bucket = buckets[stage, dtype, kind] = _Bucket(stage, dtype, kind)
        bucket.units.append(rules)
        bucket.bytes += size
    for bucket in buckets.values():
        yield from bucket.gather(here)


def export_manifest(model: Any, table: Sequence[Rule]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of everything :func:`export_weights` yields, by HF name. Collective."""
    owners = _owners(named_parameters(model))
    manifest: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rules in units(table):
        _, dtype = next(owners[rule.megatron] for rule in rules if rule.megatron in owners)
        manifest |= {name: (shape, dtype) for name, shape in zip(rules[0].hf, rules[0].shapes, strict=True)}
    return manifest


@dataclass
class _Bucket:
    """Parameters of one pipeline stage, one dtype and one way of being cut, that travel together."""

    stage: int
    dtype: torch.dtype
    kind: str
    units: list[list[Rule]] = field(default_factory=list)
    bytes: int = 0

    def gather(self, here: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Collective. This rank's shards, in table order, end to end in one buffer; then everybody's; then apart."""
        places = self._places()
        etp = 1 + max(place for _, place in places)
        present = 1 + max(part for part, _ in places)
        shapes = [unit[0].shard_shape(etp) for unit in self.units]
        lengths = [prod(shape) * len(unit) // present for shape, unit in zip(shapes, self.units, strict=True)]
        everybody = torch.empty(len(places), sum(lengths), dtype=self.dtype, device=groups.device())
        if self.stage == parallel_state.get_pipeline_model_parallel_rank():
            local = [here[rule.megatron].flatten() for unit in self.units for rule in unit if rule.megatron in here]
            self._gather_stage(torch.cat(local), everybody)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(everybody, src=dist.get_global_rank(pipeline, self.stage), group=pipeline)
        for unit, shape, block in zip(self.units, shapes, everybody.split(lengths, dim=1), strict=True):
            yield from _apart(unit, block.view(len(places), -1, *shape), places)

    def _gather_stage(self, local: Tensor, everybody: Tensor) -> None:
        group = self._group()
        if group is None or group.size() == 1:
            everybody[0] = local
        else:
            dist.all_gather_into_tensor(everybody.view(-1), local, group=group)

    def _group(self) -> Any:
        if self.kind == "expert":
            return parallel_state.get_expert_tensor_and_model_parallel_group()
        return parallel_state.get_tensor_model_parallel_group() if self.kind == "cut" else None

    def _places(self) -> list[tuple[int, int]]:
        """Of every member of the group: which part of the experts it holds, and which part of each matrix."""
        group = self._group()
        if group is None:
            return [(0, 0)]
        if self.kind == "cut":
            return [(0, rank) for rank in range(group.size())]
        mine = (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank())
        places: list[tuple[int, int]] = [(0, 0)] * group.size()
        dist.all_gather_object(places, mine, group=group)
        return places


def _apart(unit: Sequence[Rule], block: Tensor, places: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    """HF tensors of one unit; block [members, parameters per member, *shard]."""
    per_member = block.shape[1]
    matrices: list[list[Tensor]] = []
    for number, rule in enumerate(unit):
        part, index = divmod(number, per_member)
        owners = sorted((place, member) for member, (owned, place) in enumerate(places) if owned == part)
        matrices.append(rule.layout.to_hf([block[member, index] for _, member in owners]))
    for position, name in enumerate(unit[0].hf):
        tensors = [tensors[position] for tensors in matrices]
        yield name, tensors[0] if unit[0].expert is None else torch.stack(tensors)


def units(table: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Rules that make the same HF tensors: one, or all experts of a stack, which follow each other in the table."""
    unit: list[Rule] = []
    for rule in table:
        if rule.tied:
            continue
        if unit and rule.hf != unit[0].hf:
            yield unit
            unit = []
        unit.append(rule)
    yield unit


def _owners(here: Mapping[str, Tensor]) -> dict[str, tuple[int, torch.dtype]]:
    """Pipeline stage and dtype of every parameter in this rank's column of the pipeline."""
    mine = {name: tensor.dtype for name, tensor in here.items()}
    stages: list[dict[str, torch.dtype]] = [mine]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        stages = [{}] * pipeline.size()
        dist.all_gather_object(stages, mine, group=pipeline)
    return {name: (stage, dtype) for stage, names in enumerate(stages) for name, dtype in names.items()}


def unwrap(model: Any) -> nn.Module:
    """The model inside Megatron's wrappers, if it is wrapped."""
    while hasattr(model, "module"):
        model = model.module
    inner: nn.Module = model
    return inner


def named_parameters(model: Any) -> dict[str, Tensor]:
    """Parameters of a module, or of a list of virtual pipeline chunks, by global name.

    Layers and experts are numbered from zero on every rank; here they have their numbers in the whole model.
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
    """``decoder.layers.{i}`` of a pipeline stage whose layers have these ``numbers`` in the whole model."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{numbers[int(match[1])]}.{match[2]}" if match else name


def global_experts(parameters: Mapping[str, Tensor], expert_rank: int) -> dict[str, Tensor]:
    """Number experts in the whole model; grouped linears get the names of single ones."""
    single = {_GROUPED_EXPERT.sub(r"\1local_experts.\3.\2", name): p for name, p in parameters.items()}
    counts: dict[str, int] = {}
    for name in single:
        if match := _LOCAL_EXPERT.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)

    def numbered(name: str) -> str:
        match = _LOCAL_EXPERT.fullmatch(name)
        return f"{match[1]}{int(match[2]) + expert_rank * counts[match[1]]}{match[3]}" if match else name

    return {numbered(name): parameter for name, parameter in single.items()}


def _place(rule: Rule) -> tuple[int, int]:
    """(rank, size) of the group that cuts a parameter."""
    if rule.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
