"""Passes of an iteration's training part, and their operations.

A pass over the policy counts full sequences, and an image once even if several sequences show it; so does a step of the
discriminator, in which pairs share their demonstration. Old and reference log-probabilities and scores are forward
only. Scoring counts only necessary operations: a prompt once per branch, and the last layer's experts for the tokens
that are read. If the layout computes more (a prompt per sequence with Transformer Engine, an image per micro-batch),
MFU and HFU do not count it and are lower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prism_megatron.config import AlignConfig, PolicyGradientConfig, StageConfig, WarmupConfig
from prism_megatron.convert.upcycle import upcycled_config
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair
from prism_megatron.data.samples import Sample
from prism_megatron.model.sizes import HFSizes
from prism_megatron.observe.flops import TrainingFlops, Workload, forward_flops, training_flops
from prism_megatron.stages.batcher import mini_batches, workload
from prism_megatron.stages.policy import has_several_updates

POLICY, DISCRIMINATOR = "policy", "discriminator"


@dataclass(frozen=True)
class Pass:
    """Pass of this data-parallel rank's sequences through a ``model``: forward, and backward if ``trained``."""

    model: str  # POLICY (of the reference policy's size) or DISCRIMINATOR
    sequences: Sequence[TrainingSequence]
    trained: bool = True


def discriminator_passes(pairs: Sequence[Pair], config: WarmupConfig | AlignConfig) -> list[Pass]:
    """Return the steps on ``pairs``: distinct sequences and, with a gradient penalty, each demonstration again."""
    distinct = {id(side): side for pair in pairs for side in (pair.teacher, pair.student)}
    if not isinstance(config, AlignConfig):
        return [Pass(DISCRIMINATOR, [*distinct.values()])]
    perturbed = {id(pair.teacher): pair.teacher for pair in pairs} if config.gradient_penalty else {}
    return [Pass(DISCRIMINATOR, [*distinct.values(), *perturbed.values()])] * config.discriminator_steps


def policy_passes(samples: Sequence[Sample], config: PolicyGradientConfig) -> list[Pass]:
    """Return the updates of an iteration and, before them, old and reference log-probabilities."""
    passes = []
    for part in mini_batches([sample.group for sample in samples], config.mini_batches_per_iteration):
        sequences = [samples[i].sequence() for i in part]
        scored = has_several_updates(config) + bool(config.kl_coeff)
        passes += [Pass(POLICY, sequences, trained=False)] * scored
        passes += [Pass(POLICY, sequences)] * config.epochs_per_iteration
    return passes


def operations(passes: Iterable[Pass], config: StageConfig, sizes: dict[str, HFSizes]) -> tuple[float, float]:
    """Return the operations of all passes: necessary ones, and all including recomputation.

    ``sizes`` are by model; the discriminator's are those of the checkpoint it is upcycled from.
    """
    counted = [_operations(each, config, sizes[each.model]) for each in passes]
    return sum(flops.model for flops in counted), sum(flops.hardware for flops in counted)


def _operations(done: Pass, config: StageConfig, sizes: HFSizes) -> TrainingFlops:
    text, freeze, work = sizes.text, config.model.freeze, workload(done.sequences)
    if done.model == DISCRIMINATOR:
        assert isinstance(config, WarmupConfig | AlignConfig)
        settings = config.discriminator
        upcycled = upcycled_config(sizes, settings.num_experts, settings.topk, settings.load_balance_coeff)
        text = text | upcycled["text_config"]
        heads = 2 if settings.experts == "dedicated" else 1
        freeze, work = settings.freeze, _scored(work, done, heads)
    if not done.trained:
        return forward_flops(text, sizes.vision, work)
    return training_flops(text, sizes.vision, work, freeze, config.model.recompute)


def _scored(work: Workload, done: Pass, heads: int) -> Workload:
    """The discriminator's work: a score of each sequence in place of the vocabulary's logits."""
    count = len(done.sequences)
    work = replace(work, scored_tokens=0, scored_sequences=count, score_heads=heads)
    if done.trained:
        return work
    known, seen = [], set[tuple[int, int | None]]()
    for sequence in done.sequences:
        key = (id(sequence.prompt), sequence.branch)
        known += [len(sequence.prompt.token_ids)] if key in seen else []
        seen.add(key)
    return replace(work, known_prefixes=known, read_tokens=count)
