"""Parameters of a running engine that differ from the last pushed weights: a diagnosis of wrong log-probabilities.

vLLM's loaders, which shard and fuse tensors, fill a second set of the engine's tensors with the pushed weights, and a
third with the index of the parameter that each element comes from. Both take as much memory as the engine's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from prism_megatron.upstream.torch_internals import own_parameters
from prism_megatron.upstream.vllm import (
    current_platform,
    expert_kernel,
    get_layerwise_info,
    get_original_loader,
    materialize_meta_tensor,
    pack_experts,
    packed_product,
    restore_layer_refs,
    to_meta_tensor,
)

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of a packed product, relative
_NO_PARAMETER = -1.0


@dataclass
class _Expected:
    """Expected content of one tensor of the engine.

    Attributes:
        value: the expected elements.
        source: for each element, the index in ``names`` of the parameter that it comes from.
        names: HF names of the parameters that the tensor consists of.
    """

    value: Any
    source: Any
    names: list[str] = field(default_factory=list)

    def names_at(self, mask: Tensor) -> set[str]:
        """Names of the parameters that the elements of ``mask`` come from."""
        return {self.names[int(number)] for number in self.source[mask].unique() if number != _NO_PARAMETER}


@torch.no_grad()
def differing_parameters(model: Any, named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """HF names, by their position in ``named``, of parameters that this rank of the engine has other values for."""
    modules = [module for module in model.modules() if own_parameters(module)]
    kernels = {module: {n: p for n, p in own_parameters(module).items() if p is not None} for module in modules}
    order: dict[str, int] = {}
    expected = {module: _prepare_expected(module, order) for module in modules}
    try:
        model.load_weights(_numbered(named, order))
        for module in modules:
            _pack_experts(module)
        packed = {module: dict(own_parameters(module)) for module in modules}
    finally:
        for module, parameters in kernels.items():
            for name, parameter in parameters.items():
                own_parameters(module)[name] = parameter
    by_kernel = {id(kernels[m][n]): e for m, es in expected.items() for n, e in es.items() if e.names}
    wrong: set[str] = set()
    for module in modules:
        for name, kernel in kernels[module].items():
            # An output layer that is tied to the embedding shares its tensor, but has a packed copy of its own.
            if (found := by_kernel.get(id(kernel))) is not None:
                again = packed[module][name]
                assert again is not None
                wrong |= _wrong(module, name, kernel, found, again)
    return {order[name]: name for name in wrong}


def _numbered(named: Iterable[tuple[str, Tensor]], order: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        order[name] = len(order)
        yield name, tensor


def _prepare_expected(module: Any, order: dict[str, int]) -> dict[str, _Expected]:
    """Replace a module's tensors by empty ones, as before its first load, with loaders that also fill the sources."""
    original, _ = get_layerwise_info(module).restore_metadata
    found = {}
    for name, kernel in list(own_parameters(module).items()):
        if kernel is None:
            continue
        meta = original[name] if name in original else to_meta_tensor(kernel)
        value, source = (restore_layer_refs(materialize_meta_tensor(meta), module) for _ in range(2))
        source.data.fill_(_NO_PARAMETER)
        found[name] = expected = _Expected(value, source)
        value.weight_loader = _recording(get_original_loader(value), expected, order)
        own_parameters(module)[name] = value
    return found


def _recording(load: Any, expected: _Expected, order: dict[str, int]) -> Any:
    @wraps(load)
    def load_and_record(parameter: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = next(reversed(order))
        if name not in expected.names:
            expected.names.append(name)
        load(expected.source, torch.full_like(tensor, expected.names.index(name)), *args, **kwargs)
        return load(parameter, tensor, *args, **kwargs)

    return load_and_record


def _pack_experts(module: Any) -> None:
    """Order expected experts as the CPU kernel does."""
    if expert_kernel(module) is not None and current_platform.is_cpu():
        pack_experts(module)


def _wrong(module: Any, name: str, kernel: Tensor, expected: _Expected, packed: Tensor) -> set[str]:
    if expert_kernel(module) is not None:
        # The kernel's order of elements cannot be inverted; on a GPU it is not even known.
        same = torch.equal(kernel, packed) if current_platform.is_cpu() else _same_elements(kernel, packed)
        return set() if same else set(expected.names)
    wrong: set[str] = set()
    if name == "weight" and (product := packed_product(module)) is not None:
        inputs = torch.randn(8, expected.value.shape[1], generator=torch.Generator().manual_seed(0)).to(kernel.dtype)
        found, correct = product(inputs, kernel, None).float(), (inputs @ expected.value.T).float()
        limit = _TOLERANCE[kernel.dtype] * correct.abs().max()
        wrong |= expected.names_at(~((found - correct).abs().amax(0) <= limit))
    if kernel.numel():  # usually freed where there is a packed copy
        wrong |= expected.names_at(kernel != expected.value.to(kernel.dtype))
    return wrong


def _same_elements(first: Tensor, second: Tensor) -> bool:
    """Compare the elements in any order, by their sum and sum of squares."""
    one, other = (torch.stack((t.double().sum(), t.double().square().sum())) for t in (first, second))
    return torch.allclose(one, other, rtol=1e-9, atol=0.0)
