"""Optimizer state in checkpoints, independent of the parallel layout.

Megatron has a separate optimizer for experts that are split over ranks, so that the number of optimizers, of parameter
groups and of parameters in them depends on the layout. A checkpoint has the state of each parameter, under the
parameter's name, and one step count. Hyper-parameters are those of the run that loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from prism_megatron.convert.load_checkpoint import content_metadata
from prism_megatron.upstream.megatron import (
    LocalNonpersistentObject,
    dict_list_map_outplace,
    extract_sharded_base,
    merge,
)


def saved_state(optimizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the state to save: sharded as ``weights`` (the model's sharded state dict), and the step count."""
    _allocate(optimizer)
    parameters, _ = _sharded_state(optimizer, weights, loading=False)
    return {"parameters": parameters, "step": _step_count(optimizer)}


def state_to_load(optimizer: Any, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state to load from what :func:`saved_state` wrote at any layout, and this run's own state.

    ``weights`` is the model's sharded state dict.
    """
    _allocate(optimizer)
    _set_step_count(optimizer, 1)  # Megatron takes 0 for a missing step
    parameters, own = _sharded_state(optimizer, weights, loading=True)
    return {"parameters": parameters}, own


def restore(optimizer: Any, own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Set the optimizer's state from both results of :func:`state_to_load`, the first one ``loaded``."""
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
    """Create the state that torch's AdamW creates in its first step; Megatron does so for Transformer Engine's."""
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
    """Yield step counts: torch's AdamW has one per parameter, Transformer Engine's one per parameter group."""
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
