"""Which passes an iteration's training part takes, and how many operations they are.

Each pass over the policy is charged for whole sequences, an image that several of them show once; so is a step of the
discriminator, in which pairs share their demonstration. Old and reference log-probabilities and scores are forward
only. Scoring is charged for what cannot be left out: a prompt once for each branch, and the last layer's experts for
the tokens that are read. Where the layout computes more (prompts again and again with Transformer Engine, images again
in every micro-batch), that is in neither MFU nor HFU, and both are the lower for it.
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
    """Sequences of this data-parallel rank through a ``model``: forward, and backward where it is ``trained``."""

    model: str  # POLICY, which the reference policy equals in size, or DISCRIMINATOR
    sequences: Sequence[TrainingSequence]
    trained: bool = True


def discriminator_passes(pairs: Sequence[Pair], config: WarmupConfig | AlignConfig) -> list[Pass]:
    """Every step on ``pairs``: distinct sequences and, under a gradient penalty, each demonstration once more."""
    distinct = {id(side): side for pair in pairs for side in (pair.teacher, pair.student)}
    if not isinstance(config, AlignConfig):
        return [Pass(DISCRIMINATOR, [*distinct.values()])]
    perturbed = {id(pair.teacher): pair.teacher for pair in pairs} if config.gradient_penalty else {}
    return [Pass(DISCRIMINATOR, [*distinct.values(), *perturbed.values()])] * config.discriminator_steps


def policy_passes(samples: Sequence[Sample], config: PolicyGradientConfig) -> list[Pass]:
    """Every update of an iteration and, before them, the log-probabilities that it is held to."""
    passes = []
    for part in mini_batches([sample.group for sample in samples], config.mini_batches_per_iteration):
        sequences = [samples[i].sequence() for i in part]
        held = has_several_updates(config) + bool(config.kl_coeff)
        passes += [Pass(POLICY, sequences, trained=False)] * held
        passes += [Pass(POLICY, sequences)] * config.epochs_per_iteration
    return passes


def operations(passes: Iterable[Pass], config: StageConfig, sizes: dict[str, HFSizes]) -> tuple[float, float]:
    """Of all passes: what the mathematics needs, and that with what is done twice. ``sizes`` are by model.

    The discriminator's are those of the checkpoint it is made from.
    """
    counted = [_operations(each, config, sizes[each.model]) for each in passes]
    return sum(flops.model for flops in counted), sum(flops.hardware for flops in counted)


def _operations(done: Pass, config: StageConfig, sizes: HFSizes) -> TrainingFlops:
    text, freeze, work = sizes.text, config.model.freeze, workload(done.sequences)
    if done.model == DISCRIMINATOR:
        assert isinstance(config, WarmupConfig | AlignConfig)
        wanted = config.discriminator
        text = text | upcycled_config(sizes, wanted.num_experts, wanted.topk, wanted.load_balance_coeff)["text_config"]
        heads = 2 if wanted.experts == "dedicated" else 1
        freeze, work = wanted.freeze, _scored(work, done, heads)
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
