"""Lays out an iteration's sequences as packed micro-batches that every parallel layout can run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config import ModelConfig, ParallelConfig, PolicyGradientConfig, TrainingConfig
from prism_megatron.data.pack import Padding, TrainingSequence, pack, pack_shared, split_by_tokens
from prism_megatron.data.pairs import Pair, distinct_sequences, group_pairs
from prism_megatron.data.samples import Sample
from prism_megatron.loss.reduce import BatchTotals, TokenWeights, sequence_mean, token_mean
from prism_megatron.method import METHODS
from prism_megatron.model.fp8 import token_alignment
from prism_megatron.observe.flops import Workload
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import max_over_data_parallel, sum_over_data_parallel
from prism_megatron.types import PERCEPTION, REASONING, InputSpec, PackedBatch

BRANCHES = (PERCEPTION, REASONING)


@dataclass(frozen=True)
class SequenceMicrobatch:
    """A packed micro-batch with the loss weight of each token, ``weights`` [T], and the sample id of each sequence.

    ``token_share`` is the micro-batch's fraction of the global batch's tokens.
    """

    packed: PackedBatch
    token_share: float
    sample_ids: tuple[str, ...]
    weights: Tensor


@dataclass(frozen=True)
class PolicyMicrobatch(SequenceMicrobatch):
    """A micro-batch of sampled responses; tensors are [T].

    ``is_on_policy`` is 1 for tokens sampled by the current policy, 0 for prompts and for tokens of an older one.
    ``old_logprobs`` is None while the policy has not been updated since it sampled. ``temperature`` is the sampling
    temperature.
    """

    advantages: Tensor
    rollout_logprobs: Tensor
    is_on_policy: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class PairMicrobatch:
    """Distinct sequences of some pairs, packed once; all tensors are [M], one entry per pair.

    ``teacher`` and ``student`` index the packed sequences. ``perturbed`` indexes second copies of the teachers, the
    last sequences, which get noise on their embedded responses; the copies are those of the pairs in ``repeated``, in
    this order. Both are None without a gradient penalty. ``weights`` and ``token_share`` are fractions of the global
    batch, so that losses of micro-batches add up.
    """

    packed: PackedBatch
    teacher: Tensor
    student: Tensor
    perturbed: Tensor | None
    repeated: tuple[Pair, ...] | None
    branch: Tensor
    valid: Tensor
    is_on_policy: Tensor
    weights: Tensor
    sample_ids: tuple[str, ...]
    token_share: float


@dataclass(frozen=True)
class PairBatch:
    """This rank's micro-batches of a global batch of pairs, and the number of pairs over all ranks.

    ``valid`` and ``on_policy`` count valid pairs of the perception and of the reasoning branch, ``rows`` the responses
    (two pairs each), ``cut`` the truncated pairs. Without a pair on any rank there are no micro-batches.
    """

    microbatches: list[PairMicrobatch]
    valid: Sequence[float]
    on_policy: Sequence[float]
    rows: float
    cut: float


class Batcher:
    """Splits sequences into micro-batches of at most ``max_tokens`` tokens and packs them for one parallel layout.

    All methods but :meth:`pack` are collective: every data-parallel rank gets the same number of micro-batches, empty
    ones included.
    """

    def __init__(self, input_spec: InputSpec, parallel: ParallelConfig, model: ModelConfig, max_tokens: int) -> None:
        self._input_spec, self._parallel, self._max_tokens = input_spec, parallel, max_tokens
        self._padding = padding_for(parallel, model)

    @classmethod
    def from_config(cls, input_spec: InputSpec, config: TrainingConfig) -> Batcher:
        return cls(input_spec, config.parallel, config.model, config.max_tokens_per_microbatch)

    def pack(self, sequences: Sequence[TrainingSequence]) -> PackedBatch:
        """Pack ``sequences`` into one batch on this rank's device; without any, a batch of padding."""
        return pack(sequences, self._input_spec, self._padding).to(groups.device())

    def one_per_sequence(self, sequences: Sequence[TrainingSequence]) -> list[PackedBatch]:
        """Pack every sequence into a micro-batch of its own."""
        return [self.pack(members) for members in equal_over_ranks([[s] for s in sequences], self._parallel)]

    def sft(self, sequences: Sequence[TrainingSequence], sample_ids: Sequence[str]) -> list[SequenceMicrobatch]:
        """Lay out demonstrations, their loss averaged over all trained tokens of the global batch."""
        return [batch for _, batch in self._weighted(sequences, sample_ids, token_mean)]

    def policy(
        self, samples: Sequence[Sample], advantages: Sequence[float], config: PolicyGradientConfig, version: int
    ) -> list[list[PolicyMicrobatch]]:
        """Lay out sampled responses: the micro-batches of every mini-batch.

        Args:
            samples: This rank's responses.
            advantages: The advantage of each sample.
            config: Gives the number of mini-batches, the sampling temperature and how the loss is averaged.
            version: The current policy's version; samples of another one are off-policy.
        """
        sequences, sample_ids = [s.sequence() for s in samples], [s.example.id for s in samples]
        weights = policy_token_weights(config)
        batches: list[list[PolicyMicrobatch]] = []
        for part in mini_batches([sample.group for sample in samples], config.mini_batches_per_iteration):
            batches.append([])
            weighted = self._weighted([sequences[i] for i in part], [sample_ids[i] for i in part], weights)
            for indices, batch in weighted:
                members, packed = [part[i] for i in indices], batch.packed
                current = [float(samples[i].rollout.policy_version == version) for i in members]
                microbatch = PolicyMicrobatch(
                    **vars(batch),
                    advantages=_repeat_per_token([advantages[i] for i in members], packed),
                    rollout_logprobs=_at_targets([samples[i].rollout.logprobs for i in members], packed),
                    is_on_policy=packed.loss_mask * _repeat_per_token(current, packed),
                    temperature=config.rollout.temperature,
                )
                batches[-1].append(microbatch)
        return batches

    def pairs(
        self, pairs: Sequence[Pair], branch_weights: tuple[float, float], *, repeat_teachers: bool = False
    ) -> PairBatch:
        """Lay out pairs; each branch's weights add up to its branch weight over the valid pairs of all ranks.

        With ``repeat_teachers`` every micro-batch ends in second copies of its teachers.
        """
        valid = [pair for pair in pairs if pair.valid]
        counts = [sum(pair.branch == branch for pair in valid) for branch in BRANCHES]
        on_policy = [sum(pair.branch == branch for pair in valid if pair.is_on_policy) for branch in BRANCHES]
        totals = sum_over_data_parallel(*counts, *on_policy, len(pairs) / 2, sum(pair.cut for pair in pairs))
        batch = PairBatch([], totals[:2], totals[2:4], *totals[4:])
        if batch.rows == 0:
            return batch
        weights = [weight / max(count, 1.0) for weight, count in zip(branch_weights, batch.valid, strict=True)]
        split = group_pairs(pairs, self._max_tokens, teacher_copies=2 if repeat_teachers else 1)
        grouped = equal_over_ranks(split, self._parallel)
        copies = [tuple({id(p.teacher): p for p in group}.values()) if repeat_teachers else None for group in grouped]
        tokens = [
            sum(map(len, distinct_sequences(group))) + sum(len(pair.teacher) for pair in repeated or ())
            for group, repeated in zip(grouped, copies, strict=True)
        ]
        (total,) = sum_over_data_parallel(float(sum(tokens)))
        for group, repeated, count in zip(grouped, copies, tokens, strict=True):
            batch.microbatches.append(self._paired(group, repeated, weights, count / total))
        return batch

    def scoring(self, sequences: Sequence[TrainingSequence]) -> list[PackedBatch]:
        """Lay out sequences that are scored without gradient; a prompt shared within a branch is computed once.

        Prompts are shared only where the attention supports it: on a CPU, without context parallelism.
        """
        share = groups.device().type == "cpu" and self._parallel.context_parallel_size == 1
        split = split_by_tokens(sequences, self._max_tokens, share_prompts=share)
        batches = []
        for indices in equal_over_ranks(split, self._parallel):
            members = [sequences[i] for i in indices]
            if share and len({(id(s.prompt), s.branch) for s in members}) < len(members):
                batches.append(pack_shared(members, self._input_spec, self._padding).to(groups.device()))
            else:
                batches.append(self.pack(members))
        return batches

    def _weighted(
        self, sequences: Sequence[TrainingSequence], sample_ids: Sequence[str], token_weights: TokenWeights
    ) -> Iterator[tuple[list[int], SequenceMicrobatch]]:
        """Yield micro-batches and the indices of their sequences, tokens weighted by their share of the global loss."""
        trained, count, tokens = sum_over_data_parallel(
            float(sum(s.num_loss_tokens for s in sequences)), len(sequences), sum(map(len, sequences))
        )
        for indices in equal_over_ranks(split_by_tokens(sequences, self._max_tokens), self._parallel):
            members = [sequences[i] for i in indices]
            packed = self.pack(members)
            weights = token_weights(packed.loss_mask, packed.sequence_ids, BatchTotals(trained, count))
            share = sum(map(len, members)) / max(tokens, 1.0)
            yield indices, SequenceMicrobatch(packed, share, tuple(sample_ids[i] for i in indices), weights)

    def _paired(
        self, pairs: Sequence[Pair], repeated: tuple[Pair, ...] | None, weights: Sequence[float], token_share: float
    ) -> PairMicrobatch:
        distinct = distinct_sequences(pairs)
        packed = self.pack([*distinct, *(pair.teacher for pair in repeated or ())])
        position = {id(sequence): index for index, sequence in enumerate(distinct)}
        copy = {id(pair.teacher): len(distinct) + index for index, pair in enumerate(repeated or ())}

        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=packed.tokens.device)

        perturbed = None if repeated is None else tensor([copy[id(pair.teacher)] for pair in pairs], torch.long)

        return PairMicrobatch(
            packed=packed,
            teacher=tensor([position[id(pair.teacher)] for pair in pairs], torch.long),
            student=tensor([position[id(pair.student)] for pair in pairs], torch.long),
            perturbed=perturbed,
            repeated=repeated,
            branch=tensor([pair.branch for pair in pairs], torch.long),
            valid=tensor([pair.valid for pair in pairs], torch.bool),
            is_on_policy=tensor([pair.is_on_policy for pair in pairs], torch.bool),
            weights=tensor([weights[pair.branch] for pair in pairs], torch.float32),
            sample_ids=tuple(pair.sample_id for pair in pairs),
            token_share=token_share,
        )


def policy_token_weights(config: PolicyGradientConfig) -> TokenWeights:
    """Return how the policy loss is averaged: GSPO over sequences, GRPO and DAPO over tokens (spec 4.6, 5.2)."""
    return sequence_mean if config.algorithm == "gspo" else METHODS[config.compat].token_mean


def mini_batches(groups: Sequence[int], count: int) -> list[list[int]]:
    """Deal out samples, given the prompt group of each, so that every mini-batch has as many of each group.

    Returns the samples' indices. The result does not depend on which rank a group is on.
    """
    seen: dict[int, int] = defaultdict(int)
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        parts[seen[group] % count].append(index)
        seen[group] += 1
    return parts


def padding_for(parallel: ParallelConfig, model: ModelConfig) -> Padding:
    """Return the padding that makes sequences and batches divisible for the parallel layout and for FP8.

    Context parallelism cuts each sequence into two chunks a rank, sequence parallelism the whole batch; each rank's
    part must be whole FP8 blocks.
    """
    context = parallel.context_parallel_size
    chunks = 2 * context if context > 1 else 1
    part = math.lcm(chunks, context * token_alignment(model))
    return Padding(chunks, part * parallel.tensor_model_parallel_size)


def equal_over_ranks[Item](microbatches: list[list[Item]], parallel: ParallelConfig) -> list[list[Item]]:
    """Append empty micro-batches until every data-parallel rank has the same number. Collective.

    Experts are exchanged between data-parallel ranks in every micro-batch, and an interleaved schedule needs a multiple
    of the pipeline size: a rank with fewer micro-batches would leave the others waiting.
    """
    count = max(int(max_over_data_parallel(len(microbatches))), 1)
    if parallel.virtual_pipeline_model_parallel_size > 1:
        count += -count % parallel.pipeline_model_parallel_size
    return microbatches + [[] for _ in range(count - len(microbatches))]


def total_tokens(sequences: Sequence[TrainingSequence]) -> float:
    """Tokens of ``sequences`` over all data-parallel ranks. Collective."""
    return sum_over_data_parallel(sum(map(len, sequences)))[0]


def workload(sequences: Sequence[TrainingSequence]) -> Workload:
    """Return what one pass over ``sequences`` computes on; an image shown by several sequences counts once."""
    visuals = {id(visual): visual for sequence in sequences for visual in sequence.prompt.visuals}
    frames = [height * width for time, height, width in (v.grid for v in visuals.values()) for _ in range(time)]
    return Workload([len(s) for s in sequences], frames, sum(s.num_loss_tokens for s in sequences))


def _repeat_per_token(values: Sequence[float], packed: PackedBatch) -> Tensor:
    """Repeat each sequence's value over its tokens, [T]; padding may be a last sequence of its own, with value 0."""
    return torch.tensor([*values, 0.0], device=packed.tokens.device)[packed.sequence_ids]


def _at_targets(values: Sequence[Sequence[float]], packed: PackedBatch) -> Tensor:
    """Place each sequence's values of its response tokens where these are predicted, [T]; 0 elsewhere."""
    placed = torch.zeros_like(packed.loss_mask)
    placed[packed.loss_mask.bool()] = torch.tensor([v for row in values for v in row], device=placed.device)
    return placed
