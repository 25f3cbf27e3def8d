"""The check that a weight update is complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def complete_once(
    named: Iterable[tuple[str, Tensor]], expected: frozenset[str], version: int
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through. Raises ValueError at an unknown or repeated one, and at the end if some are missing."""
    seen: set[str] = set()
    for name, tensor in named:
        if name not in expected:
            raise ValueError(f"weight update {version}: the engine has no parameter {name}")
        if name in seen:
            raise ValueError(f"weight update {version}: {name} arrived twice")
        seen.add(name)
        yield name, tensor
    if missing := sorted(expected - seen):
        raise ValueError(f"weight update {version}: {len(missing)} parameters did not arrive, first {missing[0]}")
