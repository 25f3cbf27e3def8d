"""A replay buffer of past responses, so that the discriminator does not forget what the policy no longer produces."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from prism_megatron.config import AlignConfig
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.lazy import positions_by_id
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.pairs import Pair, branch_pairs
from prism_megatron.data.samples import Sample
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_data_parallel
from prism_megatron.types import Example

Texts = tuple[str, str]  # the caption block and the reasoning block of a response


class Replay:
    """The newest responses to the last prompts, the same on every rank.

    ``responses`` maps prompt ids to texts; it is saved in checkpoints and does not depend on the parallel layout.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        processor: ChatProcessor,
        config: AlignConfig,
        responses: Mapping[str, list[Texts]] | None = None,
    ) -> None:
        self.responses = dict(responses or {})
        self._processor, self._config = processor, config
        self._rows = rows

    def pairs(self, iteration: int) -> list[Pair]:
        """Draw past responses and return this data-parallel rank's, paired with their demonstrations.

        The draw depends on seed and iteration only.
        """
        stored = [(prompt_id, texts) for prompt_id, newest in self.responses.items() for texts in newest]
        count = min(self._config.replay.responses_per_iteration, len(stored))
        drawn = random.Random(f"{self._config.run.seed}/{iteration}/replay").sample(range(len(stored)), count)
        local = [stored[i] for i in shard_for_rank(drawn, groups.data_parallel_rank(), groups.data_parallel_size())]
        positions = positions_by_id(self._rows, [prompt_id for prompt_id, _ in local])
        rows = [self._rows[positions[prompt_id]] for prompt_id, _ in local]
        pairs = []
        for (_, texts), row, prompt in zip(local, rows, self._processor.encode_prompts(rows), strict=True):
            assert row.teacher_caption is not None
            assert row.teacher_reasoning is not None
            teacher = branch_sequences(self._processor, prompt, row.teacher_caption, row.teacher_reasoning)
            student = branch_sequences(self._processor, prompt, *texts)
            pairs += branch_pairs(teacher, student, row.id, self._config, is_on_policy=False)
        return pairs

    def add(self, samples: Sequence[Sample]) -> None:
        """Store all ranks' responses inside the grammar and drop the oldest beyond the limits. Collective."""
        limits = self._config.replay
        if not limits.prompts:
            return
        local = [(s.example.id, (s.response.caption_block, s.response.reasoning_block)) for s in samples if s.response]
        for prompt_id, texts in gather_over_data_parallel(local):
            newest = [*self.responses.pop(prompt_id, []), texts]
            self.responses[prompt_id] = newest[-limits.responses_per_prompt :]
        for prompt_id in list(self.responses)[: -limits.prompts]:
            del self.responses[prompt_id]
