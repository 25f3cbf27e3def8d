"""The discriminator's side of a stage: pairs to micro-batches, scores, loss, step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import MIN_BRANCH_TOKENS, AlignConfig, StageConfig, WarmupConfig, sequences_per_pair
from prism_megatron.data.branches import BranchSequences, cut_alike
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, split_by_tokens
from prism_megatron.errors import UserError
from prism_megatron.loss.discriminator import (
    bradley_terry_loss,
    gradient_penalty,
    reference_branch_loss,
    score_regularizer,
)
from prism_megatron.loss.reduce import require_finite
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, evaluate_step, train_step
from prism_megatron.parallel.collectives import sum_over_data_parallel, sum_over_pipeline
from prism_megatron.rollout.requests import sample_seed
from prism_megatron.stages.microbatch import can_share_prompts, equal_over_ranks, pack_for_scoring, pack_microbatch
from prism_megatron.stages.setup import Trained
from prism_megatron.types import BRANCH_NAMES, PERCEPTION, REASONING, PackedBatch


@dataclass(frozen=True)
class Pair:
    """Teacher and student sequences of one branch for one prompt.

    ``owner`` names the sample. Only the paper's own loss has pairs whose student is not ``valid``. Pairs that are not
    ``fresh`` are trained on, and left out of what is measured. ``cut`` ones had a side that was too long.
    """

    teacher: TrainingSequence
    student: TrainingSequence
    owner: str
    valid: bool = True
    fresh: bool = True
    cut: bool = False

    @property
    def branch(self) -> int:
        assert self.teacher.branch is not None
        assert self.teacher.branch == self.student.branch
        return self.teacher.branch


@dataclass(frozen=True)
class PairMicrobatch:
    """Distinct sequences of some pairs packed once; ``teacher``, ``student`` [M] point into them.

    So does ``perturbed`` [M], or is None: the teachers once more, with noise on their embedded responses.
    ``weights`` [M] and ``token_share`` are parts of the global batch, so losses of micro-batches add up.
    """

    packed: PackedBatch
    teacher: Tensor
    student: Tensor
    perturbed: Tensor | None
    branch: Tensor
    valid: Tensor
    fresh: Tensor
    weights: Tensor
    owners: tuple[str, ...]
    token_share: float


@dataclass(frozen=True)
class DiscriminatorObjective:
    """The weights of the branches' losses, of the score regulariser and of the gradient penalty.

    ``penalty_std`` is that of the noise the latter is measured with; ``reference`` is the paper's own loss.
    """

    branch_weights: tuple[float, float]
    regularizer: float = 0.0
    label_smoothing: float = 0.0
    penalty: float = 0.0
    penalty_std: float = 0.0
    reference: bool = False


def branch_pairs(
    teacher: BranchSequences,
    student: BranchSequences,
    owner: str,
    config: WarmupConfig | AlignConfig,
    *,
    fresh: bool = True,
) -> list[Pair]:
    """A perception and a reasoning pair that fit a micro-batch.

    Where a side has more than ``discriminator.max_branch_tokens``, or than its prompt leaves room for beside the other,
    both are cut. Raises UserError naming the sample whose prompt leaves none.
    """
    prompt = len(teacher[0].prompt.token_ids)
    limit = config.max_tokens_per_microbatch // sequences_per_pair(config) - prompt
    if limit < MIN_BRANCH_TOKENS:
        raise UserError(
            f"{owner}: a prompt of {prompt} tokens leaves no room for a demonstration beside a response in "
            f"max_tokens_per_microbatch ({config.max_tokens_per_microbatch}); raise it, or drop the row"
        )
    limit = min(limit, config.discriminator.max_branch_tokens or limit)
    pairs = []
    for t, s in zip(teacher, student, strict=True):
        cut = max(len(t.response_ids), len(s.response_ids)) > limit
        sides = cut_alike(t, s, limit) if cut else (t, s)
        pairs.append(Pair(*sides, owner, fresh=fresh, cut=cut))
    return pairs


def score(
    discriminator: Trained,
    sequences: Sequence[TrainingSequence],
    owners: Sequence[str],
    processor: ChatProcessor,
    config: StageConfig,
) -> Tensor:
    """Score of every sequence by the current discriminator, [N] without gradient. ``owners`` names their samples.

    Raises FloatingPointError naming the sample whose score is not finite.
    """
    share_prompts = can_share_prompts(config.parallel)
    split = split_by_tokens(sequences, config.max_tokens_per_microbatch, share_prompts=share_prompts)
    groups = equal_over_ranks(split, config.parallel)
    batches = [pack_for_scoring([sequences[i] for i in group], processor, config) for group in groups]
    scores = evaluate_step(discriminator.chunks, batches, lambda chunk, batch: chunk(batch))
    values = torch.cat([_of_whole(s, batch) for s, batch in zip(scores, batches, strict=True)]).cpu()
    require_finite("score", values, owners)
    return values


def _of_whole(scores: Tensor, batch: PackedBatch) -> Tensor:
    """Without those read at the end of a prompt that others go on from."""
    return scores if batch.prefix is None else scores[batch.prefix[: len(scores)] >= 0]


def discriminator_step(
    discriminator: Trained,
    pairs: Sequence[Pair],
    processor: ChatProcessor,
    config: StageConfig,
    objective: DiscriminatorObjective,
    lr: float,
    step: int = 0,
) -> dict[str, float | None]:
    """Bradley-Terry step on the pairs of the global batch (Eq. 2), with live load balancing.

    Each branch's loss is the mean over its pairs on all ranks, times its weight. With no pair anywhere nothing is
    trained, and nothing is reported. ``step`` numbers the noise of the gradient penalty.
    """
    valid = [pair for pair in pairs if pair.valid]
    counts = [sum(pair.branch == branch for pair in valid) for branch in (PERCEPTION, REASONING)]
    current = [sum(pair.branch == branch for pair in valid if pair.fresh) for branch in (PERCEPTION, REASONING)]
    *totals, rows, cut = sum_over_data_parallel(*counts, *current, len(pairs) / 2, sum(pair.cut for pair in pairs))
    totals, fresh = totals[:2], totals[2:]
    if rows == 0:
        return {}
    hidden_size = discriminator.sizes.text["hidden_size"]
    batches = _pair_microbatches(pairs, totals, objective, processor, config, hidden_size, step)
    contexts: list[Any] = []

    def forward(chunk: Any, batch: PairMicrobatch) -> Tensor:
        scores: Tensor = chunk(batch.packed, batch.token_share)
        contexts.append(chunk.module.last_context)
        return scores

    def loss(batch: PairMicrobatch, scores: Tensor) -> tuple[Tensor, Stats]:
        teacher, student = scores[batch.teacher], scores[batch.student]
        require_finite("score of the demonstration", teacher.detach(), batch.owners)
        require_finite("score of the response", student.detach(), batch.owners)
        if objective.reference:
            value = pair_loss = _reference_loss(batch, teacher, student, rows, objective.regularizer)
        else:
            pair_loss = bradley_terry_loss(teacher, student, batch.weights, label_smoothing=objective.label_smoothing)
            value = pair_loss + objective.regularizer * score_regularizer(teacher, student, batch.weights)
        stats = {"loss": pair_loss.detach()}
        if batch.perturbed is not None:
            perturbed = scores[batch.perturbed]
            require_finite("score of the perturbed demonstration", perturbed.detach(), batch.owners)
            penalty = gradient_penalty(perturbed, teacher, batch.weights, std=objective.penalty_std)
            value = value + objective.penalty * penalty
            stats["penalty"] = penalty.detach()
        gap, level = (teacher - student).detach(), (teacher + student).detach() / 2
        for branch in (PERCEPTION, REASONING):
            mine = ((batch.branch == branch) & batch.valid & batch.fresh).float()
            stats[f"gap_{branch}"] = (gap * mine).sum()
            stats[f"level_{branch}"] = (level * mine).sum()
            # A tie is no preference: half a win.
            stats[f"wins_{branch}"] = ((gap > 0).float() * mine + 0.5 * (gap == 0).float() * mine).sum()
        return value, Stats(stats)

    total, grad_norm = train_step(discriminator.chunks, discriminator.optimizer, batches, forward, loss, lr)
    # Every stage has routers of its own; with recomputation they speak up in the backward pass.
    balance = sum(float(value) for context in contexts for value in context.load_balance)
    (balance,) = sum_over_data_parallel(sum_over_pipeline(balance))

    def mean(key: str, branch: int) -> float | None:
        return total[f"{key}_{branch}"] / fresh[branch] if fresh[branch] else None

    return {
        names.DISCRIMINATOR_LOSS: total["loss"],
        names.LOAD_BALANCE_LOSS: balance,
        names.DISCRIMINATOR_GRAD_NORM: grad_norm,
        names.DISCRIMINATOR_LEARNING_RATE: lr,
        names.PERCEPTION_GAP: mean("gap", PERCEPTION),
        names.REASONING_GAP: mean("gap", REASONING),
        names.PERCEPTION_SCORE_LEVEL: mean("level", PERCEPTION),
        names.REASONING_SCORE_LEVEL: mean("level", REASONING),
        names.PERCEPTION_PAIR_ACCURACY: mean("wins", PERCEPTION),
        names.REASONING_PAIR_ACCURACY: mean("wins", REASONING),
        names.PERCEPTION_PAIRS: fresh[PERCEPTION],
        names.REASONING_PAIRS: fresh[REASONING],
        names.REPLAYED_PAIRS: sum(totals) - sum(fresh),
        names.CUT_PAIRS: cut,
        names.GRADIENT_PENALTY: total.get("penalty"),
        **_routing_metrics(contexts, config),
    }


def _routing_metrics(contexts: Sequence[Any], config: StageConfig) -> dict[str, float | None]:
    """Which experts each branch uses and how sure its routers are, over all layers, stages and ranks."""
    stats = [stats for context in contexts for stats in context.routing]
    if not stats:
        return {}
    local = torch.stack(stats).sum(0).double().cpu()
    flat = sum_over_data_parallel(*(sum_over_pipeline(value) for value in local.flatten().tolist()))
    measured: dict[str, float | None] = {}
    for branch, name in ((PERCEPTION, names.PERCEPTION_ROUTER_ENTROPY), (REASONING, names.REASONING_ROUTER_ENTROPY)):
        *loads, entropy, tokens = torch.tensor(flat).view(local.shape)[branch].tolist()
        measured[name] = entropy / tokens if tokens else None
        for expert, load in enumerate(loads):
            measured[names.expert_load(BRANCH_NAMES[branch], expert)] = load / sum(loads) if tokens else None
    return measured


def _reference_loss(batch: PairMicrobatch, teacher: Tensor, student: Tensor, rows: float, regularizer: float) -> Tensor:
    """The paper's loss of a micro-batch: means over its own rows, weighted by its part of all ``rows``."""
    value = 0.0 * (teacher.sum() + student.sum())
    for branch in (PERCEPTION, REASONING):
        mine = batch.branch == branch
        if bool(mine.any()):
            part = reference_branch_loss(teacher[mine], student[mine], batch.valid[mine], regularizer=regularizer)
            value = value + part * (mine.sum() / rows)
    return value


def _pair_microbatches(
    pairs: Sequence[Pair],
    totals: Sequence[float],
    objective: DiscriminatorObjective,
    processor: ChatProcessor,
    config: StageConfig,
    hidden_size: int,
    step: int,
) -> list[PairMicrobatch]:
    grouped = group_pairs(pairs, config.max_tokens_per_microbatch, teachers_count=2 if objective.penalty else 1)
    groups_of_pairs = equal_over_ranks(grouped, config.parallel)
    distinct = [_distinct(group) for group in groups_of_pairs]
    # A pair of each distinct teacher, which is laid down once more, behind all others.
    again = [{id(pair.teacher): pair for pair in group} if objective.penalty else {} for group in groups_of_pairs]
    laid = [[*own, *(pair.teacher for pair in more.values())] for own, more in zip(distinct, again, strict=True)]
    (total_tokens,) = sum_over_data_parallel(float(sum(len(s) for members in laid for s in members)))
    batches = []
    for group, own, more, members in zip(groups_of_pairs, distinct, again, laid, strict=True):
        place = {id(sequence): index for index, sequence in enumerate(own)}
        packed = pack_microbatch(members, processor, config)
        perturbed = None
        if objective.penalty:
            noise = response_noise(packed, list(more.values()), hidden_size, config.run.seed, step)
            packed = replace(packed, embedding_noise=objective.penalty_std * noise)
            copy = {teacher: len(own) + index for index, teacher in enumerate(more)}
            perturbed = torch.tensor([copy[id(pair.teacher)] for pair in group], dtype=torch.long, device=noise.device)
        device = packed.tokens.device
        branches = [pair.branch for pair in group]
        batches.append(
            PairMicrobatch(
                packed=packed,
                teacher=torch.tensor([place[id(pair.teacher)] for pair in group], dtype=torch.long, device=device),
                student=torch.tensor([place[id(pair.student)] for pair in group], dtype=torch.long, device=device),
                perturbed=perturbed,
                branch=torch.tensor(branches, device=device),
                valid=torch.tensor([pair.valid for pair in group], dtype=torch.bool, device=device),
                fresh=torch.tensor([pair.fresh for pair in group], dtype=torch.bool, device=device),
                weights=torch.tensor(
                    [objective.branch_weights[b] / max(totals[b], 1.0) for b in branches], device=device
                ),
                owners=tuple(pair.owner for pair in group),
                token_share=sum(map(len, members)) / total_tokens,
            )
        )
    return batches


def response_noise(packed: PackedBatch, pairs: Sequence[Pair], hidden_size: int, seed: int, step: int) -> Tensor:
    """Standard normal where the batch's last sequences, the teachers of ``pairs``, have their responses, [T, H].

    A demonstration's noise depends on seed, step, sample and branch, and not on the batch or rank it is in.
    """
    noise = torch.zeros(len(packed.tokens), hidden_size)
    ends = packed.last_tokens.tolist()
    for pair, last in zip(pairs, ends[len(ends) - len(pairs) :], strict=True):
        generator = torch.Generator().manual_seed(sample_seed(seed, step, f"{pair.owner}/{pair.branch}"))
        length = len(pair.teacher.response_ids)
        noise[last + 1 - length : last + 1] = torch.randn(length, hidden_size, generator=generator)
    return noise.to(packed.tokens.device)


def group_pairs(pairs: Sequence[Pair], max_tokens: int, teachers_count: int) -> list[list[Pair]]:
    """Pairs in micro-batches of at most ``max_tokens`` distinct tokens: a teacher shared by pairs is laid down once.

    Or ``teachers_count`` times.
    """

    def tokens_of(pair: Pair) -> int:
        teacher = 0 if id(pair.teacher) in held else teachers_count * len(pair.teacher)
        return teacher + (0 if id(pair.student) in held else len(pair.student))

    grouped: list[list[Pair]] = []
    held: set[int] = set()
    tokens = 0
    for pair in pairs:
        new = tokens_of(pair)
        if not grouped or tokens + new > max_tokens:
            grouped.append([])
            held.clear()
            tokens, new = 0, tokens_of(pair)
            if new > max_tokens:
                raise UserError(
                    f"a pair of {new} tokens does not fit max_tokens_per_microbatch ({max_tokens}); raise it"
                )
        grouped[-1].append(pair)
        held.update((id(pair.teacher), id(pair.student)))
        tokens += new
    return grouped


def _distinct(pairs: Sequence[Pair]) -> list[TrainingSequence]:
    return list({id(s): s for pair in pairs for s in (pair.teacher, pair.student)}.values())
