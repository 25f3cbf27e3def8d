"""Sampling responses in a stage: rows to requests, engine to samples, samples to what is logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prism_megatron import config as cfg
from prism_megatron.convert.transfer import export_manifest, export_weights
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.lengths import check_lengths
from prism_megatron.data.rows import raise_faults
from prism_megatron.data.samples import Sample
from prism_megatron.data.seeds import sample_seed
from prism_megatron.method import FIXED, Judge
from prism_megatron.reward import symbolic
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.rollout.interface import Engine, EngineConfig, Sampling
from prism_megatron.rollout.subprocess_engine import SubprocessEngine
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.types import EncodedPrompt, Example, Rollout, RolloutRequest


@dataclass(frozen=True)
class PolicyWeights:
    """The policy's weights under their HF names, gathered anew, over all ranks, whenever they are gone through."""

    policy: TrainableModel
    bucket_bytes: int

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return export_weights(self.policy.chunks, self.policy.table, self.bucket_bytes)


def check_prompts(rows: Sequence[Example], processor: ChatProcessor, rollout: cfg.RolloutConfig) -> None:
    """Raise UserError, naming the rows, for prompts that the engine would refuse."""
    most = rollout.images_per_prompt
    faults = [
        f"{row.source}: {len(row.images)} images, rollout.images_per_prompt is {most}; raise it, or drop the row"
        for row in rows
        if len(row.images) > most
    ]
    raise_faults(faults, len(rows))
    room = rollout.max_model_len - rollout.max_response_tokens
    check_lengths(rows, processor, room, "raise rollout.max_model_len, or drop the row")


def start_engine(config: cfg.StageConfig, checkpoint: Path) -> Engine:
    """A vLLM engine where the configuration says, on the checkpoint's weights until others are pushed.

    Raises RuntimeError where what it generates could not be judged, for want of math-verify.
    """
    symbolic.start()
    rollout = config.rollout
    wanted = EngineConfig(
        tensor_parallel_size=rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size,
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}[config.model.precision],
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        seed=config.run.seed,
        timeout_seconds=rollout.timeout_seconds or None,
        bucket_bytes=rollout.sync_bucket_mib << 20,
        transport=rollout.transport,
        sleep_level=rollout.sleep_level,
        images_per_prompt=rollout.images_per_prompt,
    )
    if rollout.engine == "child":
        return SubprocessEngine(checkpoint, wanted, cfg.stage_dir(config) / f"engine_{dist.get_rank()}.log")
    return RolloutEngine(checkpoint, wanted)


def push_weights(engine: Engine, policy: TrainableModel, version: int, config: cfg.RolloutConfig) -> None:
    """Give the engine the policy's current weights, waking it if it sleeps. Collective."""
    sync = WeightSync(version, export_manifest(policy.chunks, policy.table), config.sync_checksums)
    engine.wake("weights")
    engine.update_weights(PolicyWeights(policy, config.sync_bucket_mib << 20), sync)
    engine.wake("kv_cache")


def sample_responses(
    engine: Engine,
    processor: ChatProcessor,
    rows: Sequence[Example],
    iteration: int,
    config: cfg.StageConfig,
    judge: Judge = FIXED.judge,
) -> list[Sample]:
    """``samples_per_prompt`` responses to each row, in order; seeds depend on run, iteration and row only.

    Collective: a rank without rows calls, too. ``judge`` parses and verifies the responses.
    """
    rollout = config.rollout
    sampling = Sampling(rollout.samples_per_prompt, rollout.temperature, rollout.top_p, rollout.max_response_tokens)
    return _samples(engine, processor, rows, sampling, config.run.seed, iteration, judge)


def greedy_responses(
    engine: Engine, processor: ChatProcessor, rows: Sequence[Example], config: cfg.StageConfig
) -> list[Sample]:
    """The most likely response to each row."""
    return _samples(engine, processor, rows, Sampling(1, 0.0, 1.0, config.rollout.max_response_tokens), 0, 0)


def _samples(
    engine: Engine,
    processor: ChatProcessor,
    rows: Sequence[Example],
    sampling: Sampling,
    seed: int,
    iteration: int,
    judge: Judge = FIXED.judge,
) -> list[Sample]:
    requests = [
        RolloutRequest(processor.prompt_ids(row.messages), row.images, sample_seed(seed, iteration, row.id))
        for row in rows
    ]
    answers = engine.generate(requests, sampling)
    prompts = processor.encode_prompts(rows) if rows else []
    return [
        as_sample(processor, row, prompt, rollout, group, judge)
        for group, (row, prompt, rollouts) in enumerate(zip(rows, prompts, answers, strict=True))
        for rollout in rollouts
    ]


def as_sample(
    processor: ChatProcessor,
    example: Example,
    prompt: EncodedPrompt,
    rollout: Rollout,
    group: int,
    judge: Judge = FIXED.judge,
) -> Sample:
    """Judge a rollout. A sample outside the grammar has no response and is not correct."""
    response, correct = judge(rollout, example, processor)
    return Sample(example, prompt, rollout, response, correct, group)


def gallery_row(
    sample: Sample,
    stage: str,
    iteration: int,
    advantage: float,
    scores: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A rollout as it is kept in ``rollouts.jsonl`` and shown in the report; ``scores`` are (perception, reasoning)."""
    response = sample.response
    perception_score, reasoning_score = scores or (None, None)
    return {
        "stage": stage,
        "iteration": iteration,
        "policy_version": sample.rollout.policy_version,
        "sample_id": sample.example.id,
        "question": sample.example.messages[-1].content.replace("<image>", "").strip(),
        "image": sample.example.images[0] if sample.example.images else None,
        "response": sample.rollout.text,
        "caption": response.caption if response else None,
        "think": response.think if response else None,
        "answer": response.answer if response else None,
        "ground_truth": sample.example.answer,
        "correct": sample.correct,
        "format_valid": response is not None,
        "perception_score": perception_score,
        "reasoning_score": reasoning_score,
        "advantage": advantage,
    }
