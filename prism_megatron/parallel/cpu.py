"""The only file that knows megatron-core can run without a GPU.

Megatron-core calls ``torch.cuda`` directly in many places. :func:`install` replaces these functions by CPU ones in this
process; with CUDA it does nothing. ``groups.initialize`` calls it; modules may be imported before or after. Only what
no configuration flag can avoid is replaced (``model/build.py`` sets the flags).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from prism_megatron.upstream.torch_internals import device_constructors

_CPU = torch.device("cpu")
# A TorchFunctionMode would be tidier, but it is not active inside autograd.Function.backward, where recompute runs.
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "arange", "as_tensor", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


class _NoStream:
    """Replacement of a CUDA stream or event: on a CPU all work is done when a function returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    __hash__ = object.__hash__

    def record_event(self, *args: Any) -> _NoStream:
        return self

    def wait_stream(self, *args: Any) -> None: ...

    wait_event = record = wait = synchronize = wait_stream

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _NoStream) -> float:
        return 0.0


class _DefaultGenerators:
    """Replacement of ``torch.cuda.default_generators``: the CPU generator for every device."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def install() -> None:
    """Make megatron-core run on a CPU. Idempotent; does nothing where CUDA is available."""
    if torch.cuda.is_available() or getattr(torch.cuda, "prism_cpu_backend", False):
        return
    torch.cuda.prism_cpu_backend = True  # type: ignore[attr-defined]
    _patch_cuda_module()
    _patch_tensor_methods()
    # `with torch.device(...)` recognises factories by identity: let it cache the original functions.
    device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_megatron()


def _nothing() -> Callable[..., None]:
    """Return a new function that does nothing: torch._dynamo refuses one function under two names of torch."""
    return lambda *args, **kwargs: None


def _patch_cuda_module() -> None:
    stream = _NoStream()
    generator = torch.default_generator
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "current_stream": lambda *a, **k: stream,
        "default_stream": lambda *a, **k: stream,
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "set_device": _nothing(),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": generator.manual_seed,
        "default_generators": _DefaultGenerators(),
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _nothing(), _nothing()  # type: ignore[assignment]


def _patch_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron distinguishes dtypes by names such as "torch.cuda.FloatTensor".
        result = tensor_type(self, dtype, *args, **kwargs) if dtype is not None else tensor_type(self)
        return result.replace("torch.", "torch.cuda.", 1) if dtype is None and ".cuda." not in result else result

    torch.Tensor.type = cuda_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign, assignment]
    torch.Tensor.record_stream = _nothing()  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _patch_megatron() -> None:
    from prism_megatron.upstream import megatron

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts split sizes to host integers only when the tensor is on a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    megatron.wrap_first_dim_collectives(
        lambda gather: _uneven(gather, _gather_parts), lambda scatter: _uneven(scatter, _reduce_scatter_parts)
    )
    megatron.wrap_set_optimizer_states(_with_step)
    megatron.replace_cuda_functions(
        to_host, lambda *a, **k: torch.get_rng_state(), lambda state, *a, **k: torch.set_rng_state(state)
    )
    # There is one generator, so that Megatron's check that the CPU's random state did not change always warns.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _with_step(set_states: Callable[..., None]) -> Callable[..., None]:
    """Let the distributed optimizer restore torch's AdamW, whose step per parameter it does not save."""

    def set_states_but_step(self: Any, parameter: Any, states: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None, **states})

    return set_states_but_step


def _uneven(even: Callable[..., Any], uneven: Callable[..., Any]) -> Callable[..., Any]:
    """Use ``uneven`` for unequal parts, which experts split over tensor-parallel ranks exchange: gloo has none."""

    def mapped(input_: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        sizes = kwargs.pop("output_split_sizes", kwargs.pop("input_split_sizes", sizes))
        if sizes is None or group.size() == 1:
            return even(input_, group, None, *args, **kwargs)
        return uneven(input_, group, [int(size) for size in sizes])

    return mapped


def _gather_parts(part: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([gathered[:size] for gathered, size in zip(parts, sizes, strict=True)])


def _reduce_scatter_parts(values: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    summed = values.contiguous().clone()
    torch.distributed.all_reduce(summed, group=group)
    return summed.split(sizes)[group.rank()]
