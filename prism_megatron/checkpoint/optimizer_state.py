"""Optimizer state that is the same however Megatron groups parameters into optimizers.

Megatron keeps experts that are cut over ranks in an optimizer of their own, so the number of optimizers, their
parameter groups and the numbers of parameters in them change with the layout. What is saved is the state of each
parameter, under its name, and the step count that all share. Hyper-parameters are those of the run that loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from prism_megatron.convert.load_checkpoint import content_metadata


def saved_state(optimizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """What to write: state sharded as ``weights``, the model's sharded state dict, is; and the step count."""
    _allocate(optimizer)
    parameters, _ = _sharded_state(optimizer, weights, loading=False)
    return {"parameters": parameters, "step": _step_count(optimizer)}


def wanted_state(optimizer: Any, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to read, as :func:`saved_state` wrote it at any layout, and what stays as this run has it."""
    _allocate(optimizer)
    _set_step_count(optimizer, 1)  # Megatron takes a step of 0 for none
    parameters, own = _sharded_state(optimizer, weights, loading=True)
    return {"parameters": parameters}, own


def restore(optimizer: Any, own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Put what was read for :func:`wanted_state` into the optimizer."""
    optimizer.load_state_dict(merge(own, loaded["parameters"]))
    _set_step_count(optimizer, loaded["step"])


def _sharded_state(optimizer: Any, weights: dict[str, Any], loading: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=content_metadata())
    sharded, own = extract_sharded_base(state)
    return sharded, dict_list_map_outplace(_unwrapped, own)


def _unwrapped(value: Any) -> Any:
    return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value


def _inner(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield part.optimizer


def _allocate(optimizer: Any) -> None:
    """Give torch's AdamW the state that it makes in its first step; Megatron does so for Transformer Engine's."""
    for inner in _inner(optimizer):
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))


def _step_count(optimizer: Any) -> int:
    steps = {int(step) for inner in _inner(optimizer) for step in _steps(inner)}
    assert len(steps) == 1, steps
    return steps.pop()


def _steps(inner: Any) -> Iterator[Any]:
    """torch's AdamW counts for each parameter, Transformer Engine's for each group that has some."""
    if isinstance(inner, torch.optim.AdamW):
        yield from (state["step"] for state in inner.state.values())
    else:
        yield from (group.get("step", 0) for group in inner.param_groups if group["params"])


def _set_step_count(optimizer: Any, step: int) -> None:
    for inner in _inner(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for state in inner.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in inner.param_groups:
                group["step"] = step
