"""Runs a tiny discriminator, for test_network_defects.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron import config as cfg
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_alignment
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair, response_noise
from prism_megatron.data.response import parse_response
from prism_megatron.data.samples import Sample
from prism_megatron.loss.discriminator import gradient_penalty as penalty_of
from prism_megatron.optim.step import Stats, train_step
from prism_megatron.parallel import groups
from prism_megatron.stages.batcher import Batcher
from prism_megatron.stages.discriminator import score
from prism_megatron.stages.replay import Replay
from prism_megatron.stages.setup import TrainableModel, load_discriminator, load_processor
from prism_megatron.types import Example, PackedBatch, Rollout
from recipes.train import load


def discriminator(config: cfg.AlignConfig) -> TrainableModel:
    trained = load_discriminator(config, config.discriminator_optimizer)
    with torch.no_grad():  # heads start at zero: all scores would be equal
        head = trained.chunks[-1].module.score_heads.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return trained


BALANCED = {
    "shared": ["discriminator.experts=shared"],
    "dedicated": ["discriminator.experts=dedicated"],
}


def balance_gradient(overrides: list[str], batch: PackedBatch, factor: float = 0.0) -> Tensor:
    """Return the routers' gradients of a step on load balancing plus ``factor`` times the scores."""
    config = load("tiny_align", overrides)
    assert isinstance(config, cfg.AlignConfig)
    trained = discriminator(config)
    train_step(
        trained.chunks,
        trained.optimizer,
        [batch],
        lambda chunk, packed: chunk(packed, 1.0),
        lambda _, scores: (factor * scores.sum(), Stats({})),
        lr=0.0,
    )
    named = [pair for chunk in trained.chunks for pair in chunk.module.named_parameters()]
    return torch.cat([parameter.main_grad.flatten() for name, parameter in named if name.endswith("router.weight")])


def gradient_penalty(trained: TrainableModel, sequence: TrainingSequence, batcher: Batcher) -> dict[str, float]:
    """Return R1 of a sequence's embedded response by differentiation, and the mean of many estimates."""
    module, std, draws = trained.chunks[0].module.eval(), 1e-3, 512
    width = trained.sizes.text["hidden_size"]
    plain = batcher.pack([sequence])
    shift = torch.zeros(len(plain.tokens), width, requires_grad=True)
    unperturbed = module(replace(plain, embedding_noise=shift))
    (gradient,) = torch.autograd.grad(unperturbed.sum(), shift)
    many = batcher.pack([replace(sequence) for _ in range(draws)])
    pairs = [Pair(sequence, sequence, str(draw)) for draw in range(draws)]
    noise = response_noise(many, pairs, width, seed=1, step=0)
    with torch.no_grad():
        perturbed = module(replace(many, embedding_noise=std * noise))
    weights = torch.full((draws,), 1 / draws)
    estimate = penalty_of(perturbed, unperturbed.detach().expand(draws), weights, std=std)
    response = gradient[len(sequence.prompt.token_ids) :]
    return {"r1": float(response.square().sum() / 2), "r1_estimate": float(estimate)}


def replay(config: cfg.AlignConfig, processor: ChatProcessor, rows: list[Example]) -> dict[str, object]:
    """Return content and draws of a buffer of two prompts, two responses each, after responses to three prompts."""
    config = replace(config, replay=cfg.ReplayConfig(prompts=2, responses_per_prompt=2, responses_per_iteration=3))
    buffer = Replay(rows, processor, config)
    nothing = buffer.pairs(0)
    for number in (0, 1, 0, 2, 0):
        row = rows[number]
        assert row.response is not None
        rollout = Rollout((1,), (0.0,), row.response, finished=True, policy_version=None)
        response = parse_response(row.response)
        buffer.add([Sample(row, processor.encode_prompts([row])[0], rollout, response, False, 0)] * 2)
        buffer.add([Sample(row, processor.encode_prompts([row])[0], rollout, None, False, 0)])
    short = replace(config, discriminator=replace(config.discriminator, max_branch_tokens=10))
    cut = Replay(rows, processor, short, buffer.responses).pairs(7)
    drawn, again = (b.pairs(7) for b in (buffer, Replay(rows, processor, config, buffer.responses)))
    return {
        "replay_size": {number: len(buffer.responses.get(rows[number].id, [])) for number in range(3)},
        "replay_nothing": len(nothing),
        "replay_drawn": [(pair.sample_id, pair.branch, pair.is_on_policy) for pair in drawn],
        "replay_again": [pair.student.response_ids for pair in drawn] == [pair.student.response_ids for pair in again],
        "replay_cut": [(pair.cut, len(pair.teacher.response_ids), len(pair.student.response_ids)) for pair in cut],
        "replay_same_text": all(pair.student.response_ids == pair.teacher.response_ids for pair in drawn),
    }


def main(checkpoint: str, data: str, out: str) -> None:
    overrides = [f"model.hf_checkpoint={checkpoint}", f"discriminator.hf_checkpoint={checkpoint}"]
    config = load("tiny_align", [*overrides, "model.recompute=true"])
    assert isinstance(config, cfg.AlignConfig)
    groups.initialize(config.parallel, 1)
    processor = load_processor(config)
    rows = read_alignment(Path(data))[:3]
    sequences = []
    for row, prompt in zip(rows, processor.encode_prompts(rows), strict=True):
        assert row.teacher_caption is not None
        assert row.teacher_reasoning is not None
        sequences += branch_sequences(
            processor, prompt, row.teacher_caption * (1 + len(sequences)), row.teacher_reasoning
        )
    sample_ids = [str(i) for i in range(len(sequences))]
    batcher = Batcher.from_config(processor.input_spec, config)
    metrics: dict[str, object] = {}

    trained = discriminator(config)
    together = score(trained, batcher.scoring(sequences), sample_ids)
    alone = [score(trained, batcher.scoring([s]), ["x"]) for s in sequences]
    metrics["spread"] = float(together.std())
    metrics["alone_differs"] = float((together - torch.cat(alone)).abs().max())

    packed, module = batcher.pack(sequences), trained.chunks[0].module
    with torch.no_grad():
        in_training, in_evaluation = module.train()(packed), module.eval()(packed)
    metrics["dropout_differs"] = float((in_training - in_evaluation).abs().max())

    first, second = sequences[:2]
    texts = [first.response_ids, *(s.response_ids for s in sequences[2:])]
    same_prompt = [replace(one, response_ids=ids) for ids in texts for one in (first, second)]
    shared = score(trained, batcher.scoring(same_prompt), ["x"] * len(same_prompt))
    separate = [score(trained, batcher.scoring([s]), ["x"]) for s in same_prompt]
    metrics["shared_tokens"] = sum(len(batch.tokens) for batch in batcher.scoring(same_prompt))
    metrics["total_tokens"] = sum(map(len, same_prompt))
    metrics["shared_spread"] = float(shared.std())
    metrics["shared_differs"] = float((shared - torch.cat(separate)).abs().max())

    metrics |= gradient_penalty(trained, sequences[1], batcher)
    metrics |= replay(config, processor, rows)

    batch = batcher.pack(sequences)
    for name, setting in BALANCED.items():
        plain, recomputed = (
            balance_gradient([*overrides, *setting, f"model.recompute={recompute}"], batch)
            for recompute in ("false", "true")
        )
        metrics[f"{name}_gradient"] = float(plain.abs().max())
        metrics[f"{name}_recompute_differs"] = float((plain - recomputed).abs().max())

    half = load("tiny_align", [*overrides, "model.precision=bf16"])
    assert isinstance(half, cfg.AlignConfig)
    coarse = discriminator(half)
    metrics["head_dtype"] = str(coarse.chunks[-1].module.score_heads.weight.dtype)
    scores = score(coarse, Batcher.from_config(processor.input_spec, half).scoring(sequences), sample_ids)
    metrics["score_dtype"] = str(scores.dtype)
    metrics["rounded"] = bool((scores == scores.bfloat16().float()).all())
    try:
        with torch.no_grad():
            trained.chunks[-1].module.score_heads.weight[0, 0] = float("nan")
        score(trained, batcher.scoring(sequences), sample_ids)
    except FloatingPointError as error:
        metrics["refused"] = str(error)
    try:
        balance_gradient(overrides, batch, factor=float("nan"))
    except FloatingPointError as error:
        metrics["gradient_refused"] = str(error)
    Path(out).write_text(json.dumps(metrics))
    groups.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
