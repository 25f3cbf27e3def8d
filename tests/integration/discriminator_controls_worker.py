"""Trains tiny discriminators on pairs of known content, for test_discriminator_controls.py."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prism_megatron import config as cfg
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_sft
from prism_megatron.data.pairs import Pair
from prism_megatron.data.response import parse_response
from prism_megatron.data.samples import Sample
from prism_megatron.method import FIXED, METHODS
from prism_megatron.observe import metrics as names
from prism_megatron.parallel import groups
from prism_megatron.stages.batcher import Batcher
from prism_megatron.stages.discriminator import DiscriminatorObjective, discriminator_step, score
from prism_megatron.stages.setup import TrainableModel, load_discriminator, load_processor
from prism_megatron.types import EncodedPrompt, Example, Rollout
from recipes.train import load

TRAINED_ROWS, ROWS_PER_STEP, STEPS = 24, 8, 24
OBJECTIVE = DiscriminatorObjective((0.5, 0.5))
SHORT_BRANCH = 20


@dataclass(frozen=True)
class Prompts:
    """Rows and their encoded prompts."""

    processor: ChatProcessor
    rows: Sequence[Example]
    prompts: Sequence[EncodedPrompt]

    def with_demonstrations(self, texts: Sequence[str]) -> Prompts:
        """Return the same rows with other demonstrations."""
        rows = []
        for row, text in zip(self.rows, texts, strict=True):
            response = parse_response(text)
            assert response is not None
            blocks = {"teacher_caption": response.caption_block, "teacher_reasoning": response.reasoning_block}
            rows.append(replace(row, response=text, **blocks))
        return Prompts(self.processor, rows, self.prompts)

    def samples(self, texts: Sequence[str], *, by_character: bool = False) -> list[Sample]:
        """Return a response to each row in its usual tokens, or in those of its characters."""
        samples = []
        for group, (row, prompt, text) in enumerate(zip(self.rows, self.prompts, texts, strict=True)):
            parts = list(text) if by_character else [text]
            ids = [token for part in parts for token in self.processor.encode_text(part)]
            ids.append(self.processor.terminator_id)
            rollout = Rollout(tuple(ids), (0.0,) * len(ids), text, finished=True, policy_version=None)
            samples.append(Sample(row, prompt, rollout, *FIXED.judge(rollout, row, self.processor), group))
        return samples


def fillers(prompts: Prompts, draw: random.Random) -> list[str]:
    """Return a text without content for each row, each block as long as that of some row."""
    real = [parse_response(row.response or "") for row in prompts.rows]
    lengths = [
        [len(prompts.processor.encode_text(block)) for r in real if r is not None for block in (getattr(r, name),)]
        for name in ("caption", "think")
    ]
    blocks = [["x " * draw.choice(of_rows) for of_rows in lengths] for _ in prompts.rows]
    return [f"<caption>{c}</caption>\n<think>{t}</think>\n<answer>x</answer>" for c, t in blocks]


def shuffled(pairs: list[Pair], coins: random.Random) -> list[Pair]:
    """Pairs whose sides are swapped when a coin says so."""
    return [Pair(p.student, p.teacher, p.sample_id) if coins.random() < 0.5 else p for p in pairs]


def accuracy_after_warmup(
    samples: list[Sample], processor: ChatProcessor, config: cfg.AlignConfig, coins: random.Random | None = None
) -> dict[str, float]:
    """Return the accuracy on the samples not trained on; a tie counts half."""
    trained = load_discriminator(config, config.discriminator_optimizer)
    batcher = Batcher.from_config(processor.input_spec, config)
    pairs = METHODS[config.compat].split(samples, processor, config)[1]  # two of each sample
    if coins is not None:
        pairs = shuffled(pairs, coins)
    for step in range(STEPS):
        start = step * ROWS_PER_STEP % TRAINED_ROWS
        batch = batcher.pairs(pairs[2 * start : 2 * (start + ROWS_PER_STEP)], OBJECTIVE.branch_weights)
        discriminator_step(trained, batch, OBJECTIVE, 1e-3)
    test_pairs = pairs[2 * TRAINED_ROWS :]
    sample_ids = ["row"] * len(test_pairs)
    gap = score(trained, batcher.scoring([p.teacher for p in test_pairs]), sample_ids)
    gap -= score(trained, batcher.scoring([p.student for p in test_pairs]), sample_ids)
    wins = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
    return {"wins": wins, "pairs": len(test_pairs)}


def compared(
    trained: TrainableModel, samples: list[Sample], processor: ChatProcessor, config: cfg.AlignConfig
) -> object:
    """Token ids that the discriminator scores for ``samples``, and the number of truncated pairs of its step."""
    students, pairs = METHODS[config.compat].split(samples, processor, config)
    batch = Batcher.from_config(processor.input_spec, config).pairs(pairs, OBJECTIVE.branch_weights)
    step = discriminator_step(trained, batch, OBJECTIVE, 0.0)
    return {
        "teachers": [pair.teacher.response_ids for pair in pairs],
        "students": [pair.student.response_ids for pair in pairs],
        "scored": [student.response_ids for student in students],
        "sampled": [sample.rollout.token_ids for sample in samples],
        "cut": step[names.CUT_PAIRS],
    }


def main(checkpoint: str, data: str, out: str) -> None:
    overrides = [f"model.hf_checkpoint={checkpoint}", f"discriminator.hf_checkpoint={checkpoint}"]
    config, reference, short = (
        load("tiny_align", [*overrides, *more])
        for more in ([], ["compat=reference"], [f"discriminator.max_branch_tokens={SHORT_BRANCH}"])
    )
    assert isinstance(config, cfg.AlignConfig)
    assert isinstance(reference, cfg.AlignConfig)
    assert isinstance(short, cfg.AlignConfig)
    groups.initialize(config.parallel, 1)
    processor = load_processor(config)
    rows = read_sft(Path(data))
    prompts = Prompts(processor, rows, processor.encode_prompts(rows))
    texts = [row.response or "" for row in rows]
    draw = random.Random(0)

    # The student writes as the teacher does, but for one character, which every block has.
    true = prompts.samples([text.replace(":", ";") for text in texts])
    empty = prompts.with_demonstrations(fillers(prompts, draw)).samples(fillers(prompts, draw))
    metrics: dict[str, object] = {
        "true": accuracy_after_warmup(true, processor, config),
        "shuffled": accuracy_after_warmup(true, processor, config, draw),
        "filler": accuracy_after_warmup(empty, processor, config),
        "filler_reference": accuracy_after_warmup(empty, processor, reference),
    }

    few = Prompts(processor, rows[:2], prompts.prompts[:2])
    long = [text.replace("<think>", "<think>" + 300 * "so ") for text in texts[:2]]
    same = few.with_demonstrations(long).samples(long, by_character=True)
    trained = load_discriminator(config, config.discriminator_optimizer)
    metrics["same"] = compared(trained, same, processor, config)
    metrics["same_short"] = compared(trained, same, processor, short)
    metrics["longer"] = compared(trained, few.with_demonstrations(long).samples(texts[:2]), processor, short)
    Path(out).write_text(json.dumps(metrics))
    groups.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
