"""Between SFT and the rest: what the SFT model says becomes data.

Its responses to the alignment prompts are the student side of the warm-up pairs (spec 1.5). Its pass rate on candidate
prompts decides which of them RLVR trains on: those inside a band, neither hopeless nor solved (spec 1.4).
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path

from prism_megatron.config import CollectConfig
from prism_megatron.convert.manifest import is_converted
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_alignment, read_rlvr, write_pairs, write_prompts
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.errors import UserError
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_data_parallel
from prism_megatron.rollout.child import Engine
from prism_megatron.stages.rollouts import Sample, check_prompts, sample_responses, start_engine
from prism_megatron.stages.setup import load_processor, mark_finished, open_stage
from prism_megatron.types import Example, PreferencePair

PAIRS, PROMPTS = "warmup_pairs.jsonl", "rlvr.parquet"
_CHUNK = 64  # prompts per engine call, so that progress is seen


def run_collect(config: CollectConfig) -> None:
    """Sample the policy; leaves ``warmup_pairs.jsonl`` and ``rlvr.parquet`` in the stage's folder.

    Raises UserError for what it refuses.
    """
    demonstrations = read_alignment(Path(config.alignment_data))
    candidates = read_rlvr(Path(config.candidates))[: config.num_candidates or None]
    if is_converted(Path(config.model.hf_checkpoint)):
        raise UserError(
            f"model.hf_checkpoint {config.model.hf_checkpoint} is converted for Megatron; collecting needs the HF "
            "directory (tools/convert.py megatron-to-hf makes one)"
        )
    with open_stage(config) as stage:
        processor = load_processor(config)
        check_prompts([*demonstrations, *candidates], processor, config.rollout)
        engine = start_engine(config, Path(config.model.hf_checkpoint))
        gc.enable()  # train.py stops it while there is nothing to collect
        for_pairs = dataclasses.replace(config.rollout, samples_per_prompt=config.pair_samples_per_prompt)
        responses = _sample(engine, processor, demonstrations, dataclasses.replace(config, rollout=for_pairs), "pairs")
        first = config.pair_samples_per_prompt * _share(demonstrations).start
        mine = [_pair(sample, number) for number, sample in enumerate(responses, first)]
        pairs = gather_over_data_parallel([pair for pair in mine if pair is not None])
        answers = _sample(engine, processor, candidates, config, "pass rates")
        own = pass_rates([answer.correct for answer in answers], config.rollout.samples_per_prompt)
        rates = gather_over_data_parallel(own)
        kept = [row for row, rate in zip(candidates, rates, strict=True) if config.band_low <= rate <= config.band_high]
        if not pairs:
            raise UserError(
                "no student response was in the grammar, so there is no pair to warm up on; train SFT longer"
            )
        if not kept:
            raise UserError(
                f"no candidate has a pass rate in [{config.band_low}, {config.band_high}]; widen band_low or band_high"
            )
        if groups.is_main_rank():
            write_pairs(stage.dir / PAIRS, pairs)
            write_prompts(stage.dir / PROMPTS, kept)
            print(
                f"collect: {len(pairs)} warm-up pairs; {len(kept)} of {len(candidates)} candidates have a pass rate in "
                f"[{config.band_low}, {config.band_high}]",
                flush=True,
            )
        mark_finished(stage, {"pairs": len(pairs), "rlvr_prompts": len(kept)})


def _share(rows: Sequence[Example]) -> range:
    """Which rows this data-parallel rank samples."""
    return shard_for_rank(range(len(rows)), groups.data_parallel_rank(), groups.data_parallel_size())


def _sample(
    engine: Engine, processor: ChatProcessor, rows: Sequence[Example], config: CollectConfig, what: str
) -> list[Sample]:
    """Samples for this data-parallel rank's share of the rows."""
    share = _share(rows)
    mine: list[Sample] = []
    began = time.monotonic()
    longest = -(-len(rows) // groups.data_parallel_size())  # ranks make as many calls as each other
    for low in range(0, longest, _CHUNK):
        chunk = share[low : low + _CHUNK]
        mine += sample_responses(engine, processor, [rows[i] for i in chunk], 0, config)
        done = low + len(chunk)
        eta = (time.monotonic() - began) * (len(share) - done) / max(done, 1)
        if groups.is_main_rank():
            print(f"collect {what} {done}/{len(share)}  eta {eta:.0f} s", flush=True)
    return mine


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
    """The share of right answers to each row, by its place: ids may repeat. ``correct`` has each row's, in turn."""
    starts = range(0, len(correct), samples_per_prompt)
    return [sum(correct[start : start + samples_per_prompt]) / samples_per_prompt for start in starts]
