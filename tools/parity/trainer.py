"""The trainer's side of the parity check, run on every rank: logits, scores and gradients at a parallel layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import DiscriminatorConfig, ModelConfig, OptimizerConfig, WarmupConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import Padding, TrainingSequence, pack
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, InputSpec, PackedBatch
from tools.parity.cases import Case, training_sequence

SIDES = ("teacher", "student")
# With an epsilon far above any gradient, AdamW's first step is the gradient times learning rate over epsilon.
_EPSILON, _STEP = 1e8, 1e5


def policy_results(checkpoint: Path, rows: Sequence[EncodedPrompt], spec: InputSpec, case: Case) -> dict[str, Tensor]:
    """Return logits, scores and gradients under HF's names. Collective over all ranks."""
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import export_weights, load_weights
    from prism_megatron.model.build import build_policy, wrap_for_training
    from prism_megatron.model.sizes import read_sizes
    from prism_megatron.optim.optimizer import build_optimizer
    from prism_megatron.optim.step import Stats, evaluate_step, train_step
    from prism_megatron.parallel.collectives import (
        from_last_stage,
        gather_over_data_parallel,
        sum_over_data_parallel,
    )

    sizes = read_sizes(checkpoint)
    table = policy_table(sizes)
    model = ModelConfig(
        str(checkpoint), case.precision, recompute=case.recompute, moe_aux_loss_coeff=case.moe_aux_loss_coeff
    )
    chunks = build_policy(model, case.parallel, sizes)
    with HFWeights(checkpoint) as weights:
        load_weights(chunks, table, weights)
    wrapped = wrap_for_training(chunks, case.distributed_optimizer)
    sequences = [training_sequence(row, spec) for row in rows]
    groups_of_rows, batches = _batches(sequences, spec, case)

    logits = evaluate_step(wrapped, batches, lambda chunk, batch: chunk(batch, return_logits=True))
    local_logits = {}
    for members, batch, values in zip(groups_of_rows, batches, logits, strict=True):
        for row, start in zip(members, batch.cu_seqlens.tolist(), strict=False):
            local_logits[f"row_{row}"] = values[start : start + len(sequences[row])].cpu()
    results = dict(gather_over_data_parallel(list(local_logits.items())))
    if not case.gradients:
        return results

    trained, tokens = sum_over_data_parallel(
        *(sum(f(sequences[r]) for g in groups_of_rows for r in g) for f in (lambda s: len(s.response_ids), len))
    )
    shares = {id(b): sum(len(sequences[r]) for r in g) / tokens for g, b in zip(groups_of_rows, batches, strict=True)}
    scored: list[tuple[str, Tensor]] = []

    def loss(batch: PackedBatch, scores: Any) -> tuple[Tensor, Stats]:
        members = groups_of_rows[next(i for i, b in enumerate(batches) if b is batch)]
        for row, end in zip(members, batch.last_tokens.tolist(), strict=True):
            response = slice(end - len(sequences[row].response_ids), end)
            scored.append((f"logprobs_{row}", scores.logprobs[response].detach().cpu()))
            scored.append((f"entropy_{row}", scores.entropy[response].cpu()))
        return -(scores.logprobs * batch.loss_mask).sum() / trained, Stats({})

    lr = _STEP * _EPSILON if case.distributed_optimizer else 0.0
    optimizer = build_optimizer(OptimizerConfig(lr=lr, adam_eps=_EPSILON, clip_grad=0.0), wrapped)
    before = {n: t.clone() for n, t in export_weights(wrapped, table)} if case.distributed_optimizer else {}
    train_step(wrapped, optimizer, batches, lambda chunk, batch: chunk(batch, shares[id(batch)]), loss, lr)
    results |= dict(gather_over_data_parallel(from_last_stage(scored)))
    if case.distributed_optimizer:  # gradients are sharded over the ranks: derive them from the step
        after = export_weights(wrapped, table)
        return results | {f"grad:{name}": (before[name] - tensor) / _STEP for name, tensor in after}
    return results | {f"grad:{name}": g.cpu() for name, g in export_weights(wrapped, table, read=_gradient)}


def discriminator_results(
    checkpoint: Path, rows: Sequence[EncodedPrompt], spec: InputSpec, case: Case
) -> dict[str, Tensor]:
    """Return scores and gradients of a discriminator step on pairs of each row's answer and its reverse.

    Both are scored together, so that they share their prompt if the layout allows it. Load balancing is over a
    micro-batch, so that only layouts with the same micro-batches agree.
    """
    from prism_megatron.convert.transfer import export_weights
    from prism_megatron.data.loader import shard_for_rank
    from prism_megatron.data.pairs import Pair
    from prism_megatron.loss.discriminator import PairLossConfig
    from prism_megatron.parallel import groups
    from prism_megatron.parallel.collectives import gather_over_data_parallel
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.discriminator import DiscriminatorObjective, discriminator_step, score
    from prism_megatron.stages.setup import load_discriminator

    local_rows = shard_for_rank(list(range(len(rows))), groups.data_parallel_rank(), groups.data_parallel_size())
    pairs = {}
    for row in local_rows:
        sequence = training_sequence(rows[row], spec)
        for branch in (PERCEPTION, REASONING):
            teacher, student = (
                TrainingSequence(sequence.prompt, ids, branch)
                for ids in (sequence.response_ids, sequence.response_ids[::-1])
            )
            pairs[2 * row + branch] = Pair(teacher, student, f"row {row}")
    widest = max(3 * len(row.token_ids) for row in rows)  # the gradient penalty packs the teacher twice
    config = WarmupConfig(
        stage="warmup",
        parallel=case.parallel,
        model=ModelConfig(hf_checkpoint=str(checkpoint), recompute=case.recompute),
        discriminator=DiscriminatorConfig(
            str(checkpoint), 8, 2, case.experts, upcycle_noise=0.5, load_balance_coeff=case.moe_aux_loss_coeff
        ),
        max_tokens_per_microbatch=widest if case.batching == "single" else 1 << 20,
    )
    trained = load_discriminator(config, OptimizerConfig(lr=0.0, clip_grad=0.0))
    if hasattr(trained.chunks[-1].module, "score_heads"):
        with torch.no_grad():  # with the initial zeros nothing else would have a gradient
            head = trained.chunks[-1].module.score_heads.weight
            head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    batcher = Batcher.from_config(load_processor(checkpoint).input_spec, config)
    sides = {f"row_{number}_{side}": getattr(pair, side) for number, pair in pairs.items() for side in SIDES}
    sample_ids = [f"row {row}" for row in local_rows for _ in range(2 * len(SIDES))]
    values = score(trained, batcher.scoring(list(sides.values())), sample_ids)
    results: dict[str, Tensor] = dict(gather_over_data_parallel(list(zip(sides, values, strict=True))))
    loss = PairLossConfig(regularizer=0.1, label_smoothing=0.1)
    objective = DiscriminatorObjective((0.6, 1.4), pair_loss_config=loss, penalty=0.1, penalty_std=0.02)
    batch = batcher.pairs(list(pairs.values()), objective.branch_weights, repeat_teachers=True)
    discriminator_step(trained, batch, objective, lr=0.0)
    gradients = export_weights(trained.chunks, trained.table, read=_gradient)
    return results | {f"grad:{name}": gradient for name, gradient in gradients}


@functools.cache
def load_processor(checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(checkpoint)


def _gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.main_grad
    return gradient


def _batches(
    sequences: Sequence[TrainingSequence], spec: InputSpec, case: Case
) -> tuple[list[list[int]], list[PackedBatch]]:
    """Return this data-parallel rank's rows and batches, by micro-batch."""
    from prism_megatron.data.loader import shard_for_rank
    from prism_megatron.parallel import groups
    from prism_megatron.stages.batcher import equal_over_ranks, padding_for

    local_rows = shard_for_rank(list(range(len(sequences))), groups.data_parallel_rank(), groups.data_parallel_size())
    rows = [[row] for row in local_rows] if case.batching == "single" else [local_rows] if local_rows else []
    rows = equal_over_ranks(rows, case.parallel)
    padding = padding_for(case.parallel, ModelConfig(""))
    if case.batching == "padded":
        longest = max(map(len, sequences))
        longest += -longest % padding.sequence_multiple
        padding = Padding(longest, padding.batch_multiple)
    packed = [pack([sequences[r] for r in members], spec, padding) for members in rows]
    return rows, [batch.to(groups.device()) for batch in packed]
