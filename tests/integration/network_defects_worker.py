"""Measures on a tiny discriminator what test_network_defects.py asserts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.parallel import cpu

cpu.install()

from prism_megatron import config as cfg  # noqa: E402
from prism_megatron.data.branches import branch_sequences  # noqa: E402
from prism_megatron.data.dataset import read_alignment  # noqa: E402
from prism_megatron.optim.step import Stats, train_step  # noqa: E402
from prism_megatron.parallel import groups  # noqa: E402
from prism_megatron.stages import discriminator as adversary  # noqa: E402
from prism_megatron.stages.microbatch import pack_for_scoring, pack_microbatch  # noqa: E402
from prism_megatron.stages.setup import Trained, load_discriminator, load_processor  # noqa: E402
from prism_megatron.train import load  # noqa: E402
from prism_megatron.types import PackedBatch  # noqa: E402


def discriminator(config: cfg.AlignConfig) -> Trained:
    trained = load_discriminator(config, config.discriminator_optimizer)
    with torch.no_grad():  # heads start at zero, and would give every sequence the same score
        head = trained.chunks[-1].module.score_heads.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return trained


# Where every token takes every expert of its group, the share of each expert is constant, and so is the loss.
BALANCED = {
    "shared": ["discriminator.experts=shared"],
    "dedicated": ["discriminator.experts=dedicated", "discriminator.num_experts=8"],
    "all_chosen": ["discriminator.experts=dedicated"],
}


def balance_gradient(overrides: list[str], batch: PackedBatch) -> Tensor:
    """The routers' gradients of a step whose loss is the load-balancing loss alone."""
    config = load("tiny_align", overrides)
    assert isinstance(config, cfg.AlignConfig)
    trained = discriminator(config)
    train_step(
        trained.chunks,
        trained.optimizer,
        [batch],
        lambda chunk, packed: chunk(packed, 1.0),
        lambda _, scores: (0.0 * scores.sum(), Stats({})),
        lr=0.0,
    )
    named = [pair for chunk in trained.chunks for pair in chunk.module.named_parameters()]
    return torch.cat([parameter.main_grad.flatten() for name, parameter in named if name.endswith("router.weight")])


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
    owners = [str(i) for i in range(len(sequences))]
    measured: dict[str, object] = {}

    trained = discriminator(config)
    together = adversary.score(trained, sequences, owners, processor, config)
    alone = [adversary.score(trained, [s], ["x"], processor, config) for s in sequences]
    measured["spread"] = float(together.std())
    measured["alone_differs"] = float((together - torch.cat(alone)).abs().max())

    first, second = sequences[:2]
    texts = [first.response_ids, *(s.response_ids for s in sequences[2:])]
    started_alike = [replace(one, response_ids=ids) for ids in texts for one in (first, second)]
    shared = adversary.score(trained, started_alike, ["x"] * len(started_alike), processor, config)
    apart = [adversary.score(trained, [s], ["x"], processor, config) for s in started_alike]
    measured["shared_tokens"] = len(pack_for_scoring(started_alike, processor, config).tokens)
    measured["whole_tokens"] = sum(map(len, started_alike))
    measured["shared_spread"] = float(shared.std())
    measured["shared_differs"] = float((shared - torch.cat(apart)).abs().max())

    batch = pack_microbatch(sequences, processor, config)
    for name, setting in BALANCED.items():
        plain, recomputed = (
            balance_gradient([*overrides, *setting, f"model.recompute={recompute}"], batch)
            for recompute in ("false", "true")
        )
        measured[f"{name}_gradient"] = float(plain.abs().max())
        measured[f"{name}_recompute_differs"] = float((plain - recomputed).abs().max())

    half = load("tiny_align", [*overrides, "model.precision=bf16"])
    assert isinstance(half, cfg.AlignConfig)
    coarse = discriminator(half)
    measured["head_dtype"] = str(coarse.chunks[-1].module.score_heads.weight.dtype)
    scores = adversary.score(coarse, sequences, owners, processor, half)
    measured["score_dtype"] = str(scores.dtype)
    measured["rounded"] = bool((scores == scores.bfloat16().float()).all())
    try:
        with torch.no_grad():
            trained.chunks[-1].module.score_heads.weight[0, 0] = float("nan")
        adversary.score(trained, sequences, owners, processor, config)
    except FloatingPointError as error:
        measured["refused"] = str(error)
    Path(out).write_text(json.dumps(measured))
    groups.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
