"""Stage 2a: pairwise warm-up of the discriminator, upcycled from a dense checkpoint (spec 3.2, 3.3)."""

from __future__ import annotations

from prism_megatron.config import WarmupConfig
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_pairs
from prism_megatron.data.loader import count_passes
from prism_megatron.data.pairs import Pair, branch_pairs
from prism_megatron.data.prefetch import prefetch
from prism_megatron.data.rows import Trace, no_trace
from prism_megatron.observe import metrics as names
from prism_megatron.stages.batcher import Batcher, total_tokens
from prism_megatron.stages.discriminator import DiscriminatorObjective, discriminator_step
from prism_megatron.stages.rollouts import fit_prompts
from prism_megatron.stages.setup import (
    load_discriminator,
    load_processor,
    local_batch,
    log_line,
    mark_finished,
    open_stage,
    read_options,
    report_skipped,
)
from prism_megatron.types import EncodedPrompt, PreferencePair

# The mean over the pairs of both branches (spec 3.3): every row gives one pair of each.
OBJECTIVE = DiscriminatorObjective(branch_weights=(0.5, 0.5))


def run_warmup(config: WarmupConfig) -> None:
    """Train the discriminator on the pairs of ``data``; writes checkpoints and ``hf/`` into the stage's folder.

    Raises UserError for invalid settings or data, and Preempted after a preempted stage has saved.
    """
    processor = load_processor(config)
    rows = fit_prompts(read_pairs(config.data, read_options(config)), processor, config)
    config, passes = count_passes(config, len(rows))
    run = config.run
    with open_stage(config) as stage:
        log_line(passes)
        report_skipped(stage, rows)
        batcher = Batcher.from_config(processor.input_spec, config)
        discriminator = load_discriminator(config, config.optimizer)
        models = {"discriminator": discriminator}
        stage.resume(models)

        def prepare(iteration: int, trace: Trace) -> list[Pair]:
            local_rows = local_batch(rows, config.global_batch_size, iteration, run.seed, trace)
            return preference_pairs(local_rows, processor, config, trace)

        iterations = range(stage.start, run.train_iters)
        batches = prefetch(prepare, rows, iterations, config.dataset.workers)
        for iteration in iterations:
            with stage.timers("data"):
                pairs = next(batches)
            with stage.timers("train"):
                lr = discriminator.learning_rate(iteration, run.train_iters)
                batch = batcher.pairs(pairs, OBJECTIVE.branch_weights)
                metrics = discriminator_step(discriminator, batch, OBJECTIVE, lr)
            metrics[names.TOKENS] = total_tokens([side for pair in pairs for side in (pair.teacher, pair.student)])
            stage.log.log(iteration + 1, metrics | passes.metrics(iteration + 1) | stage.timers.pop())
            stage.save_if_due(iteration + 1, models)

        discriminator.export(stage.dir / "hf")
        mark_finished(stage, {})


def preference_pairs(
    rows: list[PreferencePair], processor: ChatProcessor, config: WarmupConfig, trace: Trace = no_trace
) -> list[Pair]:
    """Return a perception and a reasoning pair of every row."""
    prompts = processor.encode_prompts(rows, trace=trace)
    return [
        pair for row, prompt in zip(rows, prompts, strict=True) for pair in pairs_of_row(row, prompt, processor, config)
    ]


def pairs_of_row(
    row: PreferencePair, prompt: EncodedPrompt, processor: ChatProcessor, config: WarmupConfig
) -> list[Pair]:
    """Return a perception and a reasoning pair of a row whose prompt is already encoded."""
    teacher = branch_sequences(processor, prompt, row.teacher_caption, row.teacher_reasoning)
    student = branch_sequences(processor, prompt, row.student_caption, row.student_reasoning)
    return branch_pairs(teacher, student, row.id, config)
