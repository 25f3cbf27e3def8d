"""The plan of an export: table order, bounded buckets, and no module in two buckets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from prism_megatron.convert.export_plan import Bucket, bucket_in_effect, export_bytes, plan_buckets
from prism_megatron.convert.rules import COLUMNS, EXPERT_DOWN, EXPERT_UP, REPLICATED, Rule

KIB = 1 << 10


def table(layers: int) -> list[Rule]:
    """A norm, a linear with a bias and two stacks of two experts each, of 1 KiB a matrix."""
    rules = []
    for i in range(layers):
        rules.append(Rule(f"{i}.norm", (f"layers.{i}.norm.weight",), ((256,),), REPLICATED))
        rules.append(Rule(f"{i}.proj", (f"layers.{i}.proj.weight",), ((16, 16),), COLUMNS))
        rules.append(Rule(f"{i}.bias", (f"layers.{i}.proj.bias",), ((256,),), REPLICATED))
        for part, layout, shape in (("up", EXPERT_UP, (2, 8, 32)), ("down", EXPERT_DOWN, (2, 16, 16))):
            rules += [Rule(f"{i}.{part}.{e}", (f"layers.{i}.experts.{part}",), (shape,), layout, e) for e in (0, 1)]
    return rules


def plan(layers: int, bucket_bytes: int) -> list[Bucket]:
    stage_and_dtype = {rule.megatron: (int(rule.megatron[0]) // 2, torch.float32) for rule in table(layers)}
    return plan_buckets(table(layers), stage_and_dtype, bucket_bytes)


@pytest.mark.parametrize("bucket_bytes", [1, 2 * KIB, 5 * KIB, 8 * KIB, 1 << 30])
def test_parts(bucket_bytes: int) -> None:
    buckets = plan(4, bucket_bytes)
    names = [unit.rules[0].hf[0] for bucket in buckets for unit in bucket.units]
    assert names == list(dict.fromkeys(name for rule in table(4) for name in rule.hf))
    modules = [[unit.module for unit in bucket.units] for bucket in buckets]
    for bucket, names_of in zip(buckets, modules, strict=True):
        assert bucket.bytes <= bucket_bytes or len(set(names_of)) == 1, "more than one module beyond the limit"
    for (one, previous), (next_one, following) in pairwise(zip(buckets, modules, strict=True)):
        assert previous[-1] != following[0], "a module is split"
        if one.stage == next_one.stage:
            first = [unit.bytes for unit in next_one.units if unit.module == following[0]]
            assert one.bytes + sum(first) > bucket_bytes, "there was room"
    assert [bucket.stage for bucket in buckets] == sorted(bucket.stage for bucket in buckets)


def test_a_stage_has_parts_of_its_own() -> None:
    assert len(plan(4, 1 << 30)) == 2


@pytest.mark.parametrize(("bucket_bytes", "peak"), [(2 * KIB, 4 + 1 + 4), (16 * KIB, 8 + 7 + 4), (1 << 30, 4 * 7 + 4)])
def test_the_peak_is_two_buckets_and_a_module(bucket_bytes: int, peak: int) -> None:
    """A layer's four expert matrices are one module; the bucket after them is a norm if nothing larger fits."""
    assert export_bytes(table(4), 4, bucket_bytes) == (peak * KIB, 4 * KIB)


@pytest.mark.parametrize("bucket_bytes", [2 * KIB, 7 * KIB, 8 * KIB, 9 * KIB, 16 * KIB, 40 * KIB])
def test_export_and_engine_take_two_buckets_at_most(bucket_bytes: int) -> None:
    """The engine stores a module until it is complete; four experts of 1 KiB are one."""
    peak, module = export_bytes(table(4), 4, bucket_bytes)
    bucket = bucket_in_effect(bucket_bytes, module)
    assert bucket == max(bucket_bytes, 8 * KIB)
    assert peak + module <= 2 * bucket
