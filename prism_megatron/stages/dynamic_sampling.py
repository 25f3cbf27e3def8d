"""Sampling of an iteration's prompt groups for RLVR, with DAPO's replacement of groups without a signal (spec 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from prism_megatron.advantage import informative_groups
from prism_megatron.config import RLVRConfig
from prism_megatron.data.lazy import positions_by_id
from prism_megatron.data.loader import batch_indices, further_indices, shard_for_rank
from prism_megatron.data.response import Response
from prism_megatron.data.samples import Sample
from prism_megatron.errors import UserError
from prism_megatron.parallel import groups as ranks
from prism_megatron.parallel.collectives import gather_over_data_parallel
from prism_megatron.stages.rollouts import Sampler
from prism_megatron.types import EncodedPrompt, Example, Rollout

LeftoverGroup = tuple[str, list[dict[str, Any]]]  # a row's id and its rollouts as plain data, for checkpoints


@dataclass(frozen=True)
class RolloutBatch:
    """This rank's ``samples`` to train on, and all samples that it ``generated`` to find them.

    ``leftover_groups`` were sampled but not needed, and are the same on every rank; the next iteration trains on them
    first. ``reused_groups`` counts the groups of all ranks that earlier iterations had left over.
    """

    samples: list[Sample]
    generated: list[Sample]
    leftover_groups: list[LeftoverGroup]
    reused_groups: int = 0


class Candidate(NamedTuple):
    """A sample as ranks exchange it; ``row`` is the index of its prompt in the file, which every rank has read."""

    group: int
    row: int
    rollout: Rollout
    response: Response | None
    correct: bool

    @classmethod
    def from_sample(cls, sample: Sample, row: int) -> Candidate:
        return cls(sample.group, row, sample.rollout, sample.response, sample.correct)


def sample_groups(
    sampler: Sampler,
    rows: Sequence[Example],
    leftover_groups: Sequence[LeftoverGroup],
    config: RLVRConfig,
    iteration: int,
) -> RolloutBatch:
    """Sample the prompt groups of an iteration. Collective.

    DAPO replaces groups whose answers are all right or all wrong by groups of other prompts. Leftover groups come
    first; then each round samples ``oversampling`` prompts for every missing group. Groups beyond
    ``prompts_per_iteration`` are left over in turn. If ``max_sampling_rounds`` is reached, the stage trains on the
    groups found so far.

    Args:
        sampler: Samples and judges responses.
        rows: All rows of the data set.
        leftover_groups: Groups that earlier iterations did not need.
        config: The stage's configuration.
        iteration: Counts from 0. Prompts and their order depend on it and the seed only.

    Returns:
        The samples to train on and what is left over.
    """
    order = batch_indices(len(rows), config.prompts_per_iteration, iteration, config.run.seed)
    if config.algorithm != "dapo":
        samples, _ = _sample_rows(sampler, rows, order, 0, iteration)
        return RolloutBatch(samples, samples, [])
    order = order + further_indices(len(rows), order, iteration, config.run.seed)
    candidates = restore_leftovers(leftover_groups, rows, sampler)
    generated: list[Sample] = []
    prompts: dict[int, EncodedPrompt] = {}
    tried = 0
    for _ in range(config.max_sampling_rounds):
        missing = config.prompts_per_iteration - len({candidate.group for candidate in candidates})
        drawn = order[tried : tried + math.ceil(max(missing, 0) * config.oversampling)]
        if not drawn:
            break
        samples, row_of_group = _sample_rows(sampler, rows, drawn, tried, iteration)
        tried += len(drawn)
        generated += samples
        prompts |= {row_of_group[sample.group]: sample.prompt for sample in samples}
        found = [Candidate.from_sample(sample, row_of_group[sample.group]) for sample in _informative(samples)]
        candidates += gather_over_data_parallel(found)
    if not candidates:
        raise UserError(
            f"of {tried} prompts none has responses with different rewards; choose prompts that the policy solves "
            "sometimes (the collect stage does), raise rollout.samples_per_prompt, or max_sampling_rounds"
        )
    numbers = sorted({candidate.group for candidate in candidates})
    trained, left = numbers[: config.prompts_per_iteration], numbers[config.prompts_per_iteration :]
    local_groups = _local(trained)
    return RolloutBatch(
        _as_samples([c for c in candidates if c.group in local_groups], rows, sampler, prompts),
        generated,
        [_as_leftover([c for c in candidates if c.group == group], rows) for group in left],
        sum(group < 0 for group in trained),
    )


def _sample_rows(
    sampler: Sampler, rows: Sequence[Example], indices: list[int], first_group: int, iteration: int
) -> tuple[list[Sample], dict[int, int]]:
    """Sample this rank's part of ``indices``; groups are numbered from ``first_group`` over all ranks.

    Returns the samples and the row index of each of their groups.
    """
    local = _local(indices)
    first = first_group + len(indices) * ranks.data_parallel_rank() // ranks.data_parallel_size()
    samples = sampler.sample([rows[i] for i in local], iteration)
    return [replace(sample, group=first + sample.group) for sample in samples], dict(enumerate(local, first))


def restore_leftovers(
    leftover_groups: Sequence[LeftoverGroup], rows: Sequence[Example], sampler: Sampler
) -> list[Candidate]:
    """Judge leftover groups again; their group numbers are below 0, so that the oldest are trained on first."""
    indices = positions_by_id(rows, [row_id for row_id, _ in leftover_groups])
    candidates = []
    for group, (row_id, rollouts) in enumerate(leftover_groups, -len(leftover_groups)):
        index = indices[row_id]
        for fields in rollouts:
            rollout = Rollout(**fields)
            response, correct = sampler.judge(rollout, rows[index], sampler.processor)
            candidates.append(Candidate(group, index, rollout, response, correct))
    return candidates


def _local(items: list[int]) -> list[int]:
    """Return this data-parallel rank's part of ``items``."""
    return shard_for_rank(items, ranks.data_parallel_rank(), ranks.data_parallel_size())


def _as_leftover(candidates: Sequence[Candidate], rows: Sequence[Example]) -> LeftoverGroup:
    return rows[candidates[0].row].id, [vars(candidate.rollout) for candidate in candidates]


def _as_samples(
    candidates: Sequence[Candidate],
    rows: Sequence[Example],
    sampler: Sampler,
    prompts: Mapping[int, EncodedPrompt],
) -> list[Sample]:
    """Make samples to train on; ``prompts`` are the prompts already encoded on this rank, by row."""
    others = list(dict.fromkeys(candidate.row for candidate in candidates if candidate.row not in prompts))
    encoded = sampler.processor.encode_prompts([rows[row] for row in others]) if others else []
    prompts = {**prompts, **dict(zip(others, encoded, strict=True))}
    return [Sample(rows[c.row], prompts[c.row], c.rollout, c.response, c.correct, c.group) for c in candidates]


def _informative(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of groups with both right and wrong answers, as the released code filters (spec 5.2)."""
    if not samples:
        return []
    correct = torch.tensor([float(sample.correct) for sample in samples])
    useful = informative_groups(correct, torch.tensor([sample.group for sample in samples]))
    return [sample for sample, keep in zip(samples, useful.tolist(), strict=True) if keep]
