"""Pairs of a demonstration's and a response's sequence, which the discriminator compares (spec 3.3, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config import MIN_BRANCH_TOKENS, AlignConfig, WarmupConfig, sequences_per_pair
from prism_megatron.data.branches import BranchSequences, branch_sequences, cut_alike
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.samples import Sample
from prism_megatron.data.seeds import sample_seed
from prism_megatron.errors import UserError
from prism_megatron.types import PackedBatch


@dataclass(frozen=True)
class Pair:
    """Teacher and student sequences of one branch for one prompt.

    Pairs that are not ``valid`` (a student outside the grammar) occur with compat=reference only. Pairs that are not
    ``is_on_policy`` come from the replay buffer: they are trained on but left out of the metrics. ``cut`` pairs were
    truncated because a side was too long.
    """

    teacher: TrainingSequence
    student: TrainingSequence
    sample_id: str
    valid: bool = True
    is_on_policy: bool = True
    cut: bool = False

    @property
    def branch(self) -> int:
        assert self.teacher.branch is not None
        assert self.teacher.branch == self.student.branch
        return self.teacher.branch


def split_samples(
    samples: Sequence[Sample], processor: ChatProcessor, config: AlignConfig
) -> tuple[list[TrainingSequence], list[Pair]]:
    """Split the responses inside the grammar into branches, and pair these with the demonstrations'.

    Returns:
        Both branches of every such response, never truncated, and a pair of each with its prompt's demonstration.
    """
    teachers: dict[int, BranchSequences] = {}
    students: list[TrainingSequence] = []
    pairs: list[Pair] = []
    for sample in samples:
        row, response = sample.example, sample.response
        if response is None:
            continue
        if sample.group not in teachers:
            assert row.teacher_caption is not None
            assert row.teacher_reasoning is not None
            teachers[sample.group] = branch_sequences(
                processor, sample.prompt, row.teacher_caption, row.teacher_reasoning
            )
        student = branch_sequences(processor, sample.prompt, response.caption_block, response.reasoning_block)
        students += student
        pairs += branch_pairs(teachers[sample.group], student, row.id, config)
    return students, pairs


def branch_pairs(
    teacher: BranchSequences,
    student: BranchSequences,
    sample_id: str,
    config: WarmupConfig | AlignConfig,
    *,
    is_on_policy: bool = True,
) -> list[Pair]:
    """Return a perception and a reasoning pair that each fit a micro-batch.

    Args:
        teacher: The demonstration's perception and reasoning sequences.
        student: The response's.
        sample_id: Names the sample in errors.
        config: If either side exceeds its ``discriminator.max_branch_tokens``, or the room that the prompt leaves in a
            micro-batch, both sides are truncated to the same length.
        is_on_policy: False for responses of the replay buffer.

    Raises:
        UserError: The prompt leaves no room in a micro-batch.
    """
    prompt = len(teacher[0].prompt.token_ids)
    limit = config.max_tokens_per_microbatch // sequences_per_pair(config) - prompt
    if limit < MIN_BRANCH_TOKENS:
        raise UserError(
            f"{sample_id}: a prompt of {prompt} tokens leaves no room for a demonstration and a response in "
            f"max_tokens_per_microbatch ({config.max_tokens_per_microbatch}); raise it, or drop the row"
        )
    limit = min(limit, config.discriminator.max_branch_tokens or limit)
    pairs = []
    for t, s in zip(teacher, student, strict=True):
        cut = max(len(t.response_ids), len(s.response_ids)) > limit
        sides = cut_alike(t, s, limit) if cut else (t, s)
        pairs.append(Pair(*sides, sample_id, is_on_policy=is_on_policy, cut=cut))
    return pairs


def group_pairs(pairs: Sequence[Pair], max_tokens: int, teacher_copies: int) -> list[list[Pair]]:
    """Split pairs into groups of at most ``max_tokens`` distinct tokens, order kept.

    A sequence shared by several pairs of a group counts once, a teacher ``teacher_copies`` times. Raises UserError for
    a pair that does not fit on its own.
    """
    groups: list[list[Pair]] = []
    packed: set[int] = set()
    tokens = 0

    def added_tokens(pair: Pair) -> int:
        teacher = 0 if id(pair.teacher) in packed else teacher_copies * len(pair.teacher)
        return teacher + (0 if id(pair.student) in packed else len(pair.student))

    for pair in pairs:
        added = added_tokens(pair)
        if not groups or tokens + added > max_tokens:
            groups.append([])
            packed.clear()
            tokens, added = 0, added_tokens(pair)
            if added > max_tokens:
                raise UserError(
                    f"a pair of {added} tokens does not fit max_tokens_per_microbatch ({max_tokens}); raise it"
                )
        groups[-1].append(pair)
        packed.update((id(pair.teacher), id(pair.student)))
        tokens += added
    return groups


def distinct_sequences(pairs: Sequence[Pair]) -> list[TrainingSequence]:
    """Teachers and students of ``pairs``, each distinct sequence once, in the order they first occur."""
    return list({id(s): s for pair in pairs for s in (pair.teacher, pair.student)}.values())


def response_noise(packed: PackedBatch, pairs: Sequence[Pair], hidden_size: int, seed: int, step: int) -> Tensor:
    """Draw standard normal noise for the embedded responses of some teachers.

    The noise of a teacher depends on seed, step, sample and branch only, not on its batch or rank.

    Args:
        packed: A batch whose last sequences are the teachers of ``pairs``, in this order.
        pairs: One pair of each teacher.
        hidden_size: H.
        seed: The run's seed.
        step: The step of the discriminator.

    Returns:
        [T, H], zero but at the teachers' responses.
    """
    noise = torch.zeros(len(packed.tokens), hidden_size)
    ends = packed.last_tokens.tolist()
    for pair, last in zip(pairs, ends[len(ends) - len(pairs) :], strict=True):
        generator = torch.Generator().manual_seed(sample_seed(seed, step, f"{pair.sample_id}/{pair.branch}"))
        length = len(pair.teacher.response_ids)
        noise[last + 1 - length : last + 1] = torch.randn(length, hidden_size, generator=generator)
    return noise.to(packed.tokens.device)
