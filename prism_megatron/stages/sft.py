"""Stage 1: supervised fine-tuning on demonstrations (spec 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from prism_megatron.config import SFTConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_sft
from prism_megatron.data.lengths import check_lengths
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
    rows = read_sft(config.data, read_options(config))
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        report_skipped(stage, rows)
        processor = load_processor(config)
        every = config.train_answers == "every"
        room, remedy = config.max_tokens_per_microbatch, "raise max_tokens_per_microbatch, or drop the row"
        check_lengths(rows, processor, room, remedy, demonstrations=True, train_answers=every)
        batcher = Batcher.from_config(processor.input_spec, config)
        policy = load_policy(config)
        models = {"policy": policy}
        stage.resume(models)

        def prepare(iteration: int, trace: Trace) -> tuple[list[str], list[TrainingSequence]]:
            local_rows = local_batch(rows, config.global_batch_size, iteration, run.seed, trace)
            sequences = demonstrations(local_rows, processor, train_answers=every, trace=trace)
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


def demonstrations(
    rows: Sequence[Example], processor: ChatProcessor, *, train_answers: bool = True, trace: Trace = no_trace
) -> list[TrainingSequence]:
    """Encode the prompt and demonstration of each row; the loss is on the demonstration and its terminator.

    With ``train_answers`` the loss includes earlier answers in the prompt and their terminators.
    """
    rows = list(rows)  # a lazy data set reads its rows on every access
    prompts = processor.encode_prompts(rows, train_answers=train_answers, trace=trace)
    sequences = []
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.response is not None, "read_sft raises for rows without a demonstration"
        sequences.append(TrainingSequence(prompt, (*processor.encode_text(row.response), processor.terminator_id)))
    return sequences
