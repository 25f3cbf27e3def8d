"""Training part of each stage's iteration, from the functions that the stage calls, without an engine.

``sft`` and ``warmup`` start from encoded rows, ``align`` and ``rlvr`` from synthetic responses:

    sft     a step on the demonstrations
    warmup  a step of the discriminator on a pair of each branch for every row
    align   all branches scored, the discriminator's steps, the policy's updates (``align_step`` of ``stages/align.py``)
    rlvr    advantages of verdicts, old and reference log-probabilities where there are any, the policy's updates

Tokens of a step are its rows' (``sft``), both sides' of all pairs (``warmup``), or all prompts' with their responses
(``align``, ``rlvr``), each sequence once, however many passes are taken over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prism_megatron.config import AlignConfig, RLVRConfig, SFTConfig, WarmupConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.observe import metrics as names
from prism_megatron.observe.timers import Timers
from prism_megatron.parallel import groups
from prism_megatron.stages import setup
from prism_megatron.stages.align import align_step, load_align_models
from prism_megatron.stages.batcher import Batcher
from prism_megatron.stages.discriminator import discriminator_step
from prism_megatron.stages.policy import policy_gradient_step, sft_step
from prism_megatron.stages.replay import Replay
from prism_megatron.stages.rlvr import verified_advantages
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.stages.warmup import OBJECTIVE
from tools.bench.inputs import BATCHES, Settings, TrainingConfig, rows_per_step, training_sequences
from tools.bench.passes import DISCRIMINATOR, POLICY, Pass, discriminator_passes, policy_passes
from tools.bench.synthetic_rollouts import Group, preference_rows, sampled_groups

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Done:
    """Metrics of a step, as its stage logs them, and the passes of this data-parallel rank."""

    metrics: Metrics
    passes: Sequence[Pass]


@dataclass(frozen=True)
class Training:
    """Training part of a stage; ``step`` n is on batch n modulo ``BATCHES``.

    ``tokens`` count each batch on all ranks. ``models`` take part in the step. ``loss`` is the metric that is reported
    as the loss. ``encode_seconds`` is the time to encode a row, before any step. ``timers`` have the seconds of the
    stage's own phases. ``rows`` are the batches of ``sft``.
    """

    step: Callable[[int], Done]
    tokens: Sequence[int]
    models: Mapping[str, TrainableModel]
    loss: str
    encode_seconds: float
    timers: Timers = field(default_factory=Timers)
    rows: Sequence[Sequence[TrainingSequence]] = ()


def load_training(settings: Settings, config: TrainingConfig, processor: ChatProcessor) -> Training:
    """Encode rows and load the stage's models. Raises UserError for settings that cannot run."""
    if isinstance(config, SFTConfig):
        return _sft(settings, config, processor)
    if isinstance(config, WarmupConfig):
        return _warmup(settings, config, processor)
    if isinstance(config, AlignConfig):
        return _align(settings, config, processor)
    return _rlvr(settings, config, processor)


def sft_training(
    policy: TrainableModel, config: SFTConfig, processor: ChatProcessor
) -> Callable[[Sequence[TrainingSequence]], Metrics]:
    """Return a step on this data-parallel rank's part of a global batch, at the recipe's learning rate."""

    batcher = Batcher.from_config(processor.input_spec, config)

    def step(batch: Sequence[TrainingSequence]) -> Metrics:
        sample_ids = [f"row {number}" for number in _local_rows(range(len(batch)))]
        return sft_step(policy, batcher.sft(_local_rows(batch), sample_ids), config.optimizer.lr)

    return step


def _sft(settings: Settings, config: SFTConfig, processor: ChatProcessor) -> Training:
    batches, seconds = _encoded(lambda count: training_sequences(settings, config, processor, count), config)
    policy = setup.load_policy(config)
    train = sft_training(policy, config, processor)

    def step(number: int) -> Done:
        batch = batches[number % BATCHES]
        return Done(train(batch), [Pass(POLICY, _local_rows(batch))])

    tokens = [sum(map(len, batch)) for batch in batches]
    return Training(step, tokens, {POLICY: policy}, names.LOSS, seconds, rows=batches)


def _warmup(settings: Settings, config: WarmupConfig, processor: ChatProcessor) -> Training:
    batches, seconds = _encoded(lambda count: preference_rows(settings, config, processor, count), config)
    batcher = Batcher.from_config(processor.input_spec, config)
    discriminator = setup.load_discriminator(config, config.optimizer)

    def step(number: int) -> Done:
        pairs = [pair for row in _local_rows(batches[number % BATCHES]) for pair in row]
        batch = batcher.pairs(pairs, OBJECTIVE.branch_weights)
        measured = discriminator_step(discriminator, batch, OBJECTIVE, config.optimizer.lr)
        return Done(measured, discriminator_passes(pairs, config))

    tokens = [sum(len(pair.teacher) + len(pair.student) for row in batch for pair in row) for batch in batches]
    return Training(step, tokens, {DISCRIMINATOR: discriminator}, names.DISCRIMINATOR_LOSS, seconds)


def _align(settings: Settings, config: AlignConfig, processor: ChatProcessor) -> Training:
    """Load alignment. The replay buffer, if the recipe has one, is filled with other batches' responses."""
    batches, seconds = _encoded(lambda count: sampled_groups(settings, config, processor, count), config)
    batcher = Batcher.from_config(processor.input_spec, config)
    models, timers = load_align_models(config, processor), Timers()
    replay = Replay([group[0].example for batch in batches for group in batch], processor, config)
    for batch in batches:
        replay.add(_flat(_local_rows(batch)))

    def step(number: int) -> Done:
        samples = _flat(_local_rows(batches[number % BATCHES]))
        output = align_step(models, batcher, samples, replay, config, number, timers)
        scoring = Pass(DISCRIMINATOR, output.branches.students, trained=False)
        learning = discriminator_passes(output.pairs, config)
        return Done(output.metrics, [scoring, *learning, *policy_passes(samples, config)])

    trained = {POLICY: models.policy, DISCRIMINATOR: models.discriminator}
    trained |= {"reference": models.reference} if models.reference else {}
    return Training(step, _tokens(batches), trained, names.POLICY_LOSS, seconds, timers)


def _rlvr(settings: Settings, config: RLVRConfig, processor: ChatProcessor) -> Training:
    batches, seconds = _encoded(lambda count: sampled_groups(settings, config, processor, count), config)
    policy = setup.load_policy(config)
    reference = setup.load_reference(config) if config.kl_coeff else None
    batcher, lr = Batcher.from_config(processor.input_spec, config), config.optimizer.lr

    def step(number: int) -> Done:
        samples = _flat(_local_rows(batches[number % BATCHES]))
        advantages = verified_advantages(samples, config)
        measured = policy_gradient_step(
            policy, reference, batcher.policy(samples, advantages, config, number), config, lr
        )
        return Done(measured, policy_passes(samples, config))

    models = {POLICY: policy} | ({"reference": reference} if reference else {})
    return Training(step, _tokens(batches), models, names.POLICY_LOSS, seconds)


def _encoded[Row](encode: Callable[[int], list[Row]], config: TrainingConfig) -> tuple[list[list[Row]], float]:
    """Return global batches of encoded rows, the same on every rank, and the seconds per row."""
    size = rows_per_step(config)
    start_time = time.perf_counter()
    rows = encode(size * BATCHES)
    seconds = (time.perf_counter() - start_time) / len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)], seconds


def _local_rows[Row](batch: Sequence[Row]) -> list[Row]:
    """Return this data-parallel rank's rows of a global batch."""
    share = shard_for_rank(list(range(len(batch))), groups.data_parallel_rank(), groups.data_parallel_size())
    return [batch[i] for i in share]


def _flat(of_prompts: Sequence[Group]) -> Group:
    return [sample for group in of_prompts for sample in group]


def _tokens(batches: Sequence[Sequence[Group]]) -> list[int]:
    return [sum(len(sample.sequence()) for sample in _flat(batch)) for batch in batches]
