"""Moving weights: HF checkpoint -> this rank's shards, and all ranks' shards -> HF tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from prism_megatron.convert.rules import Rule

_LOCAL_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


class TensorSource(Protocol):
    """HF tensors by name: an open checkpoint or a plain dictionary wrapped by :class:`InMemory`."""

    @property
    def names(self) -> set[str]: ...

    def __getitem__(self, name: str) -> Tensor: ...


class InMemory:
    """A dictionary of tensors as a :class:`TensorSource`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def load_weights(model: nn.Module, table: Sequence[Rule], source: TensorSource, allow_extra: bool = False) -> None:
    """Fill every parameter of ``model`` on this rank from HF tensors.

    Raises ValueError if a tensor is missing, has another shape, or is in the source but used by nothing (a tied
    ``lm_head.weight`` is the one exception).
    """
    rules = {rule.megatron: rule for rule in table}
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            rule = rules[name]
            full = rule.layout.join([source[hf] for hf in rule.hf])
            shard = rule.layout.shard(full, *_shard_position(rule))
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{', '.join(rule.hf)}: shape {tuple(shard.shape)} does not fit {name} {tuple(parameter.shape)}; "
                    "config.json and the weights are of different models"
                )
            parameter.copy_(shard)
    unused = source.names - {hf for rule in table for hf in rule.hf} - {"lm_head.weight"}
    if unused and not allow_extra:
        raise ValueError(f"checkpoint holds {len(unused)} tensors this model has no place for: {sorted(unused)[:3]}")


def export_weights(model: nn.Module, table: Sequence[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Yield every (HF name, full tensor), gathered over tensor- and expert-parallel ranks: all ranks must iterate."""
    parameters = _parameters(model)
    stacked: dict[str, list[Tensor]] = {}
    for rule in table:
        shards = _gather(parameters.get(rule.megatron), rule)
        tensors = rule.layout.split(rule.layout.unshard(shards))
        if rule.expert is None:
            yield from zip(rule.hf, tensors, strict=True)
            continue
        # Experts of one layer follow each other in the table; the stack is complete with the last of them.
        stacked.setdefault(rule.hf[0], []).append(tensors[0])
        if _is_last_expert(rule, table):
            yield rule.hf[0], torch.stack(stacked.pop(rule.hf[0]))
    assert not stacked


def unwrap(model: Any) -> nn.Module:
    """The model inside Megatron's DDP, if it is wrapped."""
    inner: nn.Module = getattr(model, "module", model)
    return inner


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by global name: local expert numbers become global ones."""
    experts_here: dict[str, int] = {}
    names = [name for name, _ in unwrap(model).named_parameters()]
    for name in names:
        if match := _LOCAL_EXPERT.fullmatch(name):
            experts_here[match[1]] = max(experts_here.get(match[1], 0), int(match[2]) + 1)
    rank = parallel_state.get_expert_model_parallel_rank()
    parameters: dict[str, Tensor] = {}
    for name, parameter in unwrap(model).named_parameters():
        if match := _LOCAL_EXPERT.fullmatch(name):
            name = f"{match[1]}{int(match[2]) + rank * experts_here[match[1]]}{match[3]}"
        parameters[name] = parameter
    return parameters


def _shard_position(rule: Rule) -> tuple[int, int]:
    if rule.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _gather(parameter: Tensor | None, rule: Rule) -> list[Tensor]:
    """All shards of one parameter, in rank order, on every rank."""
    if rule.expert is not None:
        return _gather_expert(parameter)
    assert parameter is not None, rule.megatron
    _, size = _shard_position(rule)
    if size == 1:
        return [parameter.detach()]
    shards = [torch.empty_like(parameter) for _ in range(size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards


def _gather_expert(parameter: Tensor | None) -> list[Tensor]:
    """Shards of an expert that lives on some ranks of the expert group only: its owners' copies, in tensor order."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() == 1:
        assert parameter is not None
        return [parameter.detach()]
    pieces: list[Tensor | None] = [None] * group.size()
    mine = None if parameter is None else parameter.detach().cpu()
    dist.all_gather_object(pieces, mine, group=group)
    return [piece for piece in pieces if piece is not None]


def _is_last_expert(rule: Rule, table: Sequence[Rule]) -> bool:
    assert rule.expert is not None
    return rule.expert == max(r.expert for r in table if r.hf == rule.hf and r.expert is not None)
