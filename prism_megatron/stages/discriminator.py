"""Scoring sequences with the discriminator, and its training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_megatron.data.pairs import response_noise
from prism_megatron.loss.discriminator import PairLoss, PairLossConfig, PairScores, gradient_penalty, pair_loss
from prism_megatron.loss.reduce import require_finite
from prism_megatron.model.router_stats import RouterStats
from prism_megatron.observe import metrics as names
from prism_megatron.optim.step import Stats, evaluate_step, train_step
from prism_megatron.stages.batcher import PairBatch, PairMicrobatch
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.types import BRANCH_NAMES, PERCEPTION, REASONING, PackedBatch


@dataclass(frozen=True)
class DiscriminatorObjective:
    """Weights of the branches' losses, the loss on pairs, and the weight of the gradient penalty.

    ``penalty_std`` and ``noise_seed`` are those of the gradient penalty's noise.
    """

    branch_weights: tuple[float, float]
    pair_loss: PairLoss = pair_loss
    pair_loss_config: PairLossConfig = field(default_factory=PairLossConfig)
    penalty: float = 0.0
    penalty_std: float = 0.0
    noise_seed: int = 0


def score(discriminator: TrainableModel, batches: Sequence[PackedBatch], sample_ids: Sequence[str]) -> Tensor:
    """Score every sequence of ``batches`` (from :meth:`Batcher.scoring`) without gradient, [N] in order.

    Raises FloatingPointError naming the sample whose score is not finite.
    """
    scores = evaluate_step(discriminator.chunks, batches, lambda chunk, batch: chunk(batch))
    values = torch.cat([_without_prompts(s, batch) for s, batch in zip(scores, batches, strict=True)]).cpu()
    require_finite("score", values, sample_ids)
    return values


def _without_prompts(scores: Tensor, batch: PackedBatch) -> Tensor:
    """Drop the scores read at the end of prompts that were packed as shared prefixes."""
    return scores if batch.prefix is None else scores[batch.prefix[: len(scores)] >= 0]


def discriminator_step(
    discriminator: TrainableModel, batch: PairBatch, objective: DiscriminatorObjective, lr: float, step: int = 0
) -> dict[str, float | None]:
    """Take a Bradley-Terry step on the pairs of the global batch (Eq. 2), with load balancing.

    Each branch's loss is the mean over its valid pairs on all ranks, times its weight. Without a pair on any rank it
    trains nothing and returns no metrics.

    Args:
        discriminator: The model to train.
        batch: The pairs' micro-batches, from :meth:`Batcher.pairs`.
        objective: The weights of the loss's terms.
        lr: The learning rate.
        step: Selects the noise of the gradient penalty.

    Returns:
        The metrics by name.
    """
    if batch.rows == 0:
        return {}
    hidden_size = discriminator.sizes.text["hidden_size"]
    microbatches = [_with_noise(part, objective, hidden_size, step) for part in batch.microbatches]
    router_stats = RouterStats()

    def forward(chunk: Any, microbatch: PairMicrobatch) -> Tensor:
        scores: Tensor = chunk(microbatch.packed, microbatch.token_share, router_stats)
        return scores

    loss = partial(discriminator_loss, objective, batch.rows)
    total, grad_norm = train_step(discriminator.chunks, discriminator.optimizer, microbatches, forward, loss, lr)
    load_balance, routing = router_stats.over_all_ranks()

    def mean(key: str, branch: int) -> float | None:
        count = batch.on_policy[branch]
        return total[f"{key}_{branch}"] / count if count else None

    return {
        names.DISCRIMINATOR_LOSS: total["loss"],
        names.LOAD_BALANCE_LOSS: load_balance,
        names.DISCRIMINATOR_GRAD_NORM: grad_norm,
        names.DISCRIMINATOR_LEARNING_RATE: lr,
        names.PERCEPTION_GAP: mean("gap", PERCEPTION),
        names.REASONING_GAP: mean("gap", REASONING),
        names.PERCEPTION_SCORE_LEVEL: mean("level", PERCEPTION),
        names.REASONING_SCORE_LEVEL: mean("level", REASONING),
        names.PERCEPTION_PAIR_ACCURACY: mean("wins", PERCEPTION),
        names.REASONING_PAIR_ACCURACY: mean("wins", REASONING),
        names.PERCEPTION_PAIRS: batch.on_policy[PERCEPTION],
        names.REASONING_PAIRS: batch.on_policy[REASONING],
        names.REPLAYED_PAIRS: sum(batch.valid) - sum(batch.on_policy),
        names.CUT_PAIRS: batch.cut,
        names.GRADIENT_PENALTY: total.get("penalty"),
        **_routing_metrics(routing),
    }


def discriminator_loss(
    objective: DiscriminatorObjective, rows: float, batch: PairMicrobatch, scores: Tensor
) -> tuple[Tensor, Stats]:
    """Return a micro-batch's part of the loss and its statistics, from the ``scores`` of its packed sequences.

    ``rows`` counts the global batch's responses, two pairs each. Raises FloatingPointError naming the sample whose
    score is not finite.
    """
    teacher, student = scores[batch.teacher], scores[batch.student]
    require_finite("score of the demonstration", teacher.detach(), batch.sample_ids)
    require_finite("score of the response", student.detach(), batch.sample_ids)
    pair_scores = PairScores(teacher, student, batch.branch, batch.valid, batch.weights, rows)
    value, logged = objective.pair_loss(pair_scores, objective.pair_loss_config)
    stats = {"loss": logged.detach()}
    if batch.perturbed is not None:
        perturbed = scores[batch.perturbed]
        require_finite("score of the perturbed demonstration", perturbed.detach(), batch.sample_ids)
        penalty = gradient_penalty(perturbed, teacher, batch.weights, std=objective.penalty_std)
        value = value + objective.penalty * penalty
        stats["penalty"] = penalty.detach()
    gap, level = (teacher - student).detach(), (teacher + student).detach() / 2
    for branch in (PERCEPTION, REASONING):
        mask = ((batch.branch == branch) & batch.valid & batch.is_on_policy).float()
        stats[f"gap_{branch}"] = (gap * mask).sum()
        stats[f"level_{branch}"] = (level * mask).sum()
        # A tie is no preference: half a win.
        stats[f"wins_{branch}"] = ((gap > 0).float() * mask + 0.5 * (gap == 0).float() * mask).sum()
    return value, Stats(stats)


def _routing_metrics(routing: Tensor) -> dict[str, float | None]:
    """Return the share of tokens at each expert and the mean routing entropy of each branch.

    ``routing`` [2, E + 2] are the counts that :meth:`RouterStats.over_all_ranks` returns.
    """
    metrics: dict[str, float | None] = {}
    for branch, name in ((PERCEPTION, names.PERCEPTION_ROUTER_ENTROPY), (REASONING, names.REASONING_ROUTER_ENTROPY)):
        *loads, entropy, tokens = routing[branch].tolist()
        metrics[name] = entropy / tokens if tokens else None
        for expert, load in enumerate(loads):
            metrics[names.expert_load(BRANCH_NAMES[branch], expert)] = load / sum(loads) if tokens else None
    return metrics


def _with_noise(
    batch: PairMicrobatch, objective: DiscriminatorObjective, hidden_size: int, step: int
) -> PairMicrobatch:
    """Add the gradient penalty's noise to the second copies of the teachers, if there are any."""
    if batch.repeated is None:
        return batch
    noise = response_noise(batch.packed, batch.repeated, hidden_size, objective.noise_seed, step)
    return replace(batch, packed=replace(batch.packed, embedding_noise=objective.penalty_std * noise))
