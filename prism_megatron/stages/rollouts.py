"""The rollout engine in a stage: starting it, pushing weights, sampling and judging responses."""

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
from prism_megatron.data.lazy import Rows
from prism_megatron.data.lengths import LengthLimit, fit_image_counts, fit_lengths
from prism_megatron.data.samples import Sample
from prism_megatron.data.seeds import sample_seed
from prism_megatron.method import FIXED, Judge
from prism_megatron.reward import symbolic
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.rollout.interface import Engine, EngineConfig, Sampling
from prism_megatron.rollout.subprocess_engine import SubprocessEngine
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.types import Example, PreferencePair, RolloutRequest


@dataclass(frozen=True)
class PolicyWeights:
    """The policy's weights under their HF names; every iteration over them gathers them from all ranks again."""

    policy: TrainableModel
    bucket_bytes: int

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return export_weights(self.policy.chunks, self.policy.table, self.bucket_bytes)


def fit_prompts[R: (Example, PreferencePair)](
    rows: Rows[R], processor: ChatProcessor, config: cfg.StageConfig
) -> Rows[R]:
    """Return the rows whose prompts the engine takes; raise UserError naming the others if they are not dropped."""
    rollout, drop = config.rollout, config.dataset.overlong != "error"
    room = rollout.max_model_len - rollout.max_response_tokens
    if isinstance(rollout, cfg.EngineRollout):  # the warm-up has none
        rows = fit_image_counts(rows, rollout.images_per_prompt, drop=drop)
    return fit_lengths(rows, processor, LengthLimit(room, "raise rollout.max_model_len, or drop the row"), drop=drop)


def start_engine(config: cfg.StageConfig, checkpoint: Path) -> Engine:
    """Start a vLLM engine in this process or in subprocesses, with the checkpoint's weights.

    Raises RuntimeError without math-verify, which judges the answers.
    """
    symbolic.start()
    rollout = config.rollout
    assert isinstance(rollout, cfg.EngineRollout)
    engine_config = EngineConfig(
        tensor_parallel_size=rollout.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size,
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}[config.model.precision],
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        seed=config.run.seed,
        timeout_seconds=rollout.timeout_seconds,
        bucket_bytes=rollout.sync_bucket_mib << 20,
        transport=rollout.transport,
        sleep_level=rollout.sleep_level if isinstance(rollout, cfg.RolloutConfig) else 0,
        images_per_prompt=rollout.images_per_prompt,
        min_pixels=config.dataset.min_pixels,
        max_pixels=config.dataset.max_pixels,
    )
    if rollout.engine == "child":
        return SubprocessEngine(checkpoint, engine_config, cfg.stage_dir(config) / f"engine_{dist.get_rank()}.log")
    return RolloutEngine(checkpoint, engine_config)


def push_weights(engine: Engine, policy: TrainableModel, version: int, config: cfg.EngineRollout) -> None:
    """Wake the engine and push the policy's current weights to it. Collective."""
    sync = WeightSync(version, export_manifest(policy.chunks, policy.table), config.sync_checksums)
    engine.wake("weights")
    engine.update_weights(PolicyWeights(policy, config.sync_bucket_mib << 20), sync)
    engine.wake("kv_cache")


@dataclass(frozen=True)
class Sampler:
    """Samples responses to rows from the engine; ``judge`` parses and verifies them."""

    engine: Engine
    processor: ChatProcessor
    config: cfg.StageConfig
    judge: Judge = FIXED.judge

    def sample(self, rows: Sequence[Example], iteration: int) -> list[Sample]:
        """Sample ``samples_per_prompt`` responses to each row, in order. Collective, also for ranks without rows.

        Seeds depend on run, iteration and row only.
        """
        rollout = self.config.rollout
        assert isinstance(rollout, cfg.SampledRollout)
        sampling = Sampling(rollout.samples_per_prompt, rollout.temperature, rollout.top_p, rollout.max_response_tokens)
        return self._generate(rows, sampling, [sample_seed(self.config.run.seed, iteration, row.id) for row in rows])

    def greedy(self, rows: Sequence[Example]) -> list[Sample]:
        """Generate the greedy response to each row. Collective."""
        sampling = Sampling(1, 0.0, 1.0, self.config.rollout.max_response_tokens)
        return self._generate(rows, sampling, [sample_seed(0, 0, row.id) for row in rows])

    def _generate(self, rows: Sequence[Example], sampling: Sampling, seeds: Sequence[int]) -> list[Sample]:
        requests = [
            RolloutRequest(self.processor.prompt_ids(row.messages), row.images, seed)
            for row, seed in zip(rows, seeds, strict=True)
        ]
        answers = self.engine.generate(requests, sampling)
        prompts = self.processor.encode_prompts(rows) if rows else []
        return [
            Sample(row, prompt, rollout, *self.judge(rollout, row, self.processor), group)
            for group, (row, prompt, rollouts) in enumerate(zip(rows, prompts, answers, strict=True))
            for rollout in rollouts
        ]


def gallery_row(
    sample: Sample,
    stage: str,
    iteration: int,
    advantage: float,
    scores: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return a rollout's line of ``rollouts.jsonl``.

    Args:
        sample: The rollout with its prompt and verdict.
        stage: The stage's name.
        iteration: Counts from 1.
        advantage: What the policy was trained with.
        scores: The discriminator's (perception, reasoning), None without a discriminator or outside the grammar.
    """
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
