"""Evaluation of a policy on held-out questions, and the end of every stage that trains a policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from prism_megatron import config as cfg
from prism_megatron.data import shapes
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.samples import Sample
from prism_megatron.files import write_atomic
from prism_megatron.observe import metrics as names
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_data_parallel, sum_over_data_parallel
from prism_megatron.rollout.interface import Engine
from prism_megatron.stages.rollouts import Sampler, fit_prompts, push_weights, start_engine
from prism_megatron.stages.setup import (
    Stage,
    TrainableModel,
    mark_finished,
    read_options,
)

RESULTS = "results.json"
_Z95 = 1.959964  # two-sided 95 % normal quantile


def export_and_evaluate(
    stage: Stage, policy: TrainableModel, processor: ChatProcessor, engine: Engine | None = None
) -> None:
    """Export the trained policy to ``hf/``, evaluate it, and mark the stage as finished."""
    config = stage.config
    assert isinstance(config, cfg.PolicyTrainingConfig)
    policy.export(stage.dir / "hf")
    if not config.eval.num_questions:
        mark_finished(stage, {})
        return
    engine = engine or start_engine(config, stage.dir / "hf")
    push_weights(engine, policy, config.run.train_iters, config.rollout)
    result = evaluate(Sampler(engine, processor, config))
    if groups.is_main_rank():
        write_atomic(stage.dir / RESULTS, json.dumps([result], indent=2) + "\n")
        print(
            f"{config.stage}: accuracy {result['accuracy']:.3f} on {result['num_questions']} held-out questions, "
            f"format valid {result['format_valid']:.3f}",
            flush=True,
        )
    mark_finished(stage, {"result": result})


def evaluate(sampler: Sampler) -> dict[str, Any]:
    """Return greedy accuracy and format validity with 95 % Wilson intervals, and the built-in task's own measures."""
    config = sampler.config
    assert isinstance(config, cfg.PolicyTrainingConfig)
    assert config.eval.num_questions is not None
    rows = fit_prompts(read_rlvr(config.eval.data, read_options(config)), sampler.processor, config)
    count = min(config.eval.num_questions, len(rows))
    local = shard_for_rank(range(count), groups.data_parallel_rank(), groups.data_parallel_size())
    samples = sampler.greedy([rows[i] for i in local])
    outcomes = gather_over_data_parallel([_outcome(sample) for sample in samples])
    correct = sum(outcome["correct"] for outcome in outcomes)
    valid = sum(outcome["valid"] for outcome in outcomes)
    result: dict[str, Any] = {
        "stage": config.stage,
        "accuracy": correct / len(outcomes),
        "accuracy_ci95": wilson_interval(correct, len(outcomes)),
        "format_valid": valid / len(outcomes),
        "format_valid_ci95": wilson_interval(valid, len(outcomes)),
        "num_questions": len(outcomes),
        "response_tokens": sum(outcome["tokens"] for outcome in outcomes) / len(outcomes),
    }
    for measure in ("caption_recall", "step_correct"):
        values = [outcome[measure] for outcome in outcomes if outcome[measure] is not None]
        if values:
            mean = sum(values) / len(values)
            result[measure] = mean
            result[f"{measure}_stderr"] = math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    return result


def response_metrics(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Return means over all ranks' samples: accuracy, format validity, length, and the fraction cut at its limit."""
    correct, valid, tokens, cut, count = sum_over_data_parallel(
        sum(s.correct for s in samples),
        sum(s.response is not None for s in samples),
        sum(len(s.rollout.token_ids) for s in samples),
        sum(not s.rollout.finished for s in samples),
        len(samples),
    )
    return {
        names.ACCURACY: correct / count,
        names.FORMAT_VALID: valid / count,
        names.RESPONSE_TOKENS: tokens / count,
        names.CUT_RESPONSES: cut / count,
    }


def wilson_interval(successes: int, trials: int) -> list[float]:
    """Return Wilson's 95 % interval of a proportion, to six digits; it is valid at 0 and 1, unlike the normal one."""
    p, z2 = successes / trials, _Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return [round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)]


def _outcome(sample: Sample) -> dict[str, Any]:
    """Return the counts of one answer. Captions and steps can be verified in the built-in task only."""
    caption_recall = step_correct = None
    if sample.example.data_source == shapes.DATA_SOURCE:
        response = sample.response
        scene, question = shapes.scene_of(sample.example), shapes.question_of(sample.example)
        caption_recall = shapes.caption_recall(scene, response.caption) if response else 0.0
        step_correct = shapes.step_correct(scene, question, response.think) if response else 0.0
    return {
        "correct": sample.correct,
        "valid": sample.response is not None,
        "tokens": len(sample.rollout.token_ids),
        "caption_recall": caption_recall,
        "step_correct": step_correct,
    }
