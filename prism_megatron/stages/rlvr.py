"""Stage 3: reinforcement learning with verifiable rewards (spec 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prism_megatron.advantage import informative_groups
from prism_megatron.config import RLVRConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.loader import batch_indices, count_passes, further_indices, shard_for_rank
from prism_megatron.data.response import Response
from prism_megatron.data.samples import Sample
from prism_megatron.errors import UserError
from prism_megatron.method import METHODS, Judge
from prism_megatron.observe import metrics as names
from prism_megatron.parallel import groups as ranks
from prism_megatron.parallel.collectives import gather_over_data_parallel, sum_over_data_parallel
from prism_megatron.reward.verifiable import overlong_penalty, verifiable_reward
from prism_megatron.rollout.interface import Engine
from prism_megatron.stages.batcher import Batcher, total_tokens
from prism_megatron.stages.evaluate import export_and_evaluate, response_metrics
from prism_megatron.stages.policy import policy_gradient_step
from prism_megatron.stages.rollouts import (
    as_sample,
    check_prompts,
    gallery_row,
    sample_responses,
    start_engine,
)
from prism_megatron.stages.setup import load_policy, load_processor, load_reference, log_line, open_stage
from prism_megatron.stages.sync_guard import SyncGuard
from prism_megatron.types import EncodedPrompt, Example, Rollout

Group = tuple[str, list[dict[str, Any]]]  # a row's id and its rollouts, as plain data


def run_rlvr(config: RLVRConfig) -> None:
    """Train on verified answers to the prompts of ``data``; leaves checkpoints, ``hf/`` and ``results.json``.

    Raises UserError for what it refuses, Preempted when it was told to stop and has saved.
    """
    rows = read_rlvr(Path(config.data))
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        processor = load_processor(config)
        check_prompts(rows, processor, config.rollout)
        batcher = Batcher.from_config(processor.input_spec, config)
        policy = load_policy(config)
        reference = load_reference(config) if config.kl_coeff else None
        parts = {"policy": policy}
        surplus: list[Group] = stage.resume(parts) or []

        engine = start_engine(config, policy.source)
        guard = SyncGuard(engine, policy, processor, rows, config)
        for iteration in range(stage.start, run.train_iters):
            with stage.timers("sync"):
                guard.push(iteration)
            with stage.timers("rollout"):
                sampled = sample_groups(engine, processor, rows, iteration, config, surplus)
                engine.sleep()
            samples, surplus = sampled.samples, sampled.surplus
            advantages = verified_advantages(samples, config)
            with stage.timers("train"):
                lr = policy.learning_rate(iteration, run.train_iters)
                trained = trained_samples(samples, config)
                batches = batcher.policy(
                    [samples[i] for i in trained], [advantages[i] for i in trained], config, iteration
                )
                measured = policy_gradient_step(policy, reference, batches, config, lr)
            measured |= sampling_metrics(sampled, config)
            measured[names.TOKENS] = total_tokens([sample.sequence() for sample in samples])
            stage.log.log(iteration + 1, measured | passes.measured(iteration + 1) | stage.timers.pop())
            shown = range(min(run.log_rollouts_per_iteration, len(samples)))
            stage.log.rollouts(
                iteration + 1,
                [gallery_row(samples[i], "rlvr", iteration + 1, advantages[i]) for i in shown],
            )
            stage.save_if_due(iteration + 1, parts, surplus)

        export_and_evaluate(stage, policy, processor, engine)


@dataclass(frozen=True)
class Sampled:
    """This rank's ``samples`` to train on and all it ``generated`` for them; the ``surplus`` is the same on all ranks.

    ``carried`` is how many of all ranks' groups were surplus before.
    """

    samples: list[Sample]
    generated: list[Sample]
    surplus: list[Group]
    carried: int = 0


class Candidate(NamedTuple):
    """A sample as ranks exchange it: ``row`` is the place in the file of its prompt, which every rank has read."""

    group: int
    row: int
    rollout: Rollout
    response: Response | None
    correct: bool

    @classmethod
    def of(cls, sample: Sample, row: int) -> Candidate:
        return cls(sample.group, row, sample.rollout, sample.response, sample.correct)


def sample_groups(
    engine: Engine,
    processor: ChatProcessor,
    rows: Sequence[Example],
    iteration: int,
    config: RLVRConfig,
    surplus: Sequence[Group],
) -> Sampled:
    """An iteration's samples.

    DAPO's dynamic sampling (spec 5.2): groups whose answers are all right or all wrong are replaced by those of other
    prompts. Groups left over by the iterations before come first; each round then samples ``oversampling`` prompts for
    each group still missing, and what is found beyond the need is left over in turn. Which prompts, and in which order,
    depends on seed and iteration only. Where the rounds end first, what was found is trained on.
    """
    order = batch_indices(len(rows), config.prompts_per_iteration, iteration, config.run.seed)
    rounds = 1
    if config.algorithm == "dapo":
        order = order + further_indices(len(rows), order, iteration, config.run.seed)
        rounds = config.max_sampling_rounds
    judge = METHODS[config.compat].judge
    kept = _restored(surplus, rows, processor, judge)
    generated: list[Sample] = []
    prompts: dict[int, EncodedPrompt] = {}
    tried = 0
    for _ in range(rounds):
        missing = config.prompts_per_iteration - len({candidate.group for candidate in kept})
        drawn = order[tried : tried + math.ceil(max(missing, 0) * config.oversampling)]
        if not drawn:
            break
        share = shard_for_rank(drawn, ranks.data_parallel_rank(), ranks.data_parallel_size())
        asked = [rows[i] for i in share]
        samples = sample_responses(engine, processor, asked, iteration, config, judge)
        first = tried + len(drawn) * ranks.data_parallel_rank() // ranks.data_parallel_size()
        row_of = {first + group: row for group, row in enumerate(share)}
        samples = [replace(sample, group=first + sample.group) for sample in samples]
        generated += samples
        tried += len(drawn)
        if config.algorithm != "dapo":
            return Sampled(samples, generated, [])
        prompts |= {row_of[sample.group]: sample.prompt for sample in samples}
        found_here = [Candidate.of(sample, row_of[sample.group]) for sample in _informative(samples)]
        kept += gather_over_data_parallel(found_here)
    if not kept:
        raise UserError(
            f"of {tried} prompts none has responses with different rewards; choose prompts that the policy solves "
            "sometimes (the collect stage does), raise rollout.samples_per_prompt, or max_sampling_rounds"
        )
    found = sorted({candidate.group for candidate in kept})
    trained, left = found[: config.prompts_per_iteration], found[config.prompts_per_iteration :]
    mine = shard_for_rank(trained, ranks.data_parallel_rank(), ranks.data_parallel_size())
    return Sampled(
        _as_samples([candidate for candidate in kept if candidate.group in mine], rows, processor, prompts),
        generated,
        [_as_group([candidate for candidate in kept if candidate.group == group], rows) for group in left],
        sum(group < 0 for group in trained),
    )


def _as_group(candidates: Sequence[Candidate], rows: Sequence[Example]) -> Group:
    return rows[candidates[0].row].id, [vars(candidate.rollout) for candidate in candidates]


def _as_samples(
    candidates: Sequence[Candidate],
    rows: Sequence[Example],
    processor: ChatProcessor,
    prompts: Mapping[int, EncodedPrompt],
) -> list[Sample]:
    """Samples to train on; ``prompts`` are those that this rank encoded before, by row."""
    others = list(dict.fromkeys(candidate.row for candidate in candidates if candidate.row not in prompts))
    encoded = processor.encode_prompts([rows[row] for row in others]) if others else []
    prompts = {**prompts, **dict(zip(others, encoded, strict=True))}
    return [Sample(rows[c.row], prompts[c.row], c.rollout, c.response, c.correct, c.group) for c in candidates]


def _restored(
    surplus: Sequence[Group], rows: Sequence[Example], processor: ChatProcessor, judge: Judge
) -> list[Candidate]:
    """Groups left over, numbered below 0 so that the oldest are trained on first."""
    places = {row.id: place for place, row in enumerate(rows)} if surplus else {}
    not_encoded = EncodedPrompt(())
    return [
        Candidate.of(
            as_sample(processor, rows[places[row_id]], not_encoded, Rollout(**fields), number - len(surplus), judge),
            places[row_id],
        )
        for number, (row_id, rollouts) in enumerate(surplus)
        for fields in rollouts
    ]


def _informative(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of the groups in which some answers are right and some are wrong, as the reference filters (spec 5.2)."""
    if not samples:
        return []
    correct = torch.tensor([float(sample.correct) for sample in samples])
    useful = informative_groups(correct, torch.tensor([sample.group for sample in samples]))
    return [sample for sample, keep in zip(samples, useful.tolist(), strict=True) if keep]


def sampling_metrics(sampled: Sampled, config: RLVRConfig) -> dict[str, float | None]:
    """Over all that was generated, whatever of it is trained on: a filter must not flatter the reward.

    Where a surplus was enough nothing was, and there is nothing to say of it.
    """
    samples = sampled.generated
    rewards = torch.tensor([reward(sample, config) for sample in samples], dtype=torch.float64)
    useful = informative_groups(rewards, torch.tensor([sample.group for sample in samples]))
    total, informative, count, prompts = sum_over_data_parallel(
        float(rewards.sum()), float(useful.sum()), len(samples), len({sample.group for sample in samples})
    )
    measured: dict[str, float | None] = {names.GENERATED_PROMPTS: prompts, names.CARRIED_GROUPS: sampled.carried}
    if count == 0:
        return measured
    means = {names.REWARD: total / count, names.VALID_GROUPS: informative / count}
    return measured | means | response_metrics(samples)


def trained_samples(samples: Sequence[Sample], config: RLVRConfig) -> list[int]:
    """Which samples the loss is of: all, or with ``mask_truncated`` those that ended before the length limit."""
    return [i for i, sample in enumerate(samples) if sample.rollout.finished or not config.mask_truncated]


def verified_advantages(samples: Sequence[Sample], config: RLVRConfig) -> list[float]:
    """Rewards, normalised within each group."""
    rewards = torch.tensor([reward(sample, config) for sample in samples], dtype=torch.float64)
    groups = torch.tensor([sample.group for sample in samples])
    advantages: list[float] = METHODS[config.compat].normalize(rewards, groups, config.advantage_eps, 0.0).tolist()
    return advantages


def reward(sample: Sample, config: RLVRConfig) -> float:
    """accuracy_weight * accuracy + format_weight * format; a response cut at the length limit has no format (Eq. 5).

    DAPO takes a penalty for the last part of the room for a response.
    """
    score = verifiable_reward(
        correct=sample.correct,
        valid=sample.response is not None,
        accuracy_weight=config.accuracy_weight,
        format_weight=config.format_weight,
    )
    if config.algorithm == "dapo" and config.overlong_buffer_tokens:
        score += overlong_penalty(
            len(sample.rollout.token_ids),
            max_tokens=config.rollout.max_response_tokens,
            buffer_tokens=config.overlong_buffer_tokens,
            factor=config.overlong_penalty,
        )
    return score
