"""Stage 1: supervised fine-tuning on demonstrations (spec 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from prism_megatron.config import SFTConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_sft
from prism_megatron.data.lazy import Rows
from prism_megatron.data.lengths import LengthLimit, fit_lengths
from prism_megatron.data.loader import count_passes
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.prefetch import prefetch
from prism_megatron.data.rows import Trace, no_trace
from prism_megatron.observe import metrics as names
from prism_megatron.observe.flops import peak_flops, training_flops
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.stages.batcher import Batcher, workload
from prism_megatron.stages.evaluate import export_and_evaluate
from prism_megatron.stages.policy import sft_step
from prism_megatron.stages.setup import (
    TrainableModel,
    load_policy,
    load_processor,
    local_batch,
    log_line,
    open_stage,
    read_options,
    report_skipped,
)
from prism_megatron.types import Example


def run_sft(config: SFTConfig) -> None:
    """Fine-tune the policy on ``data``; writes checkpoints, ``hf/`` and ``results.json`` into the stage's folder.

    Raises UserError for invalid settings or data, and Preempted after a preempted stage has saved.
    """
    processor = load_processor(config)
    rows = fit_demonstrations(read_sft(config.data, read_options(config)), processor, config)
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        report_skipped(stage, rows)
        batcher = Batcher.from_config(processor.input_spec, config)
        policy = load_policy(config)
        models = {"policy": policy}
        stage.resume(models)

        limit = length_limit(config)

        def prepare(iteration: int, trace: Trace) -> tuple[list[str], list[TrainingSequence]]:
            local_rows = local_batch(rows, config.global_batch_size, iteration, run.seed, trace)
            sequences = demonstrations(local_rows, processor, limit, trace)
            return [row.id for row in local_rows], sequences

        iterations = range(stage.start, run.train_iters)
        batches = prefetch(prepare, rows, iterations, config.dataset.workers)
        for iteration in iterations:
            start_time = time.monotonic()
            with stage.timers("data"):
                sample_ids, sequences = next(batches)
            with stage.timers("train"):
                lr = policy.learning_rate(iteration, run.train_iters)
                metrics = sft_step(policy, batcher.sft(sequences, sample_ids), lr)
            metrics |= throughput(policy, sequences, config.model.freeze, start_time)
            stage.log.log(iteration + 1, metrics | passes.metrics(iteration + 1) | stage.timers.pop())
            stage.save_if_due(iteration + 1, models)

        export_and_evaluate(stage, policy, processor)


def throughput(
    policy: TrainableModel, sequences: Sequence[TrainingSequence], freeze: Sequence[str], start_time: float
) -> dict[str, float | None]:
    """Return tokens and operations per second since ``start_time``, over all ranks' ``sequences``. Collective."""
    local_flops = training_flops(policy.sizes.text, policy.sizes.vision, workload(sequences), freeze).model
    tokens, flops = sum_over_data_parallel(sum(map(len, sequences)), local_flops)
    seconds = time.monotonic() - start_time
    rate, peak = flops / dist.get_world_size() / seconds, _peak()
    return {
        names.TOKENS: tokens,
        names.TOKENS_PER_SECOND: tokens / seconds,
        names.TFLOPS_PER_RANK: rate / 1e12,
        names.MFU: rate / peak if peak else None,
    }


def _peak() -> float | None:
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def length_limit(config: SFTConfig) -> LengthLimit:
    """Return how long a prompt with its demonstration may be."""
    remedy = "raise max_tokens_per_microbatch, or drop the row"
    every = config.train_answers == "every"
    return LengthLimit(config.max_tokens_per_microbatch, remedy, demonstrations=True, train_answers=every)


def fit_demonstrations(rows: Rows[Example], processor: ChatProcessor, config: SFTConfig) -> Rows[Example]:
    """Return the rows that fit a micro-batch; raise UserError naming the others if they are not dropped.

    With ``dataset.overlong`` truncate a row fits if its prompt and one more token do.
    """
    limit, overlong = length_limit(config), config.dataset.overlong
    if overlong == "truncate":
        limit = replace(limit, room=limit.room - 1, demonstrations=False)
    return fit_lengths(rows, processor, limit, drop=overlong != "error")


def demonstrations(
    rows: Sequence[Example], processor: ChatProcessor, limit: LengthLimit | None = None, trace: Trace = no_trace
) -> list[TrainingSequence]:
    """Encode the prompt and demonstration of each row; the loss is on the demonstration and its terminator.

    It is on the answers in the prompt, too, as ``limit`` says, which also truncates demonstrations.
    """
    rows = list(rows)  # those of a data set are read anew each time
    prompts = processor.encode_prompts(rows, train_answers=limit is None or limit.train_answers, trace=trace)
    sequences = []
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.response is not None, "read_sft raises for rows without a demonstration"
        room = None if limit is None else limit.room - len(prompt.token_ids)
        sequences.append(TrainingSequence(prompt, processor.response_ids(row.response)[:room]))
    return sequences
