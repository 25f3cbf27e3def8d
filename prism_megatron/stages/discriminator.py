"""The discriminator's side of a stage: pairs to micro-batches, scores, loss, step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import StageConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, pack, split_by_tokens
from prism_megatron.loss.discriminator import bradley_terry_loss, score_regularizer
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, evaluate_step, train_step
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.stages.setup import Trained
from prism_megatron.types import PERCEPTION, REASONING, PackedBatch


@dataclass(frozen=True)
class Pair:
    """Teacher and student sequences of one branch for one prompt."""

    teacher: TrainingSequence
    student: TrainingSequence

    @property
    def branch(self) -> int:
        assert self.teacher.branch is not None
        assert self.teacher.branch == self.student.branch
        return self.teacher.branch


@dataclass(frozen=True)
class PairMicrobatch:
    """Distinct sequences of some pairs packed once; ``teacher``, ``student`` [M] point into them.

    ``weights`` [M] and ``token_share`` are parts of the global batch, so losses of micro-batches add up.
    """

    packed: PackedBatch
    teacher: Tensor
    student: Tensor
    branch: Tensor
    weights: Tensor
    token_share: float


def score(
    discriminator: Trained, sequences: Sequence[TrainingSequence], processor: ChatProcessor, config: StageConfig
) -> list[float]:
    """Score of every sequence by the current discriminator, without gradient."""
    if not sequences:
        return []
    batches = []
    for group in split_by_tokens(sequences, config.max_tokens_per_microbatch):
        batches.append(_pack([sequences[i] for i in group], processor, config))
    scores = evaluate_step(discriminator.model, batches, lambda model, batch: model(batch))
    return [float(value) for value in torch.cat(scores)]


def discriminator_step(
    discriminator: Trained,
    pairs: Sequence[Pair],
    processor: ChatProcessor,
    config: StageConfig,
    *,
    branch_weights: tuple[float, float],
    regularizer: float,
    lr: float,
) -> dict[str, float | None]:
    """Bradley-Terry step on the pairs of the global batch (Eq. 2), with live load balancing.

    Each branch's loss is the mean over its pairs on all ranks, times its weight. With no pair anywhere nothing is
    trained, and nothing is reported.
    """
    counts = [float(sum(pair.branch == branch for pair in pairs)) for branch in (PERCEPTION, REASONING)]
    totals = sum_over_data_parallel(*counts)
    if sum(totals) == 0:
        return {}
    batches = _pair_microbatches(pairs, totals, branch_weights, processor, config)
    module = discriminator.model.module

    def forward(model: Any, batch: PairMicrobatch) -> Tensor:
        scores: Tensor = model(batch.packed, batch.token_share)
        return scores

    def loss(batch: PairMicrobatch, scores: Tensor) -> tuple[Tensor, Stats]:
        teacher, student = scores[batch.teacher], scores[batch.student]
        pair_loss = bradley_terry_loss(teacher, student, batch.weights)
        value = pair_loss + regularizer * score_regularizer(teacher, student, batch.weights)
        gap = (teacher - student).detach()
        stats = {"loss": pair_loss.detach(), "balance": module.load_balance_loss}
        for branch in (PERCEPTION, REASONING):
            mine = (batch.branch == branch).float()
            stats[f"gap_{branch}"] = (gap * mine).sum()
            # A tie is no preference: half a win.
            stats[f"wins_{branch}"] = ((gap > 0).float() * mine + 0.5 * (gap == 0).float() * mine).sum()
        return value, stats

    sums, grad_norm = train_step(discriminator.model, discriminator.optimizer, batches, forward, loss, lr)
    keys = ("loss", "balance", "gap_0", "gap_1", "wins_0", "wins_1")
    total = dict(zip(keys, sum_over_data_parallel(*(float(sums[key]) for key in keys)), strict=True))

    def mean(key: str, branch: int) -> float | None:
        return total[f"{key}_{branch}"] / totals[branch] if totals[branch] else None

    return {
        names.DISCRIMINATOR_LOSS: total["loss"],
        names.LOAD_BALANCE_LOSS: total["balance"],
        names.DISCRIMINATOR_GRAD_NORM: grad_norm,
        names.DISCRIMINATOR_LEARNING_RATE: lr,
        names.PERCEPTION_GAP: mean("gap", PERCEPTION),
        names.REASONING_GAP: mean("gap", REASONING),
        names.PERCEPTION_PAIR_ACCURACY: mean("wins", PERCEPTION),
        names.REASONING_PAIR_ACCURACY: mean("wins", REASONING),
    }


def _pair_microbatches(
    pairs: Sequence[Pair],
    totals: Sequence[float],
    branch_weights: tuple[float, float],
    processor: ChatProcessor,
    config: StageConfig,
) -> list[PairMicrobatch]:
    groups_of_pairs = _group_pairs(pairs, config.max_tokens_per_microbatch)
    distinct = [_distinct(group) for group in groups_of_pairs]
    (total_tokens,) = sum_over_data_parallel(float(sum(len(s) for members in distinct for s in members)))
    batches = []
    for group, members in zip(groups_of_pairs, distinct, strict=True):
        place = {id(sequence): index for index, sequence in enumerate(members)}
        packed = _pack(members, processor, config)
        device = packed.tokens.device
        branches = [pair.branch for pair in group]
        batches.append(
            PairMicrobatch(
                packed=packed,
                teacher=torch.tensor([place[id(pair.teacher)] for pair in group], device=device),
                student=torch.tensor([place[id(pair.student)] for pair in group], device=device),
                branch=torch.tensor(branches, device=device),
                weights=torch.tensor([branch_weights[b] / totals[b] for b in branches], device=device),
                token_share=sum(len(s) for s in members) / total_tokens,
            )
        )
    return batches


def _group_pairs(pairs: Sequence[Pair], max_tokens: int) -> list[list[Pair]]:
    """Pairs in micro-batches of at most ``max_tokens`` distinct tokens: a teacher shared by pairs is counted once."""
    grouped: list[list[Pair]] = []
    held: set[int] = set()
    tokens = 0
    for pair in pairs:
        new = sum(len(s) for s in (pair.teacher, pair.student) if id(s) not in held)
        if not grouped or tokens + new > max_tokens:
            grouped.append([])
            held.clear()
            tokens, new = 0, len(pair.teacher) + len(pair.student)
            if new > max_tokens:
                raise ValueError(
                    f"a pair of {new} tokens does not fit max_tokens_per_microbatch ({max_tokens}); raise it"
                )
        grouped[-1].append(pair)
        held.update((id(pair.teacher), id(pair.student)))
        tokens += new
    return grouped


def _distinct(pairs: Sequence[Pair]) -> list[TrainingSequence]:
    return list({id(s): s for pair in pairs for s in (pair.teacher, pair.student)}.values())


def _pack(sequences: Sequence[TrainingSequence], processor: ChatProcessor, config: StageConfig) -> PackedBatch:
    return pack(
        sequences,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
        pad_to_multiple=config.parallel.tensor_model_parallel_size,
    ).to(groups.device())
