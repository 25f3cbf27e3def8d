"""A weight update is whole, and alike on all ranks, or it is refused; seeds do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from prism_megatron.rollout.weight_sync import WeightSync, checksum

Bucket = list[tuple[str, Tensor]]
MANIFEST = dict.fromkeys(("a", "b", "c", "d"), ((2, 3), torch.float32))


def buckets() -> list[Bucket]:
    return [[(name, torch.full((2, 3), float(ord(name)))) for name in pair] for pair in ("ab", "cd")]


def receive(sent: Sequence[Bucket]) -> WeightSync:
    sync = WeightSync(7, MANIFEST, with_checksums=True)
    passed = list(sync.checked(pair for bucket in sent for pair in bucket))
    assert [name for name, _ in passed] == [name for bucket in sent for name, _ in bucket]
    return sync


def test_whole_update_passes_in_any_order() -> None:
    first, second = receive(buckets()), receive(buckets()[::-1])
    assert first.checksums == second.checksums
    first.check_agreement(first.by_receiver([first.checksums, second.checksums]))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (buckets()[:1], "weight update 7: 2 parameters did not arrive, first c"),
        (buckets() + buckets()[1:], "weight update 7: c arrived twice"),
        ([*buckets(), [("e", torch.ones(1))]], "weight update 7: the engine has no parameter e"),
        ([[("a", torch.ones(3, 2))]], r"a arrived as torch.float32 \(3, 2\), not torch.float32 \(2, 3\)"),
        ([[("a", torch.ones(2, 3).bfloat16())]], r"a arrived as torch.bfloat16 \(2, 3\), not torch.float32"),
    ],
    ids=["dropped bucket", "doubled bucket", "unknown", "shape", "dtype"],
)
def test_incomplete_updates_are_refused(sent: list[Bucket], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        receive(sent)


def test_a_bucket_corrupted_on_one_rank_is_refused_on_all() -> None:
    corrupted = buckets()
    corrupted[1][1][1][1, 2] += 1e-5
    ranks = [receive(sent) for sent in (buckets(), buckets(), corrupted)]
    for rank in ranks:
        with pytest.raises(ValueError, match="weight update 7: d is not the same on rank 0 and rank 2;"):
            rank.check_agreement(rank.by_receiver([other.checksums for other in ranks]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_are_of_values_in_order(dtype: torch.dtype) -> None:
    values = torch.arange(6, dtype=dtype).view(2, 3)
    assert checksum(values.T.contiguous().T) == checksum(values)
    assert checksum(values.flip(0)) != checksum(values)
