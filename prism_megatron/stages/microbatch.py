"""Cutting an iteration's sequences into micro-batches that every parallel layout can run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prism_megatron.config import ModelConfig, ParallelConfig, StageConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import Padding, TrainingSequence, pack, pack_shared
from prism_megatron.model.fp8 import token_alignment
from prism_megatron.observe.flops import Workload
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import max_over_data_parallel, sum_over_data_parallel
from prism_megatron.types import PackedBatch


def pack_microbatch(
    sequences: Sequence[TrainingSequence], processor: ChatProcessor, config: StageConfig
) -> PackedBatch:
    """``sequences`` (or none) as one packed batch on this rank's device."""
    return pack(sequences, processor.input_spec, padding_for(config.parallel, config.model)).to(groups.device())


def pack_for_scoring(
    sequences: Sequence[TrainingSequence], processor: ChatProcessor, config: StageConfig
) -> PackedBatch:
    """``sequences`` as one packed batch, each prompt of a branch once where that saves anything."""
    distinct = len({(id(s.prompt), s.branch) for s in sequences})
    if distinct == len(sequences) or not can_share_prompts(config.parallel):
        return pack_microbatch(sequences, processor, config)
    return pack_shared(sequences, processor.input_spec, padding_for(config.parallel, config.model)).to(groups.device())


def can_share_prompts(parallel: ParallelConfig) -> bool:
    """Only the CPU's attention, with whole sequences, lets several responses see the same prompt."""
    return groups.device().type == "cpu" and parallel.context_parallel_size == 1


def padding_for(parallel: ParallelConfig, model: ModelConfig) -> Padding:
    """What context parallelism (two chunks of each sequence a rank) and sequence parallelism can cut evenly.

    Each rank's part is then also what FP8 products take.
    """
    context = parallel.context_parallel_size
    chunks = 2 * context if context > 1 else 1
    part = math.lcm(chunks, context * token_alignment(model))
    return Padding(chunks, part * parallel.tensor_model_parallel_size)


def total_tokens(sequences: Sequence[TrainingSequence]) -> float:
    """Of all data-parallel ranks' ``sequences``. Collective."""
    return sum_over_data_parallel(sum(map(len, sequences)))[0]


def workload(sequences: Sequence[TrainingSequence]) -> Workload:
    """What one pass over ``sequences`` works on; an image that several show is counted once."""
    visuals = {id(visual): visual for sequence in sequences for visual in sequence.prompt.visuals}
    frames = [height * width for time, height, width in (v.grid for v in visuals.values()) for _ in range(time)]
    return Workload([len(s) for s in sequences], frames, sum(len(s.response_ids) for s in sequences))


def equal_over_ranks[Item](microbatches: list[list[Item]], parallel: ParallelConfig) -> list[list[Item]]:
    """The same number of micro-batches on every data-parallel rank, empty ones added at the end where needed.

    Experts are exchanged between data-parallel ranks in every micro-batch, and an interleaved schedule takes a whole
    number of them per stage: a rank with fewer would leave the others waiting.
    """
    wanted = max(int(max_over_data_parallel(len(microbatches))), 1)
    if parallel.virtual_pipeline_model_parallel_size > 1:
        wanted += -wanted % parallel.pipeline_model_parallel_size
    return microbatches + [[] for _ in range(wanted - len(microbatches))]
