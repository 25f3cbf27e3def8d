"""Data collection after SFT: the SFT model's responses become the data of the next stages.

Its responses to the alignment prompts are the student side of the warm-up pairs (spec 1.5). Its pass rates on candidate
prompts select those that RLVR trains on: inside a band, neither never nor always solved (spec 1.4).
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path

from prism_megatron.config import CollectConfig
from prism_megatron.convert.manifest import is_converted
from prism_megatron.data.dataset import read_alignment, read_rlvr, write_pairs, write_prompts
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.samples import Sample
from prism_megatron.errors import UserError
from prism_megatron.observe.progress import ProgressBar
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_data_parallel
from prism_megatron.stages.rollouts import Sampler, fit_prompts, start_engine
from prism_megatron.stages.setup import (
    load_processor,
    log_line,
    mark_finished,
    open_stage,
    read_options,
    report_skipped,
)
from prism_megatron.types import Example, PreferencePair

PAIRS, PROMPTS = "warmup_pairs.jsonl", "rlvr.parquet"
_CHUNK = 64  # prompts per engine call; each call prints a line of progress


def run_collect(config: CollectConfig) -> None:
    """Sample the policy; writes ``warmup_pairs.jsonl`` and ``rlvr.parquet`` into the stage's folder.

    Raises UserError for invalid settings or data.
    """
    processor = load_processor(config)
    demonstrations = fit_prompts(read_alignment(config.alignment_data, read_options(config)), processor, config)
    candidates = fit_prompts(read_rlvr(config.candidates, read_options(config)), processor, config)
    candidates = candidates[: config.num_candidates]
    if is_converted(Path(config.model.hf_checkpoint)):
        raise UserError(
            f"model.hf_checkpoint {config.model.hf_checkpoint} is converted for Megatron; collecting needs the HF "
            "directory (tools/convert.py megatron-to-hf makes one)"
        )
    with open_stage(config) as stage:
        report_skipped(stage, demonstrations)
        report_skipped(stage, candidates)
        sampler = Sampler(start_engine(config, Path(config.model.hf_checkpoint)), processor, config)
        gc.enable()  # train.py disables it during imports and reading
        pairs = collect_pairs(sampler, demonstrations, config)
        selected = select_prompts(sampler, candidates, config)
        if groups.is_main_rank():
            write_pairs(stage.dir / PAIRS, pairs)
            write_prompts(stage.dir / PROMPTS, selected)
        log_line(
            f"collect: {len(pairs)} warm-up pairs; {len(selected)} of {len(candidates)} candidates have a pass rate in "
            f"[{config.band_low}, {config.band_high}]"
        )
        mark_finished(stage, {"pairs": len(pairs), "rlvr_prompts": len(selected)})


def collect_pairs(sampler: Sampler, rows: Sequence[Example], config: CollectConfig) -> list[PreferencePair]:
    """Sample responses to all demonstrations' prompts; pair those inside the grammar with the demonstration."""
    count = config.pair_samples_per_prompt
    settings = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, samples_per_prompt=count))
    samples = _sample(dataclasses.replace(sampler, config=settings), rows, "pairs")
    local_pairs = [_pair(sample, number) for number, sample in enumerate(samples, count * _local_indices(rows).start)]
    pairs = gather_over_data_parallel([pair for pair in local_pairs if pair is not None])
    if not pairs:
        raise UserError("no student response was in the grammar, so there is no pair to warm up on; train SFT longer")
    return pairs


def select_prompts(sampler: Sampler, rows: Sequence[Example], config: CollectConfig) -> list[Example]:
    """Sample responses to all candidates; return those with a pass rate inside the band."""
    samples = _sample(sampler, rows, "pass rates")
    local_rates = pass_rates([sample.correct for sample in samples], config.rollout.samples_per_prompt)
    rates, low, high = gather_over_data_parallel(local_rates), config.band_low, config.band_high
    selected = [row for row, rate in zip(rows, rates, strict=True) if low <= rate <= high]
    if not selected:
        raise UserError(f"no candidate has a pass rate in [{low}, {high}]; widen band_low or band_high")
    return selected


def _local_indices(rows: Sequence[Example]) -> range:
    """Return the indices of the rows that this data-parallel rank samples."""
    return shard_for_rank(range(len(rows)), groups.data_parallel_rank(), groups.data_parallel_size())


def _sample(sampler: Sampler, rows: Sequence[Example], what: str) -> list[Sample]:
    """Sample this data-parallel rank's rows; ``what`` names them in the progress line."""
    indices = _local_indices(rows)
    samples: list[Sample] = []
    longest = -(-len(rows) // groups.data_parallel_size())  # every rank must make the same number of collective calls
    with ProgressBar(f"collect {what}", len(indices), with_lines=True, is_enabled=groups.is_main_rank()) as bar:
        for low in range(0, longest, _CHUNK):
            chunk = indices[low : low + _CHUNK]
            samples += sampler.sample([rows[i] for i in chunk], 0)
            bar.update(low + len(chunk))
    return samples


def _pair(sample: Sample, number: int) -> PreferencePair | None:
    row, response = sample.example, sample.response
    if response is None:
        return None
    assert row.teacher_caption is not None
    assert row.teacher_reasoning is not None
    return PreferencePair(
        id=f"{row.id}-{number}",
        messages=row.messages,
        images=row.images,
        source=row.source,
        teacher_caption=row.teacher_caption,
        teacher_reasoning=row.teacher_reasoning,
        student_caption=response.caption_block,
        student_reasoning=response.reasoning_block,
    )


def pass_rates(correct: Sequence[bool], samples_per_prompt: int) -> list[float]:
    """Return the fraction of right answers of each row; ``correct`` lists ``samples_per_prompt`` verdicts per row."""
    starts = range(0, len(correct), samples_per_prompt)
    return [sum(correct[start : start + samples_per_prompt]) / samples_per_prompt for start in starts]
