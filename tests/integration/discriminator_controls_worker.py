"""Trains tiny discriminators on pairs of known content, and measures what test_discriminator_controls.py asserts."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from prism_megatron.parallel import cpu

cpu.install()

from prism_megatron import config as cfg  # noqa: E402
from prism_megatron.data.branches import (  # noqa: E402
    branch_sequences,
    reference_student_sequences,
    reference_teacher_sequences,
)
from prism_megatron.data.chat import ChatProcessor  # noqa: E402
from prism_megatron.data.dataset import read_sft  # noqa: E402
from prism_megatron.data.response import parse_response  # noqa: E402
from prism_megatron.parallel import groups  # noqa: E402
from prism_megatron.stages.discriminator import (  # noqa: E402
    DiscriminatorObjective,
    Pair,
    discriminator_step,
    score,
)
from prism_megatron.stages.setup import load_discriminator, load_processor  # noqa: E402
from prism_megatron.train import load  # noqa: E402
from prism_megatron.types import EncodedPrompt  # noqa: E402

TRAINED_ROWS, ROWS_PER_STEP, STEPS = 24, 8, 24


def true_pairs(processor: ChatProcessor, prompt: EncodedPrompt, text: str) -> list[Pair]:
    """The student writes as the teacher does, but for one character, which every block has."""
    teacher, student = parse_response(text), parse_response(text.replace(":", ";"))
    assert teacher is not None
    assert student is not None
    sides = (branch_sequences(processor, prompt, r.caption_block, r.reasoning_block) for r in (teacher, student))
    return [Pair(t, s, "row") for t, s in zip(*sides, strict=True)]


def filler_pairs(processor: ChatProcessor, prompt: EncodedPrompt, text: str, compat: str) -> list[Pair]:
    """Both sides say nothing, as long as the row's own blocks."""
    real = parse_response(text)
    assert real is not None
    caption, think = ("x " * (len(processor.encode_text(block)) - 4) for block in (real.caption, real.think))
    empty = f"<caption>{caption}</caption>\n<think>{think}</think>\n<answer>x</answer>"
    response = parse_response(empty)
    assert response is not None
    blocks = (response.caption_block, response.reasoning_block)
    if compat == "fixed":
        teacher, student = (branch_sequences(processor, prompt, *blocks) for _ in range(2))
    else:
        teacher = reference_teacher_sequences(processor, prompt, *blocks)
        sampled = (*processor.encode_text(empty), processor.terminator_id)
        student = reference_student_sequences(processor, prompt, sampled, response)
    return [Pair(t, s, "row") for t, s in zip(teacher, student, strict=True)]


def shuffled(pairs: list[Pair], coins: random.Random) -> list[Pair]:
    """Which side is called the teacher is decided by a coin."""
    return [Pair(p.student, p.teacher, p.owner) if coins.random() < 0.5 else p for p in pairs]


def accuracy_after_warmup(
    rows: list[list[Pair]], processor: ChatProcessor, config: cfg.AlignConfig
) -> dict[str, float]:
    """Accuracy on the rows not trained on, a tie being half a win."""
    trained = load_discriminator(config, config.discriminator_optimizer)
    objective = DiscriminatorObjective((0.5, 0.5))
    for step in range(STEPS):
        start = step * ROWS_PER_STEP % TRAINED_ROWS
        pairs = [pair for row in rows[start : start + ROWS_PER_STEP] for pair in row]
        discriminator_step(trained, pairs, processor, config, objective, 1e-3)
    held_out = [pair for row in rows[TRAINED_ROWS:] for pair in row]
    owners = ["row"] * len(held_out)
    gap = score(trained, [p.teacher for p in held_out], owners, processor, config)
    gap -= score(trained, [p.student for p in held_out], owners, processor, config)
    wins = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
    return {"wins": wins, "ties": float((gap == 0).sum()), "pairs": len(held_out)}


def main(checkpoint: str, data: str, out: str) -> None:
    config = load("tiny_align", [f"model.hf_checkpoint={checkpoint}", f"discriminator.hf_checkpoint={checkpoint}"])
    assert isinstance(config, cfg.AlignConfig)
    groups.initialize(config.parallel, 1)
    processor = load_processor(config)
    rows = read_sft(Path(data))
    texts = [row.response or "" for row in rows]
    prompts = processor.encode_prompts(rows)
    true = [true_pairs(processor, p, t) for p, t in zip(prompts, texts, strict=True)]
    coins = random.Random(0)
    kinds = {
        "true": true,
        "shuffled": [shuffled(pairs, coins) for pairs in true],
        "filler": [filler_pairs(processor, p, t, "fixed") for p, t in zip(prompts, texts, strict=True)],
        "filler_reference": [filler_pairs(processor, p, t, "reference") for p, t in zip(prompts, texts, strict=True)],
    }
    measured = {kind: accuracy_after_warmup(pairs, processor, config) for kind, pairs in kinds.items()}
    Path(out).write_text(json.dumps(measured))
    groups.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
