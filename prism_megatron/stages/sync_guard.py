"""Comparison of trainer and engine after a weight sync, including images and prefixes that the engine has cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from prism_megatron.config import PolicyGradientConfig
from prism_megatron.convert.transfer import export_manifest, export_plan, export_weights
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.optim.step import evaluate_step
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_ranks, max_over_ranks
from prism_megatron.rollout.interface import CACHES, Sampling
from prism_megatron.rollout.weight_sync import WeightSync
from prism_megatron.stages.batcher import Batcher
from prism_megatron.stages.rollouts import PolicyWeights, Sampler, push_weights
from prism_megatron.stages.setup import TrainableModel
from prism_megatron.types import EncodedPrompt, Example, Message, Rollout, RolloutRequest

_TOKENS = 8
_GREEDY = Sampling(1, 0.0, 1.0, _TOKENS)
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.3, "fp8": 1.0}  # nats


class SyncGuard:
    """Pushes the policy to the engine and, every ``rollout.guard_interval`` pushes, compares the two.

    A checked push is done twice. First with the policy's weights halved: trainer and engine are compared on two
    prompts, one with an image and one longer than a block of the engine's prefix cache. Then with the original weights,
    on the same prompts, which the engine has now cached. A weight that did not arrive or a stale cache therefore makes
    a large difference, however small the training steps are.
    """

    def __init__(self, sampler: Sampler, policy: TrainableModel, rows: Sequence[Example]) -> None:
        """Guard the sampler's engine; the two prompts are the first of ``rows`` with an image, and repeated text."""
        engine, processor, config = sampler.engine, sampler.processor, sampler.config
        assert isinstance(config, PolicyGradientConfig)
        self._engine, self._policy, self._config = engine, policy, config
        self._batcher = Batcher.from_config(processor.input_spec, config)
        self._limit = config.rollout.guard_max_logprob_diff or _TOLERANCE[config.model.precision]
        self._pushes = 0
        if config.rollout.guard_interval:
            probes = [_with_image(rows), _longer_than(engine.cache_block_tokens, rows, sampler)]
            self._encoded = processor.encode_prompts(probes)
            self._requests = [RolloutRequest(processor.prompt_ids(p.messages), p.images, seed=0) for p in probes]

    def push(self, version: int) -> None:
        """Push the policy's current weights to the engine. Collective.

        Raises RuntimeError if engine and trainer disagree, naming the first parameter that differs or the stale cache.
        """
        rollout = self._config.rollout
        due = rollout.guard_interval and self._pushes % rollout.guard_interval == 0
        if not self._pushes:
            plan = export_plan(self._policy.chunks, self._policy.table, rollout.sync_bucket_mib << 20)
            if groups.is_main_rank():
                print(plan, flush=True)
        self._pushes += 1
        if due:
            with _halved(self._policy):
                push_weights(self._engine, self._policy, version, rollout)
                self._engine.reset_caches()
                self._check(version)
        push_weights(self._engine, self._policy, version, rollout)
        if due:
            self._check(version)
            self._engine.reset_caches()  # results must not depend on whether the push was checked

    def _check(self, version: int) -> None:
        if not (difference := self._difference()) <= self._limit:  # also raises for NaN
            raise RuntimeError(
                f"push {version}: engine and trainer differ by {difference:.2g} nats on a greedy token, more than "
                f"{self._limit:g}: {self._diagnosis(version)}"
            )

    def _difference(self) -> float:
        """Return the largest difference over all ranks, in nats. Collective.

        Per greedy token it is |log p_trainer - log p_engine|, or log p_trainer of the trainer's best token minus that
        of the engine's, whichever is larger.
        """
        answers = [rollouts[0] for rollouts in self._engine.generate(self._requests, _GREEDY)]
        sequences = [
            TrainingSequence(prompt, answer.token_ids) for prompt, answer in zip(self._encoded, answers, strict=True)
        ]
        batches = self._batcher.one_per_sequence(sequences)
        logits = evaluate_step(self._policy.chunks, batches, lambda chunk, batch: chunk(batch, return_logits=True))
        found = [
            self._differences(prompt, answer, values)
            for prompt, answer, values in zip(self._encoded, answers, logits, strict=False)
        ]
        return max_over_ranks(max(found))

    def _differences(self, prompt: EncodedPrompt, answer: Rollout, logits: Tensor) -> float:
        first = len(prompt.token_ids) - 1
        logprobs = logits[first : first + len(answer.token_ids)].log_softmax(-1)
        chosen = torch.tensor(answer.token_ids, device=logprobs.device)[:, None]
        trainer = logprobs.gather(1, chosen)[:, 0]
        best = logprobs.index_fill(1, torch.tensor(self._engine.banned_token_ids).to(chosen), -torch.inf).amax(-1)
        engine = torch.tensor(answer.logprobs, device=trainer.device)
        return float(torch.maximum((trainer - engine).abs(), best - trainer).max())

    def _diagnosis(self, version: int) -> str:
        """Find out why the two disagree. Collective."""
        policy, engine = self._policy, self._engine
        pushed = PolicyWeights(policy, self._config.rollout.sync_bucket_mib << 20)
        if wrong := engine.differing_parameters(pushed):
            return f"{len(wrong)} of the engine's parameters differ from those that were sent, the first is {wrong[0]}"
        for number, name in enumerate(CACHES, start=1):
            engine.reset_caches(number)
            if self._difference() <= self._limit:
                return f"its parameters are right, but its {name} still has results of earlier weights"
        sync = WeightSync(version, export_manifest(policy.chunks, policy.table), with_checksums=True)
        for _ in sync.checked(export_weights(policy.chunks, policy.table)):
            pass
        sync.check_agreement(sync.by_receiver(gather_over_ranks(sync.checksums)))
        return "all parameters are as sent and no cache is stale: the two compute different models"


@contextmanager
def _halved(policy: TrainableModel) -> Iterator[None]:
    """Halve the policy's weights inside the context; exact, because only exponents change."""
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(2.0)


def _with_image(rows: Sequence[Example]) -> Example:
    return next((row for row in rows if row.images), rows[0])


def _longer_than(tokens: int, rows: Sequence[Example], sampler: Sampler) -> Example:
    """Make a text prompt of more than ``tokens`` tokens, or the longest the engine accepts."""
    processor, room = sampler.processor, sampler.config.rollout.max_model_len - _TOKENS
    text = rows[0].messages[-1].content.replace("<image>", "").strip()

    def repeated(times: int) -> Example:
        return Example("guard", (Message("user", " ".join([text] * times)),), (), "prompt of the sync guard")

    row, times = repeated(1), 1
    while len(processor.prompt_ids(row.messages)) <= tokens + 1:
        longer = repeated(times := 2 * times)
        if len(processor.prompt_ids(longer.messages)) > room:
            break
        row = longer
    return row
