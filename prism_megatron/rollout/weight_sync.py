"""The check that a weight update brings every parameter once, as it should be, and the same to every rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_megatron.errors import UserError

type Manifest = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by HF name


@dataclass
class WeightSync:
    """One replacement of all weights, as one rank sees it.

    ``checksums`` fills while tensors pass, if ``with_checksums``: they cost a pass over the bytes. Errors call
    who was given something ``holder``, with a number in it.
    """

    version: int
    manifest: Manifest
    with_checksums: bool = False
    checksums: dict[str, int] = field(default_factory=dict)
    holder: str = "rank {}"

    def checked(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors through.

        Raises UserError at one that is unknown, repeated or of another shape or dtype, and at the end if some are
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
            raise UserError(
                f"weight update {self.version}: {len(missing)} parameters did not arrive, first {missing[0]}"
            )

    def _check(self, name: str, tensor: Tensor, seen: set[str]) -> None:
        if name not in self.manifest:
            raise UserError(f"weight update {self.version}: the engine has no parameter {name}")
        if name in seen:
            raise UserError(f"weight update {self.version}: {name} arrived twice")
        shape, dtype = self.manifest[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise UserError(
                f"weight update {self.version}: {name} arrived as {tensor.dtype} {tuple(tensor.shape)}, not {dtype} "
                f"{shape}"
            )

    def by_holder(self, everybody: Sequence[Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
        """Checksums in order of number, under what their holders are called."""
        return {self.holder.format(number): checksums for number, checksums in enumerate(everybody)}

    def check_agreement(self, everybody: Mapping[str, Mapping[str, int]]) -> None:
        """Raises UserError naming the first parameter that ``everybody``, checksums by holder, did not get alike."""
        first, *others = everybody
        for name in self.manifest:
            for other in others:
                if everybody[other][name] != everybody[first][name]:
                    raise UserError(
                        f"weight update {self.version}: {name} is not the same on {first} and {other}; a parameter "
                        "that ranks share has drifted apart, or a bucket was corrupted on its way"
                    )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.cpu().numpy())
