"""Checks of a weight update: every parameter arrives once, with its shape and dtype, and equal on every rank."""

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
    """One replacement of all weights, on one rank.

    Attributes:
        version: number of the update.
        manifest: shape and dtype of every parameter.
        with_checksums: compute ``checksums`` while tensors pass, at the cost of one pass over the bytes.
        checksums: of the tensors so far, by HF name.
        receiver: format string for the numbered receivers of weights in errors, such as "rank {}".
    """

    version: int
    manifest: Manifest
    with_checksums: bool = False
    checksums: dict[str, int] = field(default_factory=dict)
    receiver: str = "rank {}"

    def checked(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of an update.

        Raises UserError for a tensor that is unknown, repeated or of another shape or dtype, and at the end if any is
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

    def by_receiver(self, checksums: Sequence[Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
        """Checksums under the names of their receivers, which are numbered in this order."""
        return {self.receiver.format(number): of_one for number, of_one in enumerate(checksums)}

    def check_agreement(self, received: Mapping[str, Mapping[str, int]]) -> None:
        """Raise UserError naming the first parameter with different checksums in ``received``, by receiver."""
        first, *others = received
        for name in self.manifest:
            for other in others:
                if received[other][name] != received[first][name]:
                    raise UserError(
                        f"weight update {self.version}: {name} is not the same on {first} and {other}; a parameter "
                        "replicated over ranks has diverged, or a bucket was corrupted during the transfer"
                    )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.cpu().numpy())
