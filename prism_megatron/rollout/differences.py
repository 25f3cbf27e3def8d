"""Which parameters of a running engine are not those that it was given: for when its answers are wrong.

vLLM's own loaders say what each of its tensors should hold, cut and fused as they are: they fill a second set of
tensors, which takes as much memory again as the engine's weights, and a third that says which is whose.
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
_NOBODY = -1.0


@dataclass
class _Expected:
    """What one tensor of the engine should hold, and of which of ``names`` each element is."""

    value: Any
    owner: Any
    names: list[str] = field(default_factory=list)

    def of(self, place: Tensor) -> set[str]:
        """Names of the elements at ``place``."""
        return {self.names[int(number)] for number in self.owner[place].unique() if number != _NOBODY}


@torch.no_grad()
def differing_parameters(model: Any, named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """HF names, by their place in ``named``, of what this rank of the engine computes with otherwise than they say."""
    modules = [module for module in model.modules() if own_parameters(module)]
    kernels = {module: {n: p for n, p in own_parameters(module).items() if p is not None} for module in modules}
    order: dict[str, int] = {}
    expected = {module: _place_expected(module, order) for module in modules}
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
            # An output layer that is tied to the embedding has its tensor, and a packed copy of its own.
            if (found := by_kernel.get(id(kernel))) is not None:
                again = packed[module][name]
                assert again is not None
                wrong |= _wrong(module, name, kernel, found, again)
    return {order[name]: name for name in wrong}


def _numbered(named: Iterable[tuple[str, Tensor]], order: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        order[name] = len(order)
        yield name, tensor


def _place_expected(module: Any, order: dict[str, int]) -> dict[str, _Expected]:
    """Give a module empty tensors as at its first load, whose loader also notes whose each element is."""
    original, _ = get_layerwise_info(module).restore_metadata
    found = {}
    for name, kernel in list(own_parameters(module).items()):
        if kernel is None:
            continue
        meta = original[name] if name in original else to_meta_tensor(kernel)
        value, owner = (restore_layer_refs(materialize_meta_tensor(meta), module) for _ in range(2))
        owner.data.fill_(_NOBODY)
        found[name] = expected = _Expected(value, owner)
        value.weight_loader = _noting(get_original_loader(value), expected, order)
        own_parameters(module)[name] = value
    return found


def _noting(load: Any, expected: _Expected, order: dict[str, int]) -> Any:
    @wraps(load)
    def noting(parameter: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = next(reversed(order))
        if name not in expected.names:
            expected.names.append(name)
        load(expected.owner, torch.full_like(tensor, expected.names.index(name)), *args, **kwargs)
        return load(parameter, tensor, *args, **kwargs)

    return noting


def _pack_experts(module: Any) -> None:
    """Lay expected experts out as the CPU's kernel has them."""
    if expert_kernel(module) is not None and current_platform.is_cpu():
        pack_experts(module)


def _wrong(module: Any, name: str, kernel: Tensor, expected: _Expected, packed: Tensor) -> set[str]:
    if expert_kernel(module) is not None:
        # A kernel's own order of the elements cannot be told apart any more; on a GPU it is not even known.
        same = torch.equal(kernel, packed) if current_platform.is_cpu() else _alike(kernel, packed)
        return set() if same else set(expected.names)
    wrong: set[str] = set()
    if name == "weight" and (product := packed_product(module)) is not None:
        inputs = torch.randn(8, expected.value.shape[1], generator=torch.Generator().manual_seed(0)).to(kernel.dtype)
        found, wanted = product(inputs, kernel, None).float(), (inputs @ expected.value.T).float()
        limit = _TOLERANCE[kernel.dtype] * wanted.abs().max()
        wrong |= expected.of(~((found - wanted).abs().amax(0) <= limit))
    if kernel.numel():  # and no weight, as a rule
        wrong |= expected.of(kernel != expected.value.to(kernel.dtype))
    return wrong


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether the elements are the same, in whatever order, by their sum and sum of squares."""
    ours, theirs = (torch.stack((t.double().sum(), t.double().square().sum())) for t in (first, second))
    return torch.allclose(ours, theirs, rtol=1e-9, atol=0.0)
