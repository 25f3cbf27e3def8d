"""The check that a weight update brings every parameter once, as it should be, and the same to every rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

type Manifest = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by HF name


@dataclass
class WeightSync:
    """One replacement of all weights, as one rank sees it.

    ``checksums`` fills while tensors pass, if ``with_checksums``: they cost a pass over the bytes.
    """

    version: int
    manifest: Manifest
    with_checksums: bool = False
    checksums: dict[str, int] = field(default_factory=dict)

    def checked(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors through.

        Raises ValueError at one that is unknown, repeated or of another shape or dtype, and at the end if some are
        missing.
        """
        seen: set[str] = set()
        for name, tensor in named:
            self._check(name, tensor, seen)
            seen.add(name)
            if self.with_checksums:
                self.checksums[name] = checksum(tensor)
            yield name, tensor
        if missing := [name for name in self.manifest if name not in seen]:
            raise ValueError(
                f"weight update {self.version}: {len(missing)} parameters did not arrive, first {missing[0]}"
            )

    def _check(self, name: str, tensor: Tensor, seen: set[str]) -> None:
        if name not in self.manifest:
            raise ValueError(f"weight update {self.version}: the engine has no parameter {name}")
        if name in seen:
            raise ValueError(f"weight update {self.version}: {name} arrived twice")
        shape, dtype = self.manifest[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"weight update {self.version}: {name} arrived as {tensor.dtype} {tuple(tensor.shape)}, not {dtype} "
                f"{shape}"
            )

    def check_agreement(self, everybody: Sequence[Mapping[str, int]]) -> None:
        """Raises ValueError naming the first parameter that ``everybody``, checksums by rank, did not get alike."""
        for name in self.manifest:
            found = [checksums[name] for checksums in everybody]
            if differing := [rank for rank, value in enumerate(found) if value != found[0]]:
                raise ValueError(
                    f"weight update {self.version}: {name} is not the same on ranks 0 and {differing[0]}; a parameter "
                    "that ranks share has drifted apart, or a bucket was corrupted on its way"
                )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.cpu().numpy())
