"""Past responses, shown to the discriminator again lest it forget what the policy no longer says."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from prism_megatron.config import AlignConfig
from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.loader import shard_for_rank
from prism_megatron.data.pairs import Pair, branch_pairs
from prism_megatron.data.samples import Sample
from prism_megatron.parallel import groups
from prism_megatron.parallel.collectives import gather_over_data_parallel
from prism_megatron.types import Example

Texts = tuple[str, str]  # the caption block and the reasoning block of a response


class Replay:
    """The newest responses to the prompts last seen, by prompt, the same on every rank.

    ``kept`` is what a checkpoint holds: plain texts, which do not depend on the layout. What is drawn from it depends
    on seed and iteration only.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        processor: ChatProcessor,
        config: AlignConfig,
        kept: Mapping[str, list[Texts]] | None = None,
    ) -> None:
        self.kept = dict(kept or {})
        self._processor, self._config = processor, config
        self._rows = {row.id: row for row in rows} if config.replay.prompts else {}

    def pairs(self, iteration: int) -> list[Pair]:
        """This data-parallel rank's part of the responses drawn for an iteration, beside their demonstrations."""
        places = [(prompt, number) for prompt, texts in self.kept.items() for number in range(len(texts))]
        drawn = min(self._config.replay.responses_per_iteration, len(places))
        chosen = random.Random(f"{self._config.run.seed}/{iteration}/replay").sample(range(len(places)), drawn)
        mine = [places[i] for i in shard_for_rank(chosen, groups.data_parallel_rank(), groups.data_parallel_size())]
        rows = [self._rows[prompt] for prompt, _ in mine]
        pairs = []
        for (prompt_id, number), row, prompt in zip(mine, rows, self._processor.encode_prompts(rows), strict=True):
            assert row.teacher_caption is not None
            assert row.teacher_reasoning is not None
            teacher = branch_sequences(self._processor, prompt, row.teacher_caption, row.teacher_reasoning)
            student = branch_sequences(self._processor, prompt, *self.kept[prompt_id][number])
            pairs += branch_pairs(teacher, student, row.id, self._config, is_on_policy=False)
        return pairs

    def add(self, samples: Sequence[Sample]) -> None:
        """Keep this iteration's responses inside the grammar; what is oldest makes room. Collective."""
        if not self._config.replay.prompts:
            return
        mine = [(s.example.id, (s.response.caption_block, s.response.reasoning_block)) for s in samples if s.response]
        for prompt, texts in gather_over_data_parallel(mine):
            held = [*self.kept.pop(prompt, []), texts]
            self.kept[prompt] = held[-self._config.replay.responses_per_prompt :]
        for prompt in list(self.kept)[: -self._config.replay.prompts]:
            del self.kept[prompt]
